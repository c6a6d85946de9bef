"""Completions and pairs that something else made become artifacts: kept once, split by prompt, measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.config import JudgingConfig
from tasks.errors import PreflowError
from tasks.judge.elsewhere import import_completions, import_preferences
from tasks.store.measures import QualityReport
from tasks.store.workspace import Workspace


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count: int) -> list[dict[str, str]]:
    """UltraFeedback's form is that of TRL's explicit prompt as text, but for the lists."""
    return [{"prompt": f"q {n}", "chosen": f"good and long {n}", "rejected": f"bad {n}"} for n in range(count)]


def test_completions_are_kept_once_a_prompt_with_their_ids(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q {n % 3}", "responses": [f"a {n}", f"b {n}"], "finish_reasons": ["stop"] * 2} for n in range(5)
    ]
    source = write(tmp_path / "c.jsonl", rows)
    made = import_completions(source, str(tmp_path / "ws"))
    store = Workspace(str(tmp_path / "ws"))
    found = list(store.read_rows(made.uri))
    assert [row["completions"] for row in found] == [["a 0", "b 0"], ["a 1", "b 1"], ["a 2", "b 2"]]
    assert len({row["id"] for row in found}) == 3
    assert store.read_manifest(made).counts == {"prompts": 3, "duplicates": 2}
    assert import_completions(source, str(tmp_path / "ws")) == made


def test_an_id_and_an_end_that_rows_bring_are_kept(tmp_path: Path) -> None:
    sampled = [{"message": {"content": "a"}, "finish_reason": "MAX_TOKENS"}, {"message": {"content": "b"}}]
    rows = [{"id": given, "prompt": f"q {n}", "choices": sampled} for n, given in enumerate(("x😀", 7, None))]
    store = Workspace(str(tmp_path / "ws"))
    made = list(store.read_rows(import_completions(write(tmp_path / "c.jsonl", rows), store.root).uri))
    assert [row.get("source_id") for row in made] == ["x😀", 7, None]
    assert [row["finish_reasons"] for row in made] == [["length", "unknown"]] * 3
    given = [{**pair, "id": f"mine {n}"} for n, pair in enumerate(pairs(3))]
    judging = JudgingConfig(rubric="demo", val_ratio=0)
    kept = import_preferences(write(tmp_path / "p.jsonl", given), store.root, judging)
    assert [row["source_id"] for row in store.read_rows(kept.uri)] == ["mine 0", "mine 1", "mine 2"]


def test_completions_of_a_prompt_that_ends_in_an_answer_are_refused_before_they_are_judged(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    source = write(tmp_path / "c.jsonl", [{"prompt": turns, "completions": ["b", "c"]}])
    with pytest.raises(PreflowError, match=r"c.jsonl:1: prompt: the last message is the assistant's"):
        import_completions(source, str(tmp_path / "ws"))


def test_pairs_are_split_by_prompt_and_measured(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", pairs(200) + pairs(200))
    judging = JudgingConfig(rubric="demo", val_ratio=0.2)
    made = import_preferences(source, str(tmp_path / "ws"), judging)
    store = Workspace(str(tmp_path / "ws"))
    assert made.rows + made.val_rows == 400
    assert 40 < made.val_rows < 120
    train, val = (
        {row["id"] for row in store.read_rows(uri)} for uri in (made.uri, made.sibling("val.jsonl"))
    )  # fmt: skip
    assert not train & val
    quality = QualityReport.model_validate(store.read_json(made.sibling("quality.json")))
    assert {metric.value for metric in quality.metrics if metric.name.startswith("longer_chosen")} == {1.0}
    assert import_preferences(source, str(tmp_path / "ws"), judging) == made


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([*pairs(3), {"chosen": "x"}], r"p.jsonl:4: no chosen and rejected"),
        ([{**pair, "group": "book"} for pair in pairs(30)], "all 30 rows have the same `group`"),
    ],
)
def test_what_is_wrong_is_named_and_leaves_nothing_behind(rows: list[Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(PreflowError, match=said):
        import_preferences(write(tmp_path / "p.jsonl", rows), str(tmp_path / "ws"), JudgingConfig(rubric="demo"))
    assert not list((tmp_path / "ws").rglob("*.jsonl"))
