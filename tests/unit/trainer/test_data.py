"""Pairs as tokens: the same as TRL's, measured, refused where nothing can be learned, grouped without randomness."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from tasks.errors import PreflowError
from tasks.store.records import PreferencePair
from tasks.store.workspace import Workspace
from tasks.trainer.data import (
    LengthReport,
    MicroBatchSampler,
    TokenPair,
    as_dataset,
    load_pairs,
    make_micro_batches,
    tokenize,
)
from tests.fakes.tiny_training import build_base, pairs, write_preferences


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(build_base(tmp_path_factory.mktemp("model") / "base"))


def token_pair(prompt: int, chosen: list[int], rejected: list[int]) -> TokenPair:
    return TokenPair(1, "0" * 64, list(range(prompt)), chosen, rejected)


def test_tokens_are_those_of_trl(tokenizer: Any) -> None:
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in pairs(6, 0)]
    trainer = object.__new__(DPOTrainer)
    trainer._tokenizer = tokenizer
    config = DPOConfig(output_dir="unused", use_cpu=True, bf16=False, max_length=128)
    theirs = trainer._prepare_dataset(Dataset.from_list(rows), tokenizer, config, "train")
    ours = as_dataset([tokenize(PreferencePair(**row), tokenizer, 1) for row in rows])
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert list(ours[name]) == list(theirs[name])


def test_extra_columns_go_no_further(tokenizer: Any, tmp_path: Path) -> None:
    preferences = write_preferences(tmp_path, pairs(3, 0), [])
    data = load_pairs(preferences.uri, Workspace(tmp_path), tokenizer, 128)
    assert as_dataset(data.pairs).column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (token_pair(10, [1, 2], [1, 3]), None),
        (token_pair(10, [1, 2], [1, 2]), "chosen and rejected are equal"),
        (token_pair(14, [1, 2, 3], [1, 2, 4]), "chosen and rejected are equal up to the cut"),
        (token_pair(16, [1], [2]), "the prompt alone has 16 tokens"),
    ],
)
def test_pairs_that_teach_nothing_are_refused(pair: TokenPair, reason: str | None) -> None:
    assert pair.refusal(max_length=16) == reason


def test_refused_pairs_are_counted_and_named(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = pairs(4, 0)
    rows[2]["rejected"] = rows[2]["chosen"]
    preferences = write_preferences(tmp_path, rows, [])
    data = load_pairs(preferences.uri, Workspace(tmp_path), tokenizer, 128)
    assert [pair.line for pair in data.pairs] == [1, 2, 4]
    assert data.report.pairs == 4
    assert data.report.refused == {3: "chosen and rejected are equal"}
    assert "1 pairs refused and left out: line 3: chosen and rejected are equal" in caplog.text


def test_nothing_left_is_an_error_that_names_the_file(tokenizer: Any, tmp_path: Path) -> None:
    preferences = write_preferences(tmp_path, pairs(2, 0), [])
    with pytest.raises(PreflowError, match=r"train\.jsonl: none of its 2 pairs .*line 1: the prompt alone"):
        load_pairs(preferences.uri, Workspace(tmp_path), tokenizer, 4)


def test_the_report_says_what_is_cut() -> None:
    report = LengthReport()
    report.add(token_pair(10, [1] * 10, [1] * 2), max_length=16)
    report.add(token_pair(2, [1] * 2, [1] * 2), max_length=16)
    assert (report.pairs, report.longest, report.longest_prompt) == (2, 20, 10)
    assert (report.cut_sides, report.cut_tokens) == (1, 4)
    assert report.mean == pytest.approx((16 + 4) / 2)


def test_micro_batches_hold_pairs_of_like_length_and_every_pair_once() -> None:
    lengths = [5, 9, 1, 7, 7]
    assert make_micro_batches(lengths, 2, group_by_length=True, seed=0) == [[1, 3], [4, 0], [2]]
    shuffled = make_micro_batches(lengths, 2, group_by_length=False, seed=0)
    assert sorted(row for batch in shuffled for row in batch) == [0, 1, 2, 3, 4]
    assert shuffled != make_micro_batches(lengths, 2, group_by_length=False, seed=1)


def test_epochs_shuffle_micro_batches_but_keep_their_pairs() -> None:
    batches = make_micro_batches(list(range(21)), 2, group_by_length=True, seed=0)
    sampler = MicroBatchSampler(batches, seed=7)
    first, second = sampler.order(0), sampler.order(1)
    assert first != second
    assert sorted(first) == sorted(second) == sorted(batches)
    assert first[0] == batches[0], "the longest comes first: memory runs out at once or never"
    assert first[-1] == second[-1] == [0], "the smaller one comes last, or it would shift the others"
    sampler.set_epoch(1)
    assert list(sampler) == [row for batch in second for row in batch]
    assert len(sampler) == 21
    assert MicroBatchSampler(batches, seed=8).order(1) != second
