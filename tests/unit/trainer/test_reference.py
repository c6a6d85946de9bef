"""The reference's log-probs as an artifact: taken when everything matches, made again when anything does not."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.config import TrainingConfig
from tasks.store.workspace import Workspace
from tasks.trainer import reference
from tasks.trainer.data import TokenPair
from tasks.trainer.reference import (
    ReferenceLogps,
    ReferencePart,
    Split,
    load_reference,
    reference_key,
    save_reference,
)

PAIRS = [TokenPair(number, str(number) * 64, [1], [2], [3]) for number in range(3)]
SPLITS = [Split("train", PAIRS[:2], [[1, 0]]), Split("val", PAIRS[2:], [[0]])]
FOUND = {"train": ReferenceLogps([-1.1, -1 / 3], [-3.7, -40.0]), "val": ReferenceLogps([-0.1], [-7e-9])}
WEIGHTS = {"base": "b", "sft": "s", "device": "cpu"}


def test_what_was_saved_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    store = Workspace(tmp_path)
    assert load_reference(store, "key") is None
    save_reference(store, "key", FOUND)
    assert load_reference(store, "key") == FOUND
    assert load_reference(store, "other") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-20],
        lambda content: b"[]",
        lambda content: content.replace(b"-1.1", b"-2.1"),
        lambda content: content.replace(b'"content"', b'"other"'),
    ],
)
def test_damage_is_seen_and_it_is_computed_again(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    store, file = Workspace(tmp_path), tmp_path / "reference-logprobs" / "key.json"
    save_reference(store, "key", FOUND)
    file.write_bytes(damage(file.read_bytes()))
    assert load_reference(store, "key") is None
    assert "computed again" in caplog.text
    save_reference(store, "key", FOUND)
    assert load_reference(store, "key") == FOUND


def test_a_part_is_kept_each_minute_and_goes_when_all_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, batches = Workspace(tmp_path), [[(1, -1 / 3, -2.5)], [(0, -1e-9, -3.0), (2, -4.0, -5.0)]]
    part = ReferencePart(store, "key", "train-1-of-1")
    part.add(batches[0])
    assert ReferencePart(store, "key", "train-1-of-1").batches == [], "not a file for each micro-batch"
    monkeypatch.setattr(reference, "PART_SECONDS", 0.0)
    part.add(batches[1])
    assert ReferencePart(store, "key", "train-1-of-1").batches == batches
    assert ReferencePart(store, "key", "train-1-of-2").batches == []
    file = tmp_path / "reference-logprobs" / "key" / "train-1-of-1.json"
    file.write_bytes(file.read_bytes().replace(b"-2.5", b"-2.6"))
    assert ReferencePart(store, "key", "train-1-of-1").batches == [], "damaged: from the start"
    save_reference(store, "key", FOUND)
    assert [path.name for path in (tmp_path / "reference-logprobs").iterdir()] == ["key.json"]


def test_another_training_that_keeps_a_part_meanwhile_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove_tree(uri: str) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", uri)

    store = Workspace(tmp_path)
    monkeypatch.setattr(store.storage, "remove_tree", remove_tree)
    save_reference(store, "key", FOUND)
    assert load_reference(store, "key") == FOUND


def test_beta_learning_rate_epochs_and_loss_share_it_but_content_does_not() -> None:
    key = reference_key(SPLITS, TrainingConfig(), WEIGHTS)
    for same in ({"beta": 0.5}, {"learning_rate": 1e-4}, {"max_steps": 99}, {"loss_type": "ipo"}, {"seed": 9}):
        assert reference_key(SPLITS, TrainingConfig(**same), WEIGHTS) == key
    fewer = Split("train", PAIRS[:1], SPLITS[0].micro_batches)
    others = [
        reference_key(SPLITS, TrainingConfig(max_length=64), WEIGHTS),
        reference_key(SPLITS, TrainingConfig(load_in_4bit=False), WEIGHTS),
        reference_key(SPLITS, TrainingConfig(), {**WEIGHTS, "sft": "x"}),
        reference_key(SPLITS, TrainingConfig(), {**WEIGHTS, "device": "NVIDIA L4"}),
        reference_key(SPLITS[:1], TrainingConfig(), WEIGHTS),
        reference_key([fewer, SPLITS[1]], TrainingConfig(), WEIGHTS),
    ]
    assert key not in others
