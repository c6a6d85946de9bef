"""Importing prompts: validated whole, each once, held-out rows picked by content."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import PreflowError
from tasks.store.prompts import import_prompts, split_prompts
from tasks.store.workspace import PromptsRef, Workspace

Row = dict[str, Any]
Import = Callable[..., PromptsRef]


def prompt(number: int, **more: Any) -> Row:
    return {"prompt": [{"role": "user", "content": f"Scene {number}"}], **more}


def write(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def imported(tmp_path: Path) -> Import:
    return lambda rows, name="p.jsonl", **options: import_prompts(
        write(tmp_path / name, rows), str(tmp_path / "ws"), **options
    )


def read(reference: PromptsRef) -> list[Row]:
    return list(Workspace.holding(reference.uri).read_rows(reference.uri))


def counts(reference: PromptsRef) -> dict[str, int]:
    return Workspace.holding(reference.uri).read_manifest(reference).counts


def numbers(reference: PromptsRef) -> list[int]:
    return [int(row["prompt"][0]["content"].removeprefix("Scene ")) for row in read(reference)]


def test_order_is_kept_and_duplicates_are_dropped_and_counted(imported: Import) -> None:
    found = imported([prompt(3), prompt(1), prompt(3, extra="differs"), prompt(2), prompt(1)])
    assert numbers(found) == [3, 1, 2]
    assert counts(found) == {"read": 5, "duplicates": 2, "in_training": 0}
    assert len({row["id"] for row in read(found)}) == 3


def test_a_bad_row_anywhere_even_after_the_limit_leaves_nothing_behind(imported: Import, tmp_path: Path) -> None:
    with pytest.raises(PreflowError, match=r"p.jsonl:51: prompt"):
        imported([*(prompt(n) for n in range(50)), {"prompt": ["x"]}], limit=1)
    assert not list((tmp_path / "ws").rglob("*.jsonl"))


def test_the_same_content_is_the_same_artifact_wherever_it_lies_and_is_made_again_if_damaged(imported: Import) -> None:
    rows = [prompt(n) for n in range(5)]
    first = imported(rows, "a.jsonl")
    assert imported(rows, "b.jsonl") == first
    assert imported(rows[:4], "a.jsonl").uri != first.uri
    Path(first.uri).write_text("")
    assert imported(rows) == first
    assert numbers(first) == list(range(5))


def test_held_out_prompts_share_no_id_and_no_group_with_training_pairs(imported: Import, tmp_path: Path) -> None:
    rows = [prompt(n, **({"group": f"episode {n // 10}"} if n < 50 else {})) for n in range(60)]
    everything = {row["prompt"][0]["content"]: row for row in read(imported(rows))}
    pairs = write(tmp_path / "train.jsonl", [everything[f"Scene {n}"] for n in (3, 44, 55)])
    held_out = imported(rows, limit=25, exclude=pairs)
    assert numbers(held_out) == [*range(10, 35)]
    assert counts(held_out)["in_training"] == 10 + 10 + 1
    assert numbers(imported(rows, exclude=pairs)) == [*range(10, 40), *range(50, 55), *range(56, 60)]


def test_nothing_left_to_evaluate_on_is_an_error_with_a_remedy(imported: Import, tmp_path: Path) -> None:
    rows = [prompt(1), prompt(2)]
    pairs = write(tmp_path / "train.jsonl", read(imported(rows)))
    with pytest.raises(PreflowError, match=r"all 2 occur in training pairs. Give held-out prompts"):
        imported(rows, exclude=pairs)


def test_one_group_for_all_rows_is_refused_and_an_empty_one_is_none(imported: Import) -> None:
    with pytest.raises(PreflowError, match="all 3 rows have the same `group`"):
        imported([prompt(n, group="all") for n in range(3)])
    assert imported([prompt(n, group="") for n in range(3)]).rows == 3


@pytest.mark.parametrize("grouped", [True, False])
def test_a_part_is_drawn_by_groups_and_the_rest_is_the_rest(imported: Import, tmp_path: Path, grouped: bool) -> None:
    rows = [prompt(n, **({"group": f"g{n % 20}"} if grouped else {})) for n in range(60)]
    whole = imported(rows)
    part, rest = split_prompts(whole, str(tmp_path / "ws"), 10, 7)
    assert split_prompts(whole, str(tmp_path / "ws"), 10, 7) == (part, rest)
    assert split_prompts(whole, str(tmp_path / "ws"), 10, 8) != (part, rest)
    assert part.rows == (9 if grouped else 10)
    assert sorted(numbers(part) + numbers(rest)) == list(range(60))
    assert numbers(rest) == sorted(numbers(rest)), "in the order of the file"
    assert numbers(part) != list(range(10)), "not the first ones of the file"
    if grouped:
        assert not {row["group"] for row in read(part)} & {row["group"] for row in read(rest)}
        with pytest.raises(PreflowError, match=r"the smallest group of 3: at most 2"):
            split_prompts(whole, str(tmp_path / "ws"), 2, 7)
