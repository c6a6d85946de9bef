"""Whatever is missing, cut or changed in a checkpoint, it is named and the one before it is taken."""

import resource
from pathlib import Path

import pytest
import torch

from tasks.store.workspace import COMMITTED, Workspace
from tasks.trainer.checkpoints import Checkpoint, CheckpointStore, sweep

FILES = ["policy.safetensors", "optimizer.safetensors", "state.json", COMMITTED]


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        step,
        {"lora_A": torch.full((4, 4), float(step))},
        {"lora_A|exp_avg": torch.ones(4, 4), "lora_A|step": torch.tensor(float(step))},
        {"step": step},
    )


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    (tmp_path / "scratch").mkdir()
    return CheckpointStore(Workspace(tmp_path), str(tmp_path / "checkpoints"), tmp_path / "scratch")


def steps(tmp_path: Path) -> list[str]:
    return sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())


def test_the_newest_comes_back_as_it_was(store: CheckpointStore, tmp_path: Path) -> None:
    assert store.newest() is None
    store.save(checkpoint(5))
    store.save(checkpoint(10))
    found = store.newest()
    assert found is not None
    assert found.step == 10
    assert torch.equal(found.policy["lora_A"], checkpoint(10).policy["lora_A"])
    assert found.optimizer["lora_A|step"].shape == ()
    assert found.state == checkpoint(10).state
    suffixes = {file.suffix for file in (tmp_path / "checkpoints" / "step-000005").iterdir()}
    assert suffixes == {".safetensors", ".json"}, "nothing in a checkpoint can run code"


def test_the_last_two_that_are_whole_are_kept(store: CheckpointStore, tmp_path: Path) -> None:
    for step in (5, 10, 15):
        store.save(checkpoint(step))
    assert steps(tmp_path) == ["step-000010", "step-000015"]
    (tmp_path / "checkpoints" / "step-000015" / COMMITTED).unlink()
    store.save(checkpoint(20))
    assert steps(tmp_path) == ["step-000010", "step-000020"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in FILES for damage in ("removed", "cut", "emptied", "zeroed", "one bit")
     if (name, damage) != (COMMITTED, "one bit")],  # it has no digest of its own: a bit of its white space may change
)  # fmt: skip
def test_every_damage_is_seen_and_the_one_before_is_taken(
    store: CheckpointStore, tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.save(checkpoint(5))
    store.save(checkpoint(10))
    file = tmp_path / "checkpoints" / "step-000010" / name
    content = file.read_bytes()
    damaged = {
        "cut": content[: len(content) // 2],
        "emptied": b"",
        "zeroed": bytes(len(content)),
        "one bit": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    }
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(damaged[damage])
    found = store.newest()
    assert found is not None
    assert found.step == 5
    assert "step-000010 is skipped" in caplog.text


def test_a_whole_one_is_never_written_over_and_a_torn_one_is(store: CheckpointStore, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-000005"
    assert store.save(checkpoint(5)) > 0
    before = (folder / COMMITTED).stat().st_mtime_ns
    assert store.save(checkpoint(5)) == 0
    assert (folder / COMMITTED).stat().st_mtime_ns == before
    (folder / "state.json").unlink()
    assert store.save(checkpoint(5)) > 0
    assert store.newest() is not None


def test_a_file_that_cannot_be_written_leaves_what_was_there(store: CheckpointStore, tmp_path: Path) -> None:
    """A limit on file sizes fails the write as a full disk does, half-way and inside safetensors."""
    store.save(checkpoint(5))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.save(checkpoint(10))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert steps(tmp_path) == ["step-000005"]


def refuse() -> None:
    raise PermissionError("another trainer holds the lease")


def test_what_a_killed_trainer_was_writing_is_swept(store: CheckpointStore, tmp_path: Path) -> None:
    store.save(checkpoint(5))
    (tmp_path / "checkpoints" / ".writing-abc" / "step-000010").mkdir(parents=True)
    (tmp_path / ".writing-metrics").write_text("{")
    with pytest.raises(PermissionError):  # another trainer may hold the lease by now, and this be what it writes
        sweep(Workspace(tmp_path, guard=refuse), str(tmp_path))
    assert (tmp_path / ".writing-metrics").exists()
    sweep(Workspace(tmp_path), str(tmp_path))
    assert steps(tmp_path) == ["step-000005"]
    assert {path.name for path in tmp_path.iterdir()} == {"scratch", "checkpoints"}
