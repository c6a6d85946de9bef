"""The launcher under fire: interrupted, killed, and two trainers for one key."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.config import TrainingConfig
from tasks.train.launch import run_training, training_key
from tasks.train.spec import Progress
from tests.deployed import until
from tests.fakes.tiny_training import TinyWorld
from tests.fakes.training_process import REPOSITORY, Kill, TrainingProcesses

ENDLESS = {"max_steps": 100_000, "save_steps": 50_000, "eval_steps": 50_000, "logging_steps": 100}


class Terminated(BaseException):
    """What Prefect raises in the main thread on SIGTERM is a BaseException like this one."""


def trainers(workspace: Path) -> list[int]:
    """Return the pids of the training processes whose workspace this is."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                command = (process / "cmdline").read_bytes().split(b"\0")
                spec = Path(command[-2].decode()) / "spec.json" if b"tasks.trainer.worker" in command else None
                mine = spec is not None and json.loads(spec.read_text())["workspace"] == str(workspace)
            except (OSError, ValueError, IndexError):
                continue
            if mine:
                found.append(int(process.name))
    return found


def checkpoints(workspace: Path) -> list[Path]:
    return list(workspace.glob("training/*/checkpoints/step-*/COMMITTED.json"))


@pytest.mark.long  # SIGTERM is sent in test_training_exactness, too
def test_an_interrupted_task_lets_the_trainer_save_and_raises_on(world: TinyWorld, tmp_path: Path) -> None:
    training = world.config(**ENDLESS)

    def interrupt(progress: Progress) -> None:
        if progress.step >= 20:
            raise Terminated

    with pytest.raises(Terminated):
        run_training(world.preferences, str(tmp_path), training, training_key(world.preferences, training), interrupt)
    assert len(checkpoints(tmp_path)) == 1
    assert trainers(tmp_path) == []
    assert not list(tmp_path.glob("training/*/adapter"))


@pytest.mark.long  # waits for an orphan to end
def test_a_launcher_that_is_killed_leaves_no_trainer_behind(world: TinyWorld, tmp_path: Path) -> None:
    training = world.config(**ENDLESS)
    arguments = [world.preferences.model_dump_json(), str(tmp_path), training.model_dump_json()]
    arguments.append(training_key(world.preferences, training))
    code = (
        "import sys; from tasks.config import TrainingConfig; from tasks.store.workspace import PreferencesRef\n"
        "from tasks.train.launch import run_training\n"
        "a = sys.argv; run_training(PreferencesRef.model_validate_json(a[1]), a[2],"
        " TrainingConfig.model_validate_json(a[3]), a[4])"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=REPOSITORY)
    # Row 0 is logged before the first update: with a second row there is a complete step to save.
    until(lambda: any(len(f.read_text().splitlines()) > 1 for f in tmp_path.glob("training/*/metrics.jsonl")), 120)
    (trainer,) = trainers(tmp_path)
    launcher.kill()
    launcher.wait()
    until(lambda: trainer not in trainers(tmp_path), training.grace_seconds + 60)
    assert len(checkpoints(tmp_path)) == 1, "its last act was to save"


@pytest.mark.long  # waits for a lease
def test_a_second_trainer_waits_and_takes_what_the_first_made(
    world: TinyWorld, processes: TrainingProcesses, tmp_path: Path
) -> None:
    training = world.config()
    first = processes.start(world.preferences, tmp_path, training)
    second = processes.start(world.preferences, tmp_path, training)
    assert {processes.wait(first), processes.wait(second)} == {0}
    assert len(list(tmp_path.glob("training/*/adapter/COMMITTED.json"))) == 1
    assert json.loads(next(tmp_path.glob("training/*/lease.json")).read_text())["token"] == 2


@pytest.mark.long  # waits for a lease to run out
def test_a_zombie_that_comes_back_cannot_commit(world: TinyWorld, processes: TrainingProcesses, tmp_path: Path) -> None:
    training: TrainingConfig = world.config(lease_seconds=3)
    zombie = processes.start(world.preferences, tmp_path, training, (Kill("training_step", 9, signal.SIGSTOP),))
    until(lambda: is_stopped(zombie), 60)
    assert processes.run(world.preferences, tmp_path, training) == 0, processes.log()
    (adapter,) = tmp_path.glob("training/*/adapter")
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in adapter.iterdir()}
    os.kill(zombie, signal.SIGCONT)
    assert processes.wait(zombie) == 75
    assert {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in adapter.iterdir()} == before
    logs = [log.read_text() for log in processes.root.glob("child-*/log")]
    assert any("lost its lease to another" in log for log in logs)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
