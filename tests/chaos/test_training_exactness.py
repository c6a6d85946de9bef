"""A training that is killed, preempted or moved to another machine ends in the same bytes.

`make test` kills it once by each signal, `make test-all` at every point.
"""

import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.config import TrainingConfig
from tasks.store.workspace import Workspace
from tests.fakes.tiny_training import CHAT_TEMPLATE, TinyWorld
from tests.fakes.training_process import Kill, TrainingProcesses

PREEMPTED, USER_ERROR = 75, 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld.build(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingProcesses]:
    processes = TrainingProcesses(tmp_path_factory.mktemp("children"))
    yield processes
    processes.close()


@pytest.fixture
def config(world: TinyWorld) -> TrainingConfig:
    """12 steps with dropout, accumulation and shuffling; logs, evaluations and checkpoints at odd steps."""
    return world.config(disable_dropout=False)


@pytest.fixture(scope="module")
def uninterrupted(
    world: TinyWorld, processes: TrainingProcesses, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    training = world.config(disable_dropout=False)
    workspace = tmp_path_factory.mktemp("uninterrupted")
    assert processes.run(world.preferences, workspace, training) == 0, processes.log()
    return results(workspace)


def results(workspace: Path) -> dict[str, bytes]:
    """Return the bytes of everything that must not depend on what happened on the way."""
    folder = training_folder(workspace)
    files = [*(folder / "adapter").iterdir(), *(folder / name for name in ("metrics.jsonl", "health.json"))]
    found = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    manifest = Workspace(workspace).read_manifest(str(folder / "manifest.json")).model_copy(update={"seconds": 0.0})
    found["manifest.json"] = manifest.model_dump_json().replace(str(workspace), "").encode()
    return found


def finish(
    processes: TrainingProcesses, world: TinyWorld, workspace: Path, training: TrainingConfig
) -> dict[str, bytes]:
    assert processes.run(world.preferences, workspace, training) == 0, processes.log()
    return results(workspace)


POINTS = [Kill("gradient", 7), Kill("put", 4, signal.SIGKILL)]
TERMS = [("load", 1), ("prediction_step", 8), ("write", 2), ("adapter", 1), ("training_step", 1), ("training_step", 12),
         ("prediction_step", 2)]  # fmt: skip
KILLS = [("training_step", 15), ("reference", 3), ("write", 2), ("put", 2)]
MORE_POINTS = [Kill(*point) for point in TERMS] + [Kill(*point, signal.SIGKILL) for point in KILLS]
DAMAGES = [("optimizer.safetensors", "cut")]
MORE_DAMAGES = [("COMMITTED.json", "removed"), ("optimizer.safetensors", "removed"), ("COMMITTED.json", "cut")]


def only_in_test_all(*cases: Any) -> list[Any]:
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long) for case in cases]


@pytest.mark.parametrize(
    "kill",
    [*POINTS, *only_in_test_all(*MORE_POINTS)],
    ids=lambda kill: f"{signal.Signals(kill.number).name}-{kill.point}-{kill.count}",
)
def test_a_kill_anywhere_changes_nothing(
    kill: Kill,
    world: TinyWorld,
    processes: TrainingProcesses,
    config: TrainingConfig,
    uninterrupted: dict[str, bytes],
    tmp_path: Path,
) -> None:
    code = processes.run(world.preferences, tmp_path, config, kill)
    assert code == (PREEMPTED if kill.number == signal.SIGTERM else -kill.number), processes.log()
    assert not (training_folder(tmp_path) / "adapter" / "COMMITTED.json").exists()
    assert finish(processes, world, tmp_path, config) == uninterrupted


def training_folder(workspace: Path) -> Path:
    (folder,) = (workspace / "training").iterdir()
    return folder


@pytest.mark.long  # one kill and one full disk are shown by the tests next to it
def test_two_sigterms_save_once_and_lose_nothing(
    world: TinyWorld,
    processes: TrainingProcesses,
    config: TrainingConfig,
    uninterrupted: dict[str, bytes],
    tmp_path: Path,
) -> None:
    twice = Kill("training_step", 6), Kill("write", 1)
    assert processes.run(world.preferences, tmp_path, config, *twice) == PREEMPTED
    names = [folder.name for folder in (training_folder(tmp_path) / "checkpoints").iterdir()]
    assert names == ["step-000002"]  # the sixth micro-batch belongs to the third step
    assert finish(processes, world, tmp_path, config) == uninterrupted


def test_sigterm_saves_the_last_complete_step_not_the_last_periodic_one(
    world: TinyWorld, processes: TrainingProcesses, config: TrainingConfig, tmp_path: Path
) -> None:
    assert processes.run(world.preferences, tmp_path, config, Kill("training_step", 14)) == PREEMPTED
    assert (training_folder(tmp_path) / "checkpoints" / "step-000006" / "COMMITTED.json").exists()
    assert "checkpoint_seconds" in processes.log()


