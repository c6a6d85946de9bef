"""A training that is killed, preempted or moved to another machine ends in the same bytes.

`make test` kills it once by each signal, `make test-all` at every point.
"""

import random
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tasks.config import TrainingConfig
from tasks.store.workspace import Workspace
from tests.fakes.tiny_training import CHAT_TEMPLATE, TinyWorld
from tests.fakes.training_process import Kill, TrainingProcesses

PREEMPTED, USER_ERROR = 75, 2


@dataclass(frozen=True)
class Scene:
    """Trainings of one configuration in one workspace."""

    world: TinyWorld
    processes: TrainingProcesses
    workspace: Path
    training: TrainingConfig

    def run(self, *kills: Kill) -> int:
        return self.processes.run(self.world.preferences, self.workspace, self.training, *kills)

    def finish(self) -> dict[str, bytes]:
        """Train to the end; return the bytes of everything that must not depend on what happened on the way."""
        assert self.run() == 0, self.processes.log()
        files = [*(self.folder / "adapter").iterdir(), self.folder / "metrics.jsonl", self.folder / "health.json"]
        found = {str(file.relative_to(self.folder)): file.read_bytes() for file in files}
        manifest = Workspace(self.workspace).read_manifest(str(self.folder / "manifest.json"))
        timeless = manifest.model_copy(update={"seconds": 0.0}).model_dump_json()
        return found | {"manifest.json": timeless.replace(str(self.workspace), "").encode()}

    @property
    def folder(self) -> Path:
        (folder,) = (self.workspace / "training").iterdir()
        return folder


@pytest.fixture
def scene(world: TinyWorld, processes: TrainingProcesses, tmp_path: Path) -> Scene:
    """12 steps with dropout, accumulation and shuffling; logs, evaluations and checkpoints at odd steps."""
    return Scene(world, processes, tmp_path, world.config(disable_dropout=False))


