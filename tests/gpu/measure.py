"""Measures trainings of a 3B-shaped model on this machine's GPU; see README.md. Started by run.sh.

    python -m tests.gpu.measure --out FOLDER [--seconds 330] [--tiny] [--only NAME ...]

Each case is a process of its own; the next one imports its libraries meanwhile. Every result is a line of
FOLDER/results.jsonl as soon as it is there, so that a run that was cut off still says something.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu import product
from tests.gpu.materials import TINY, Size, make_models, make_pairs, mixed_lengths

PAIRS_A_STEP = 16
LEAST_SECONDS = 20.0


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        name: also the training's key.
        pairs: short, long or mixed.
        steps: optimizer steps of 16 pairs; the first one is not timed.
        plain: TRL without preflow.
        cold: a process that has imported nothing yet.
        no_cudnn: attention without cuDNN, which prepares itself for every new length.
        stop_after: SIGTERM half a second after this step; the exit is timed.
        resumes: the case whose training is taken up again.
        like: the case whose adapter must be the same.
        settings: of the training, over the defaults.
    """

    name: str
    pairs: str = "short"
    steps: int = 4
    plain: bool = False
    cold: bool = False
    no_cudnn: bool = False
    stop_after: int | None = None
    resumes: str | None = None
    like: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The training's name in the workspace."""
        return self.resumes or self.name


EXACT: dict[str, Any] = {"full_determinism": True}  # equal work must give equal bytes
NO_GC: dict[str, Any] = {"gradient_checkpointing": False}
BATCH_4: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
# In the order of what is most worth knowing: what does not fit into the time is left out.
CASES = (
    Case("short", cold=True, settings={"save_steps": 2}),
    Case("long", "long", steps=3),
    Case("short, plain TRL", plain=True),
    Case("long, plain TRL", "long", steps=3, plain=True),
    Case("short, SIGTERM", stop_after=2),
    Case("short, resumed", cold=True, resumes="short, SIGTERM", like="short"),
    Case("short, again", like="short"),
    Case("exact", settings=EXACT),
    Case("exact, again", settings=EXACT, like="exact"),
    Case("exact, SIGTERM", stop_after=2, settings=EXACT),
    Case("exact, resumed", resumes="exact, SIGTERM", like="exact", settings=EXACT),
    Case("short, without checkpointing", settings=NO_GC),
    Case("short, without checkpointing, plain TRL", plain=True, settings=NO_GC),
    Case("long, batch 4", "long", steps=3, settings=BATCH_4),
    Case("long, without checkpointing", "long", steps=3, settings=NO_GC),
    Case("short, batch 4", settings=BATCH_4),
    Case("mixed, by length", "mixed"),
    Case("mixed, exact", "mixed", settings=EXACT),
    Case("mixed, without cuDNN attention", "mixed", no_cudnn=True, settings={"cache_reference": False}),
    Case("mixed, plain TRL", "mixed", plain=True),
    Case("mixed, shuffled", "mixed", settings={"group_by_length": False}),
)