@pytest.mark.long  # one kill and one full disk are shown by the tests next to it
def test_a_full_disk_costs_a_checkpoint_but_not_the_training(
    world: TinyWorld,
    processes: TrainingProcesses,
    config: TrainingConfig,
    uninterrupted: dict[str, bytes],
    tmp_path: Path,
) -> None:
    kills = Kill("write", 2, full_disk=True), Kill("training_step", 21)
    assert processes.run(world.preferences, tmp_path, config, *kills) == PREEMPTED
    assert "No space left on device" in processes.log()
    assert finish(processes, world, tmp_path, config) == uninterrupted


def test_a_full_disk_during_the_save_on_sigterm_falls_back_to_the_checkpoint_before(
    world: TinyWorld,
    processes: TrainingProcesses,
    config: TrainingConfig,
    uninterrupted: dict[str, bytes],
    tmp_path: Path,
) -> None:
    kills = Kill("training_step", 14), Kill("write", 2, full_disk=True)
    assert processes.run(world.preferences, tmp_path, config, *kills) == PREEMPTED
    assert "No space left on device" in processes.log()
    assert finish(processes, world, tmp_path, config) == uninterrupted
    assert "resuming from the checkpoint of step 4" in processes.log()


@pytest.mark.parametrize(("name", "damage"), [*DAMAGES, *only_in_test_all(*MORE_DAMAGES)])
def test_a_torn_checkpoint_is_named_and_skipped(
    name: str,
    damage: str,
    world: TinyWorld,
    processes: TrainingProcesses,
    config: TrainingConfig,
    uninterrupted: dict[str, bytes],
    tmp_path: Path,
) -> None:
    killed = Kill("training_step", 19, number=signal.SIGKILL)
    assert processes.run(world.preferences, tmp_path, config, killed) == -signal.SIGKILL
    file = training_folder(tmp_path) / "checkpoints" / "step-000008" / name
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert finish(processes, world, tmp_path, config) == uninterrupted
    assert "checkpoint step-000008 is skipped" in processes.log()
    assert "resuming from the checkpoint of step 4" in processes.log()


@pytest.mark.long  # ten kills of a longer training
@pytest.mark.parametrize("seed", range(2))
def test_a_training_preempted_killed_and_moved_ends_in_the_same_bytes(
    seed: int, world: TinyWorld, tmp_path: Path
) -> None:
    """60 steps: 5 SIGTERMs and 5 kill -9 at random micro-batches, and 3 times the machine's local disk is gone."""
    training = world.config(disable_dropout=False, max_steps=60, save_steps=7, gradient_accumulation_steps=3)
    disk = tmp_path / "disk"
    processes = TrainingProcesses(tmp_path / "children", {"TMPDIR": str(disk)})
    disk.mkdir()
    assert processes.run(world.preferences, tmp_path / "uninterrupted", training) == 0, processes.log()
    rng = random.Random(seed)
    numbers = [signal.SIGTERM] * 5 + [signal.SIGKILL] * 5
    rng.shuffle(numbers)
    lost = set(rng.sample(range(10), 3))
    for attempt, number in enumerate(numbers):
        kill = Kill("training_step", rng.randint(1, 24), number=number)
        processes.run(world.preferences, tmp_path / "preempted", training, kill)
        if attempt in lost:
            shutil.rmtree(disk)
            disk.mkdir()
    assert finish(processes, world, tmp_path / "preempted", training) == results(tmp_path / "uninterrupted")
    processes.close()


def test_a_part_of_a_training_never_yields_an_adapter(
    world: TinyWorld, processes: TrainingProcesses, tmp_path: Path
) -> None:
    training = world.config(max_steps=30)
    assert processes.run(world.preferences, tmp_path, training, Kill("training_step", 9)) == PREEMPTED
    assert not (training_folder(tmp_path) / "adapter").exists()
    assert (training_folder(tmp_path) / "checkpoints" / "step-000004").exists()


def test_a_resume_on_other_tokens_is_refused_by_name(
    world: TinyWorld,
    processes: TrainingProcesses,
    config: TrainingConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The key holds what decides the tokens: only what is not in it, another version of a package, could do this."""
    monkeypatch.setattr("tests.fakes.training_process.training_key", lambda *_: "k" * 64)
    assert processes.run(world.preferences, tmp_path, config, Kill("training_step", 14)) == PREEMPTED
    other = tmp_path / "other.jinja"
    other.write_text(CHAT_TEMPLATE.replace("message['content']", "'w1 ' + message['content']"))
    changed = config.model_copy(update={"chat_template": str(other)})
    assert processes.run(world.preferences, tmp_path, changed) == USER_ERROR
    message = processes.outcome()["message"]
    assert "the checkpoint of step 6 was trained on other tokens than the pairs give now" in message
    assert str(other) in message
    assert processes.run(world.preferences, tmp_path, config) == 0, processes.log()