@pytest.fixture(scope="module")
def uninterrupted(
    world: TinyWorld, processes: TrainingProcesses, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    workspace = tmp_path_factory.mktemp("uninterrupted")
    return Scene(world, processes, workspace, world.config(disable_dropout=False)).finish()


POINTS = [Kill("gradient", 7), Kill("put", 2, signal.SIGKILL)]
TERMS = [("load", 1), ("prediction_step", 8), ("write", 2), ("adapter", 1), ("training_step", 1), ("training_step", 12),
         ("prediction_step", 2)]  # fmt: skip
KILLS = [("training_step", 15), ("reference", 3), ("write", 2), ("put", 1)]
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
def test_a_kill_anywhere_changes_nothing(kill: Kill, scene: Scene, uninterrupted: dict[str, bytes]) -> None:
    code = scene.run(kill)
    assert code == (PREEMPTED if kill.number == signal.SIGTERM else -kill.number), scene.processes.log()
    assert not (scene.folder / "adapter" / "COMMITTED.json").exists()
    assert scene.finish() == uninterrupted


@pytest.mark.long  # three trainings; the kinds of kill are shown above
def test_the_adapters_of_earlier_steps_are_the_same_too(scene: Scene, tmp_path: Path) -> None:
    """Killed in the middle of a step, and between the adapters that are committed at the end."""

    def finish(workspace: Path, *kills: Kill) -> dict[str, bytes]:
        training = scene.training.model_copy(update={"checkpoints": 3})
        kept = replace(scene, workspace=workspace, training=training)
        for kill in kills:
            assert kept.run(kill) != 0
        found = kept.finish()
        files = [file for file in kept.folder.glob("step-*/**/*") if file.is_file() and file.name != "manifest.json"]
        assert len({file.relative_to(kept.folder).parts[0] for file in files}) == 2
        # The manifests name files by their addresses.
        return {name: content for name, content in found.items() if name != "manifest.json"} | {
            str(file.relative_to(kept.folder)): file.read_bytes() for file in files
        }

    kills = Kill("gradient", 7), Kill("put", 6, signal.SIGKILL)
    assert finish(tmp_path / "killed", *kills) == finish(tmp_path / "uninterrupted")


@pytest.mark.long  # one kill and one full disk are shown by the tests next to it
def test_two_sigterms_save_once_and_lose_nothing(scene: Scene, uninterrupted: dict[str, bytes]) -> None:
    assert scene.run(Kill("training_step", 6), Kill("write", 1)) == PREEMPTED
    names = [folder.name for folder in (scene.folder / "checkpoints").iterdir()]
    assert names == ["step-000002"]  # the sixth micro-batch belongs to the third step
    assert scene.finish() == uninterrupted


def test_sigterm_saves_the_last_complete_step_and_yields_no_adapter(scene: Scene) -> None:
    assert scene.run(Kill("training_step", 14)) == PREEMPTED
    assert (scene.folder / "checkpoints" / "step-000006" / "COMMITTED.json").exists(), "not the last periodic one"
    assert "checkpoint_seconds" in scene.processes.log()
    assert not (scene.folder / "adapter").exists()


@pytest.mark.long  # one kill and one full disk are shown by the tests next to it
def test_a_full_disk_costs_a_checkpoint_but_not_the_training(scene: Scene, uninterrupted: dict[str, bytes]) -> None:
    assert scene.run(Kill("write", 2, full_disk=True), Kill("training_step", 21)) == PREEMPTED
    assert "No space left on device" in scene.processes.log()
    assert scene.finish() == uninterrupted


def test_a_full_disk_during_the_save_on_sigterm_falls_back_to_the_checkpoint_before(
    scene: Scene, uninterrupted: dict[str, bytes]
) -> None:
    assert scene.run(Kill("training_step", 14), Kill("write", 2, full_disk=True)) == PREEMPTED
    assert "No space left on device" in scene.processes.log()
    assert scene.finish() == uninterrupted
    log = scene.processes.log()
    assert "resuming from the checkpoint of step 4" in log
    assert " accelerate." not in log, "a resume skips batches in silence"


@pytest.mark.parametrize(("name", "damage"), [*DAMAGES, *only_in_test_all(*MORE_DAMAGES)])
def test_a_torn_checkpoint_is_named_and_skipped(
    name: str, damage: str, scene: Scene, uninterrupted: dict[str, bytes]
) -> None:
    assert scene.run(Kill("training_step", 19, number=signal.SIGKILL)) == -signal.SIGKILL
    file = scene.folder / "checkpoints" / "step-000008" / name
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert scene.finish() == uninterrupted
    assert "checkpoint step-000008 is skipped" in scene.processes.log()
    assert "resuming from the checkpoint of step 4" in scene.processes.log()


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
    whole, preempted = (Scene(world, processes, tmp_path / name, training) for name in ("whole", "preempted"))
    expected = whole.finish()
    rng = random.Random(seed)
    numbers = [signal.SIGTERM] * 5 + [signal.SIGKILL] * 5
    rng.shuffle(numbers)
    lost = set(rng.sample(range(10), 3))
    for attempt, number in enumerate(numbers):
        preempted.run(Kill("training_step", rng.randint(1, 24), number=number))
        if attempt in lost:
            shutil.rmtree(disk)
            disk.mkdir()
    assert preempted.finish() == expected
    processes.close()


def test_a_resume_on_other_tokens_is_refused_by_name(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key holds what decides the tokens: only what is not in it, another version of a package, could do this."""
    monkeypatch.setattr("tests.fakes.training_process.training_key", lambda *_: "k" * 64)
    assert scene.run(Kill("training_step", 14)) == PREEMPTED
    other = scene.workspace / "other.jinja"
    other.write_text(CHAT_TEMPLATE.replace("message['role'] +", "message['role'] + (' w1' if loop.first else '') +"))
    changed = scene.training.model_copy(update={"chat_template": str(other)})
    assert Scene(scene.world, scene.processes, scene.workspace, changed).run() == USER_ERROR
    message = scene.processes.outcome()["message"]
    assert "that of step 6 was trained on other tokens than the pairs give now" in message
    assert str(other) in message
    assert scene.run() == 0, scene.processes.log()
