"""Importing prompts: validated whole, each once, held-out rows picked by content."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import PreflowError
from tasks.store.prompts import import_prompts
from tasks.store.workspace import PromptsRef

Row = dict[str, Any]


def prompt(number: int, **more: Any) -> Row:
    return {"prompt": [{"role": "user", "content": f"Scene {number}"}], **more}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(reference: PromptsRef) -> list[Row]:
    return [json.loads(line) for line in Path(reference.uri).read_text().splitlines()]


def counts(reference: PromptsRef) -> Row:
    assert reference.manifest is not None
    found: Row = json.loads(Path(reference.manifest).read_text())["counts"]
    return found


def numbers(reference: PromptsRef) -> list[int]:
    return [int(row["prompt"][0]["content"].removeprefix("Scene ")) for row in read(reference)]


def test_order_is_kept_and_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [prompt(3), prompt(1), prompt(3, extra="differs"), prompt(2), prompt(1)]
    found = import_prompts(write(tmp_path / "p.jsonl", rows), str(tmp_path / "ws"))
    assert numbers(found) == [3, 1, 2]
    assert counts(found) == {"read": 5, "duplicates": 2, "in_training": 0}
    assert len({row["id"] for row in read(found)}) == 3


def test_a_bad_row_anywhere_leaves_nothing_behind(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", [*(prompt(n) for n in range(50)), {"prompt": ["x"]}])
    with pytest.raises(PreflowError, match=r"p.jsonl:51: prompt"):
        import_prompts(source, str(tmp_path / "ws"))
    assert not list((tmp_path / "ws").rglob("*.jsonl"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PreflowError, match=r"nowhere.jsonl: no such file"):
        import_prompts(str(tmp_path / "nowhere.jsonl"), str(tmp_path / "ws"))


def test_the_same_content_is_the_same_artifact_wherever_it_lies(tmp_path: Path) -> None:
    rows = [prompt(n) for n in range(5)]
    first = import_prompts(write(tmp_path / "a.jsonl", rows), str(tmp_path / "ws"))
    assert import_prompts(write(tmp_path / "b.jsonl", rows), str(tmp_path / "ws")) == first
    changed = import_prompts(write(tmp_path / "a.jsonl", rows[:4]), str(tmp_path / "ws"))
    assert changed.uri != first.uri


def test_a_damaged_import_is_made_anew(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", [prompt(n) for n in range(5)])
    first = import_prompts(source, str(tmp_path / "ws"))
    Path(first.uri).write_text("")
    assert import_prompts(source, str(tmp_path / "ws")) == first
    assert numbers(first) == list(range(5))


def test_held_out_prompts_share_no_id_and_no_group_with_training_pairs(tmp_path: Path) -> None:
    rows = [prompt(n, group=f"episode {n // 10}" if n < 50 else None) for n in range(60)]
    source = write(tmp_path / "p.jsonl", [{k: v for k, v in row.items() if v is not None} for row in rows])
    everything = {row["prompt"][0]["content"]: row for row in read(import_prompts(source, str(tmp_path / "ws")))}
    trained = [everything["Scene 3"], everything["Scene 44"], everything["Scene 55"]]
    pairs = write(tmp_path / "train.jsonl", trained)
    held_out = import_prompts(source, str(tmp_path / "ws"), limit=25, exclude=pairs)
    assert numbers(held_out) == [*range(10, 35)]
    assert counts(held_out)["in_training"] == 10 + 10 + 1
    every = import_prompts(source, str(tmp_path / "ws"), exclude=pairs)
    assert numbers(every) == [*range(10, 40), *range(50, 55), *range(56, 60)]


def test_nothing_left_to_evaluate_on_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", [prompt(1), prompt(2)])
    pairs = write(tmp_path / "train.jsonl", read(import_prompts(source, str(tmp_path / "ws"))))
    with pytest.raises(PreflowError, match=r"all 2 occur in training pairs. Give held-out prompts"):
        import_prompts(source, str(tmp_path / "ws"), exclude=pairs)


def test_rows_after_the_limit_are_still_checked(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", [prompt(1), prompt(2), {"prompt": []}])
    with pytest.raises(PreflowError, match=r"p.jsonl:3"):
        import_prompts(source, str(tmp_path / "ws"), limit=1)
