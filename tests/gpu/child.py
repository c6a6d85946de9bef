"""A process that trains once: `python -m tests.gpu.child [JOB]`; without JOB it imports everything and waits for one.

JOB is JSON: `folder` with spec.json, `plain` for TRL without preflow, and `no_cudnn` (see `Case`). What happens is
written, with the time, to timeline.jsonl in that folder. Standard input stays open as long as the parent lives.
"""

import time

BORN = time.time()

import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from tests.gpu import product  # noqa: E402


def main(arguments: list[str]) -> int:
    """Import, take the job, do it, and say how much memory it took."""
    started = time.monotonic()
    product.import_all()
    import torch

    imported = time.monotonic() - started
    line = arguments[0] if arguments else sys.stdin.buffer.readline().decode()
    if not line:
        return 0
    job = json.loads(line)
    folder = Path(job["folder"])
    if job["no_cudnn"]:
        torch.backends.cuda.enable_cudnn_sdp(False)
    with (folder / "timeline.jsonl").open("a") as out:

        def say(what: dict[str, Any]) -> None:
            out.write(json.dumps({"at": time.time(), **what}) + "\n")
            out.flush()

        say({"did": "import_all", "seconds": imported, "born": BORN})
        try:
            return product.train_plainly(folder, say) if job["plain"] else product.train(folder, say)
        finally:
            say({"memory": memory()})


def memory() -> dict[str, float]:
    """Return torch's peak memory on the card, in GB: what tensors took, and what was taken from the card for them."""
    import torch

    if not torch.cuda.is_available():
        return {}
    peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {name: round(value / 1e9, 2) for name, value in peaks.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
