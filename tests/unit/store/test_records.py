"""Rows: read strictly, with errors that name file, line and field."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import PreflowError
from tasks.store.records import CompletionsRow, PromptRow, prompt_id, read_rows

USER = {"role": "user", "content": "Go on."}
GOOD: dict[str, Any] = {"prompt": [{"role": "system", "content": "You write scenes."}, USER]}


def write_lines(folder: Path, *lines: Any) -> str:
    path = folder / "rows.jsonl"
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return str(path)


BAD = {
    "not JSON": (b"{not json", r"not usable JSON"),
    "cut": (b'{"prompt": [{"role": "user", "con', r"not usable JSON"),
    "not UTF-8": (b'{"prompt": "\xff\xfe"}', r"not utf-8 text"),
    "a key twice": (b'{"prompt": "x", "prompt": "y"}', r"the key 'prompt' stands twice"),
    "a number without end": (b'{"prompt": "x", "score": 1e999}', r"1e999 is no number"),
    "half a character elsewhere": (b'{"prompt": "x", "note": "\\ud83d"}', r"note: half a character \(\\ud83d\)"),
    "NaN": (b'{"prompt": [{"role": "user", "content": "x"}], "score": NaN}', r"NaN is no number"),
    "too deep": (b'{"prompt": ' + b"[" * 100_000, r"not usable JSON"),
    "a list": ([1], r"a JSON list, not an object"),
    "a number": (3, r"a JSON int, not an object"),
    "no prompt": ({"text": "x"}, r"no prompt in it \(the row has: text\)"),
    "empty prompt": ({"prompt": []}, r"prompt: List should have at least 1 item"),
    "unknown role": ({"prompt": [{"role": "wizard", "content": "x"}]}, r"prompt\[0\]: the role 'wizard' is not system"),
    "no content": ({"prompt": [USER, {"role": "user"}]}, r"prompt\[1\]: its content is not text"),
    "content of parts": ({"prompt": [{"role": "user", "content": ["x"]}]}, r"prompt\[0\]: its content is not text"),
    "message with more": ({"prompt": [{**USER, "name": "x"}]}, r"prompt\[0\]\.name: .*would be lost"),
    "ends with the system": ({"prompt": [USER, {"role": "system", "content": "x"}]},
        r"the last message is the system's"),
    "ends with the assistant": ({"prompt": [USER, {"role": "assistant", "content": "x"}]}, r"the last message is the"),
    "all empty": ({"prompt": [{"role": "user", "content": "  \n"}]}, r"every message is empty"),
    "group is a list": ({**GOOD, "group": ["3"]}, r"group: Input should be a valid string"),
    "half a character": (b'{"prompt": [{"role": "user", "content": "\\ud800"}]}', r"prompt"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path: Path, name: str) -> None:
    row, message = BAD[name]
    uri = write_lines(tmp_path, GOOD, GOOD, row, GOOD)
    with pytest.raises(PreflowError, match=message) as caught:
        list(read_rows(PromptRow, uri))
    assert str(caught.value).startswith(f"{uri}:3: ")


def test_a_missing_file_and_an_empty_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(PreflowError, match=r"nowhere.jsonl: no such file. Give the path"):
        list(read_rows(PromptRow, str(tmp_path / "nowhere.jsonl")))
    for content in ("", "\n\n  \n"):
        (tmp_path / "empty.jsonl").write_text(content)
        with pytest.raises(PreflowError, match=r"empty.jsonl: has no rows"):
            list(read_rows(PromptRow, str(tmp_path / "empty.jsonl")))


def test_blank_lines_are_skipped_and_still_counted(tmp_path: Path) -> None:
    uri = write_lines(tmp_path, b"", GOOD, b"   ", {"prompt": []})
    with pytest.raises(PreflowError, match=r"rows.jsonl:4: "):
        list(read_rows(PromptRow, uri))


def test_unknown_fields_are_kept_and_our_own_rows_read_back_as_they_were(tmp_path: Path) -> None:
    more = {"completion": [{"role": "assistant", "content": "x"}], "episode": 7, "group": "s01e02"}
    (row,) = read_rows(PromptRow, write_lines(tmp_path, {**GOOD, **more}))
    dumped = row.model_dump(exclude_none=True)
    assert dumped.items() >= more.items()
    (again,) = read_rows(PromptRow, write_lines(tmp_path, dumped))
    assert again == row


@pytest.mark.parametrize("given", [17, "row-17", None, "ab" * 32])
def test_a_row_s_own_id_is_kept_as_its_source_s(tmp_path: Path, given: Any) -> None:
    (row,) = read_rows(PromptRow, write_lines(tmp_path, {"id": given, **GOOD}))
    assert row.id == prompt_id(GOOD["prompt"])
    assert row.model_dump()["source_id"] == given


def test_only_role_and_content_make_the_id() -> None:
    a = PromptRow.model_validate({**GOOD, "anything": 1})
    assert a.id == PromptRow.model_validate({**GOOD, "anything": 2, "group": "g"}).id
    for prompt in ([{"role": "system", "content": "You write scenes. "}, USER], GOOD["prompt"][1:]):
        assert PromptRow.model_validate({"prompt": prompt}).id != a.id


def test_completions_get_the_prompt_s_id(tmp_path: Path) -> None:
    (row,) = read_rows(CompletionsRow, write_lines(tmp_path, {**GOOD, "completions": ["a", "b"]}))
    assert row.id == prompt_id(GOOD["prompt"])
    with pytest.raises(PreflowError, match=r":1: completions\[1\]: not the text"):
        list(read_rows(CompletionsRow, write_lines(tmp_path, {**GOOD, "completions": ["a", None]})))


def test_an_error_names_the_first_five_wrong_lines_with_a_row_that_is_right_and_stays_short(tmp_path: Path) -> None:
    uri = write_lines(tmp_path, GOOD, *({"text": n} for n in range(9)))
    with pytest.raises(PreflowError) as caught:
        list(read_rows(PromptRow, uri))
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:5]] == [f"{uri}:{number}" for number in range(2, 7)]
    assert lines[5:] == ['A row that is right: {"prompt": [{"role": "user", "content": "..."}]}']
    uri = write_lines(tmp_path, {"id": 1, "group": 1, "prompt": [{"role": "user", "content": ""}] * 50})
    with pytest.raises(PreflowError) as caught:
        list(read_rows(PromptRow, uri))
    assert len(str(caught.value)) < 400
