"""`preflow evidence`."""

import hashlib
from pathlib import Path

from preflow.options import Changes, Run


def evidence(run: Run = "config.yaml", /, *, to: Path = Path("evidence.json"), changes: Changes = ()) -> None:
    """Write one file with all that a run's verdict rests on: comparisons, votes, rubric, digests, settings.

    It holds the held-out prompts and what was written on them; no address, no secret, no folder.

    Parameters
    ----------
    to
        The file; equal runs give equal bytes.
    changes
        The changes that the run was made with.
    """
    from preflow.finished import find_run
    from tasks.errors import PreflowError
    from tasks.evaluate.evidence import collect_evidence

    config, result, _ = find_run(run, changes)
    text = collect_evidence(result.evaluation, config.promotion).text()
    try:
        to.write_bytes(text)
    except OSError as error:
        raise PreflowError(f"{to}: cannot be written: {error.strerror}; give another file with --to") from error
    print(f"wrote {to}, {len(text):,} bytes, sha256 {hashlib.sha256(text).hexdigest()}")
    print(f"Anyone can recompute every figure from it: preflow verify {to}")
