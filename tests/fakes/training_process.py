"""Real training processes, to be killed at chosen points: forked from one that has imported torch and trl already.

`python -m tests.fakes.training_process` is the parent of them all; `TrainingProcesses` talks to it. Each child runs
`tasks.trainer.worker.main` as the launcher starts it, with its own session, log and standard input.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tasks.config import TrainingConfig
from tasks.store.workspace import PreferencesRef, folder_digest
from tasks.train.launch import base_digest, training_key
from tasks.train.spec import TrainingSpec

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Kill:
    """Send `number` to the process itself when `point` is reached for the `count`-th time.

    Points: load, training_step, gradient, prediction_step, reference, write (a checkpoint's local files), put (a file
    of any committed folder), adapter (the finished adapter is about to be written).
    `full_disk` raises ENOSPC right after that point instead.
    """

    point: str
    count: int = 1
    number: int = signal.SIGTERM
    full_disk: bool = False


@dataclass
class TrainingProcesses:
    """Client of the forking parent."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **self.environment}
        environment["PYTHONPATH"] = str(REPOSITORY)
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.training_process"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, cwd=REPOSITORY,
        )  # fmt: skip

    def start(
        self, preferences: PreferencesRef, workspace: Path, training: TrainingConfig, kills: tuple[Kill, ...] = ()
    ) -> int:
        number = len(list(self.root.glob("child-*")))
        folder = self.root / f"child-{number}"
        folder.mkdir(parents=True)
        spec = TrainingSpec(
            preferences=preferences, workspace=str(workspace), training=training,
            key=training_key(preferences, training), sft_sha256=folder_digest(training.sft_adapter),
            base_sha256=base_digest(training),
        )  # fmt: skip
        (folder / "spec.json").write_text(spec.model_dump_json())
        return int(self._ask({"start": str(folder), "kills": [asdict(kill) for kill in kills]}))

    def wait(self, pid: int) -> int:
        return int(self._ask({"wait": pid}))

    def run(self, preferences: PreferencesRef, workspace: Path, training: TrainingConfig, *kills: Kill) -> int:
        return self.wait(self.start(preferences, workspace, training, kills))

    def log(self) -> str:
        return (self._newest() / "log").read_text()

    def outcome(self) -> dict[str, Any]:
        """Return what the newest process told its parent at its end."""
        value: dict[str, Any] = json.loads((self._newest() / "outcome.json").read_text())
        return value

    def _newest(self) -> Path:
        return max(self.root.glob("child-*"), key=lambda folder: int(folder.name.removeprefix("child-")))

    def close(self) -> None:
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        self._parent.wait(30)

    def _ask(self, question: dict[str, Any]) -> str:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(question) + "\n")
        self._parent.stdin.flush()
        return self._parent.stdout.readline()


def _arm(kills: list[Kill]) -> None:
    from tasks.trainer import run
    from tasks.trainer.checkpoints import Checkpoint
    from tasks.trainer.trainer import ExactTrainer

    points: dict[str, tuple[Any, str]] = {
        "load": (run, "load_base"),
        "reference": (ExactTrainer, "_live_reference"),
        "training_step": (ExactTrainer, "training_step"),
        "gradient": (ExactTrainer, "_get_grad_norm"),
        "prediction_step": (ExactTrainer, "prediction_step"),
        "write": (Checkpoint, "write"),
        "put": (shutil, "copyfileobj"),  # which Workspace.commit_folder does for each file, and nothing else here
        "adapter": (run, "save_adapter"),
    }
    for kill in kills:
        owner, name = points[kill.point]
        setattr(owner, name, _killing(getattr(owner, name), kill))


def _killing(original: Callable[..., Any], kill: Kill) -> Callable[..., Any]:
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == kill.count and kill.full_disk:
            original(*args, **kwargs)
            raise OSError(28, "No space left on device")
        if calls == kill.count:
            os.kill(os.getpid(), kill.number)
        return original(*args, **kwargs)

    return wrapped


def _child(folder: Path, kills: list[Kill], lifeline: int) -> None:
    from tasks.trainer import worker

    os.setsid()
    os.dup2(lifeline, 0)
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _arm(kills)
    code = 1
    try:
        code = worker.main([str(folder)])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    import tasks.trainer.run  # noqa: F401  the slow part, once for all children

    lifelines: dict[int, int] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            read_end, write_end = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(write_end)
                _child(Path(question["start"]), [Kill(**kill) for kill in question["kills"]], read_end)
            os.close(read_end)
            lifelines[pid] = write_end
            print(pid, flush=True)
        else:
            pid, status = os.waitpid(question["wait"], 0)
            os.close(lifelines.pop(pid))
            print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