class Bench:
    """The materials on disk, the processes, and the results.

    Args:
        root: local folder for models, pairs and the workspace.
        out: folder for results.jsonl, children.log and table.md.
        size: of the model and the pairs.
        until: when to stop, on the monotonic clock.
    """

    def __init__(self, root: Path, out: Path, size: Size, until: float) -> None:
        self.root = root
        self.out = out
        self.size = size
        self.until = until
        self.workspace = root / "workspace"
        self.digests: dict[str, str] = {}
        self.results: list[dict[str, Any]] = []
        self._log = (out / "children.log").open("ab")
        self._spare: subprocess.Popen[bytes] | None = None

    def record(self, result: dict[str, Any]) -> None:
        """Write one result at once, and print it."""
        self.results.append(result)
        line = json.dumps(result)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def prepare(self) -> None:
        """Make models and pairs."""
        timings = {}

        def timed(name: str, work: Callable[[], Any]) -> Any:
            started = time.monotonic()
            found = work()
            timings[name] = round(time.monotonic() - started, 2)
            return found

        self._spare = self._start()
        make = [sys.executable, "-m", "tests.gpu.measure", "--make", str(self.root)] + ["--tiny"] * (self.size == TINY)
        timed("models", lambda: subprocess.run(make, check=True, timeout=self._left()))
        lengths = {
            "short": [self.size.short] * 64, "long": [self.size.long] * 48, "mixed": mixed_lengths(64, self.size),
        }  # fmt: skip
        for name, each in lengths.items():
            for steps in {case.steps for case in CASES if case.pairs == name}:
                make_pairs(self.root / f"{name}-{steps}", self.size, each[: steps * PAIRS_A_STEP])
        self.digests["base"] = timed("digest of the base", lambda: product.digest(self.root / "base"))
        self.digests["sft"] = timed("digest of the adapter", lambda: product.digest(self.root / "sft"))
        base = (self.root / "base" / "model.safetensors").stat().st_size
        self.record({"prepared": timings, "base_gb": round(base / 1e9, 2)})

    def run(self, case: Case) -> None:
        """Do one case and record it."""
        folder = self.root / "jobs" / case.name / case.key
        settings = {**self._settings(case), **case.settings}
        product.write_spec(folder, self.root / f"{case.pairs}-{case.steps}", self.workspace, settings, self.digests)
        self._log.write(f"\n== {case.name}\n".encode())
        self._log.flush()
        started = time.time()
        process = self._launch(case, folder)
        found: dict[str, Any] = {"case": case.name, "pairs": case.pairs, "plain": case.plain, **case.settings}
        found |= self._wait(case, process, folder)
        self.record(found | figures(case, timeline(folder), started) | self._outcome(case, folder))
        shutil.rmtree(folder / "output", ignore_errors=True)

    def _settings(self, case: Case) -> dict[str, Any]:
        return {
            "base_model": str(self.root / "base"), "sft_adapter": str(self.root / "sft"), "learning_rate": 1e-4,
            "warmup_steps": 0, "max_length": self.size.short if case.pairs == "short" else self.size.long,
            "grace_seconds": 60, "save_steps": 1000, "lease_seconds": 30, "load_in_4bit": self.size != TINY,
        }  # fmt: skip

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.child", *arguments],
            stdin=subprocess.PIPE, stdout=self._log, stderr=self._log,
        )  # fmt: skip

    def _launch(self, case: Case, folder: Path) -> subprocess.Popen[bytes]:
        job = json.dumps({"folder": str(folder), "plain": case.plain, "no_cudnn": case.no_cudnn})
        if case.cold:
            return self._start(job)
        process, self._spare = self._spare or self._start(), None
        assert process.stdin is not None
        process.stdin.write(job.encode() + b"\n")
        process.stdin.flush()
        self._spare = self._start()
        return process

    def _left(self) -> float:
        return max(1.0, self.until - time.monotonic())

    def _wait(self, case: Case, process: subprocess.Popen[bytes], folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        try:
            if case.stop_after is not None:
                self._wait_for_step(case.stop_after, process, folder)
                time.sleep(0.5)
                told = time.monotonic()
                process.send_signal(signal.SIGTERM)
                process.wait(self._left())
                found["seconds_from_sigterm_to_exit"] = round(time.monotonic() - told, 2)
            process.wait(self._left())
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            found["cut"] = "out of time"
        return found | {"exit": process.returncode}

    def _wait_for_step(self, step: int, process: subprocess.Popen[bytes], folder: Path) -> None:
        deadline = time.monotonic() + self._left()
        while process.poll() is None and time.monotonic() < deadline:
            if any(line.get("step", 0) >= step for line in timeline(folder)):
                return
            time.sleep(0.05)

    def _outcome(self, case: Case, folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        outcome = folder / "outcome.json"
        if outcome.exists():
            found["outcome"] = json.loads(outcome.read_text())["message"][:400]
        rows = product.metrics(self.workspace, case.key)
        if rows and not case.plain:
            found["first_loss"] = rows[0].get("dpo_loss", rows[0]["loss"])
        if case.like:
            found["compared_with " + case.like] = self._compare(case.key, case.like)
        return found

    def _compare(self, one: str, other: str) -> dict[str, Any]:
        from safetensors.numpy import load_file

        folders = [product.training_folder(self.workspace, key) / "adapter" for key in (one, other)]
        files = [folder / "adapter_model.safetensors" for folder in folders]
        if not all(file.exists() for file in files):
            return {"missing": [str(file) for file in files if not file.exists()]}
        ours, theirs, start = load_file(files[0]), load_file(files[1]), load_file(self.root / "sft" / files[0].name)
        apart = sum(float(((ours[name] - theirs[name]) ** 2).sum(dtype="float64")) for name in ours) ** 0.5
        moved = sum(float(((theirs[name] - start[name]) ** 2).sum(dtype="float64")) for name in ours) ** 0.5
        equal = sum(int((ours[name] == theirs[name]).sum()) for name in ours) / sum(v.size for v in ours.values())
        return {
            "same_bytes": files[0].read_bytes() == files[1].read_bytes(),
            "same_metrics": product.metrics(self.workspace, one) == product.metrics(self.workspace, other),
            "share_of_equal_weights": round(equal, 6),
            "distance_over_movement": apart / moved if moved else None,
        }

    def close(self) -> None:
        """End the process that waits for a job."""
        if self._spare is not None:
            self._spare.kill()
            self._spare.wait()


def timeline(folder: Path) -> list[dict[str, Any]]:
    """Return what a child has said so far; a line that is just being written is left out."""
    file = folder / "timeline.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def figures(case: Case, lines: list[dict[str, Any]], started: float) -> dict[str, Any]:
    """Return what a training's timeline says: seconds by phase, pairs a second, memory."""
    found: dict[str, Any] = {"seconds": round(time.time() - started, 1)}
    phases: dict[str, Any] = {}
    for line in lines:
        if "did" in line:
            phases.setdefault(line["did"], []).append(round(line["seconds"], 2))
        found |= {name: line[name] for name in ("memory",) if name in line}
        if "loss" in line.get("logged", {}):
            found.setdefault("first_loss", line["logged"]["loss"])
    found["phases"] = {name: values[0] if len(values) == 1 else values for name, values in phases.items()}
    steps: dict[int, float] = {}
    for line in lines:
        if line.get("phase") == "training":
            steps.setdefault(line["step"], line["at"])
    times = [steps[step] for step in sorted(steps) if step > 0]
    if times:
        found["start_to_first_step"] = round(times[0] - started, 1)
    apart = [later - earlier for earlier, later in itertools.pairwise(times)]
    if apart:
        found["step_seconds"] = [round(seconds, 3) for seconds in apart]
        found["pairs_per_second"] = round(PAIRS_A_STEP / statistics.median(apart), 2)
    begun = [line["at"] for line in lines if line.get("phase") == "training" and line["step"] == 0]
    if times and begun and len(times) == case.steps:
        found["pairs_per_second_all_steps"] = round(PAIRS_A_STEP * case.steps / (times[-1] - max(begun)), 2)
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Return the trainings as a Markdown table."""
    rows = ["| Training | Exit | pairs/s | all steps | GB in tensors | GB taken | First loss | To the first step, s |",
            "|---|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for found in results:
        if "case" in found:
            memory = found.get("memory", {})
            cells = [found["case"], found.get("cut", found.get("exit")), found.get("pairs_per_second"),
                     found.get("pairs_per_second_all_steps"), memory.get("allocated"), memory.get("reserved"),
                     f"{found['first_loss']:.7f}" if "first_loss" in found else None,
                     found.get("start_to_first_step")]  # fmt: skip
            rows.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def card() -> dict[str, Any]:
    """Return what this machine is; no torch here, so that the card stays untouched."""
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        name = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        name = "no NVIDIA GPU"
    return {"card": name, "cpus": os.cpu_count(), "python": sys.version.split()[0]}


def main() -> None:
    """Prepare, do the cases in their order as long as there is time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=330)
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, to try this without a GPU")
    parser.add_argument("--only", nargs="*", help="names of cases; others are left out")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = TINY if options.tiny else Size()
    if options.make:
        make_models(options.make, size)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="preflow-gpu-") as folder:
        bench = Bench(Path(folder), options.out, size, time.monotonic() + options.seconds)
        try:
            bench.record({**card(), "size": asdict(size)})
            bench.prepare()
            for case in CASES:
                if options.only and case.name not in options.only:
                    continue
                if bench.until - time.monotonic() < LEAST_SECONDS:
                    bench.record({"case": case.name, "cut": "no time left"})
                    continue
                try:
                    bench.run(case)
                except (ArithmeticError, LookupError, OSError, ValueError, subprocess.SubprocessError) as error:
                    bench.record({"case": case.name, "error": f"{type(error).__name__}: {error}"})
        finally:
            bench.close()
            (options.out / "table.md").write_text(table(bench.results))
            print(table(bench.results), flush=True)


if __name__ == "__main__":
    main()
