"""Data as people have it: what each public form is read as, and what is refused with a name."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import PreflowError
from tasks.store.forms import HEAD, WrongForm, to_completions, to_pair, to_prompt
from tasks.store.local import LocalStorage
from tasks.store.prompts import import_prompts
from tasks.store.records import CompletionsRow, PairRow, PromptRow, number_rows, read_rows
from tasks.store.workspace import Workspace

HELLO = [{"role": "user", "content": "Hello"}]
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "Hi"}

PROMPTS: dict[str, tuple[Any, list[dict[str, str]]]] = {
    "messages": ({"prompt": HELLO}, HELLO),
    "text": ({"prompt": "Hello"}, HELLO),
    "plain string": ("Hello", HELLO),
    "system column": ({"prompt": "Hello", "system": "Be brief."}, [SYSTEM, *HELLO]),
    "system_prompt, OpenAI": ({"messages": [*HELLO, ANSWER], "system_prompt": "Be brief."}, [SYSTEM, *HELLO]),
    "developer is system": ({"messages": [{**SYSTEM, "role": "developer"}, *HELLO]}, [SYSTEM, *HELLO]),
    "ShareGPT": (
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hello"},
                           {"from": "gpt", "value": "Hi"}]},
        [SYSTEM, *HELLO],
    ),
    "Alpaca": ({"instruction": "Translate.", "input": "Hallo", "output": "Hello"},
               [{"role": "user", "content": "Translate.\n\nHallo"}]),
    "Alpaca without input": ({"instruction": "Hello", "input": "", "output": "Hi"}, HELLO),
    "question": ({"question": "Hello", "answer": "Hi"}, HELLO),
    "parts of text": ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]}, HELLO),
    "of pairs": ({"chosen": "\n\nHuman: Hello\n\nAssistant: a", "rejected": "\n\nHuman: Hello\n\nAssistant: b"}, HELLO),
    "parts of OpenAI's responses": (
        {"prompt": [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}]}, HELLO),
    "messages in a table's cell": ({"prompt": json.dumps(HELLO, indent=1)}, HELLO),
    "a conversation in a table's cell": ({"messages": json.dumps([*HELLO, ANSWER])}, HELLO),
    "text about messages": ({"prompt": '[{"role": "user"}]: what is it?'},
                            [{"role": "user", "content": '[{"role": "user"}]: what is it?'}]),
    "HH-RLHF's column": ({"prompt": "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: More\n\nAssistant:"},
        [*HELLO, ANSWER, {"role": "user", "content": "More"}]),
    "columns of nothing": ({"prompt": [{**HELLO[0], "name": None, "tool_calls": None}]}, HELLO),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name: str) -> None:
    row, wanted = PROMPTS[name]
    assert to_prompt(row)[0]["prompt"] == wanted


def test_an_sft_rows_answer_and_other_fields_are_carried_along() -> None:
    row, form = to_prompt({"messages": [*HELLO, ANSWER], "episode": 7, "group": ""})
    assert (row, form) == ({"prompt": HELLO, "completion": "Hi", "episode": 7}, "messages (OpenAI)")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content is not text"),
        ({"prompt": [{"role": "tool", "content": "x"}]}, "role 'tool'"),
        ({"messages": [{**HELLO[0], "tool_calls": [1]}]}, "tool_calls"),
        ({"prompt": 3}, "not a list of messages"),
        ({"prompt": [{"role": ["user"], "content": "x"}]}, "the role .'user'. is not"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "content is not text"),
        ({"question": ["Hello"]}, "question: a list, not a text"),
        ({"instruction": "Hello", "input": ["a"]}, "input: a list, not a text"),
        ({"prompt": "Hello", "system": ["Be brief."]}, "system: a list, not a text"),
        ({"prompt": [SYSTEM, *HELLO], "system": "Be long."}, "two system messages that differ"),
        ({"prompt": "Hello", "system": "Be brief.", "system_prompt": "Be long."}, "two system messages that differ"),
        ({"txt": "x"}, "the row has: txt"),
        ({"prompt": str(HELLO)}, "looks like messages and is not JSON"),
    ],
)
def test_what_would_be_lost_or_guessed_is_refused(row: Any, said: str) -> None:
    with pytest.raises(WrongForm, match=said):
        to_prompt(row)


GOOD, BAD = [{"role": "assistant", "content": "good"}], [{"role": "assistant", "content": "bad"}]
HH = "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: More\n\nAssistant:"
TURNS = [*HELLO, ANSWER, {"role": "user", "content": "More"}]
PAIRS: dict[str, tuple[Any, list[dict[str, str]], str]] = {
    "TRL, explicit": ({"prompt": HELLO, "chosen": GOOD, "rejected": BAD}, HELLO, "explicit prompt"),
    "TRL, explicit text": ({"prompt": "Hello", "chosen": "good", "rejected": "bad"}, HELLO, "explicit prompt, text"),
    "TRL, implicit": ({"chosen": [*HELLO, *GOOD], "rejected": [*HELLO, *BAD]}, HELLO, "implicit prompt"),
    "TRL, implicit text": ({"chosen": "Hello good", "rejected": "Hello bad"}, HELLO, "implicit prompt, text"),
    "UltraFeedback": ({"prompt": "Hello", "chosen": [*HELLO, *GOOD], "rejected": [*HELLO, *BAD], "score_chosen": 8.0},
        HELLO, "UltraFeedback"),
    "HH-RLHF": ({"chosen": f"{HH} good", "rejected": f"{HH} bad"}, TURNS, "HH-RLHF"),
    "Orca": ({"system": "Be brief.", "question": "Hello", "chosen": "good", "rejected": "bad"}, [SYSTEM, *HELLO],
        "explicit prompt, text"),
    "OpenAI": ({"input": {"messages": HELLO, "tools": []}, "preferred_output": GOOD, "non_preferred_output": BAD},
        HELLO, "explicit prompt"),
    "LLaMA-Factory": (
        {"conversations": [{"from": "human", "value": "Hello"}], "chosen": {"from": "gpt", "value": "good"},
         "rejected": {"from": "gpt", "value": "bad"}}, HELLO, "explicit prompt",
    ),
    "HH-RLHF in three columns": ({"prompt": "\n\nHuman: Hello\n\nAssistant:", "chosen": "good", "rejected": "bad"},
        HELLO, "explicit prompt, text"),
    "system of its own": ({"prompt": [SYSTEM], "chosen": [*HELLO, *GOOD], "rejected": [*HELLO, *BAD]}, [SYSTEM, *HELLO],
        "UltraFeedback"),
    "system column, whole sides": (
        {"system": "Be brief.", "prompt": "Hello ", "chosen": [*HELLO, *GOOD], "rejected": [*HELLO, *BAD]},
        [SYSTEM, {"role": "user", "content": "Hello "}], "UltraFeedback"),
    "prompt is the first turn": ({"prompt": "Hello", "chosen": [*TURNS, *GOOD], "rejected": [*TURNS, *BAD]}, TURNS,
        "UltraFeedback"),
    "prompt of several turns": ({"prompt": TURNS, "chosen": GOOD, "rejected": BAD}, TURNS, "explicit prompt"),
    "equal sides": ({"prompt": HELLO, "chosen": GOOD, "rejected": GOOD}, HELLO, "explicit prompt"),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str) -> None:
    row, prompt, form = PAIRS[name]
    pair, found = to_pair(row)
    assert (pair["prompt"], found) == (prompt, form)
    assert pair["chosen"] == GOOD
    assert pair["rejected"] == (GOOD if name == "equal sides" else BAD)


def test_sides_that_part_before_the_last_answer_are_not_taken_for_equal_or_cut() -> None:
    sides = [[*HELLO, {"role": "assistant", "content": text}, TURNS[2], *GOOD] for text in ("a", "b")]
    with pytest.raises(WrongForm, match="chosen: after what both sides share it holds assistant, user, assistant"):
        to_pair({"chosen": sides[0], "rejected": sides[1]})


def test_a_prompt_that_the_sides_do_not_begin_with_is_refused() -> None:
    other = [{"role": "user", "content": "Other"}]
    with pytest.raises(WrongForm, match="chosen and rejected begin with other messages"):
        to_pair({"prompt": "Hello", "chosen": [*other, *GOOD], "rejected": [*other, *BAD]})
    with pytest.raises(WrongForm, match="prompt: the last message is the assistant's; it must be the user's"):
        to_pair({"prompt": [*HELLO, ANSWER], "chosen": GOOD, "rejected": BAD})


@pytest.mark.parametrize(("group", "kept"), [(5, "5"), (3.0, "3"), ("5", "5"), (" b ", "b"), (" ", None), (None, None)])
def test_a_group_is_a_text_whatever_the_file_has(group: Any, kept: str | None) -> None:
    sides = {"chosen": [*HELLO, *GOOD], "rejected": [*HELLO, *BAD]}
    found = [to_prompt({"prompt": "Hello", "group": group}), to_pair({**sides, "group": group})]
    assert [row.get("group") for row, _ in found] == [kept, kept]


def test_answers_of_the_openai_api_are_completions() -> None:
    choices = [{"message": ANSWER, "finish_reason": "MAX_TOKENS"}, {"message": ANSWER, "finish_reason": "stop"}]
    row, _ = to_completions({"prompt": "Hello", "choices": choices})
    assert (row["completions"], row["finish_reasons"]) == (["Hi", "Hi"], ["length", "stop"])


def test_completions_made_elsewhere() -> None:
    ends = ["max_new_tokens", "FINISH_REASON_STOP", None]
    row, _ = to_completions(
        {"instruction": "Hello", "responses": ["a", {"response": "b"}, [*HELLO, ANSWER]], "finish_reasons": ends}
    )
    assert row["finish_reasons"] == ["length", "stop", "unknown"]
    assert (row["prompt"], row["completions"]) == (HELLO, ["a", "b", "Hi"])


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


ROWS = [{"prompt": "Grüß Gott"}, {"prompt": "日本"}, {"prompt": "c"}]
FILES: dict[str, tuple[str, bytes]] = {
    "jsonl": ("p.jsonl", lines(*ROWS).encode()),
    "gzip": ("p.jsonl.gz", gzip.compress(lines(*ROWS).encode())),
    "UTF-8 with BOM": ("p.jsonl", b"\xef\xbb\xbf" + lines(*ROWS).encode()),
    "UTF-16": ("p.jsonl", lines(*ROWS).encode("utf-16")),
    "UTF-32": ("p.jsonl", lines(*ROWS).encode("utf-32")),
    "CSV of a shouting name": ("P.CSV", b"prompt,group\n" + "".join(f"{row['prompt']},\n" for row in ROWS).encode()),
    "CSV with blanks in its head": ("p.csv", " prompt , group\nGrüß Gott,a\n日本,\nc,b\n".encode()),
    "array": ("p.json", json.dumps(ROWS, indent=1).encode()),
    "Windows lines": ("p.jsonl", lines(*ROWS).replace("\n", "\r\n").encode()),
    "CR alone": ("p.jsonl", lines(*ROWS).replace("\n", "\r").encode()),
    "array with BOM": ("p.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode()),
    "array, gzip": ("p.json.gz", gzip.compress(json.dumps(ROWS, indent=1).encode())),
    "CSV, gzip": ("p.csv.gz", gzip.compress("prompt\nGrüß Gott\n日本\nc\n".encode())),
    "CSV with semicolons": ("p.csv", "prompt;group\nGrüß Gott;a\n日本;\nc;b\n".encode()),
    "TSV": ("p.tsv", "prompt\tgroup\nGrüß Gott\ta, b; c\n日本\t\nc\tb\n".encode()),
    "CSV with an empty cell too many": ("p.csv", "prompt,group\nGrüß Gott,a,\n日本,,\nc,b,\n".encode()),
    "CSV": ("p.csv", b"prompt,group\n" + "".join(f"{row['prompt']},\n" for row in ROWS).encode()),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str) -> None:
    file, content = FILES[name]
    (tmp_path / file).write_bytes(content)
    found = [row.prompt[0].content for row in read_rows(PromptRow, str(tmp_path / file))]
    assert found == [row["prompt"] for row in ROWS]


def test_a_file_of_lines_is_read_once_after_its_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a bucket each time it is opened it is downloaded, and an array of one line is all of the file."""
    (tmp_path / "p.jsonl").write_text(lines(*ROWS))
    opened, parts = LocalStorage.open, list[tuple[Any, ...]]()
    monkeypatch.setattr(LocalStorage, "open", lambda self, *part: parts.append(part[1:]) or opened(self, *part))
    assert len(list(read_rows(PromptRow, str(tmp_path / "p.jsonl")))) == 3
    assert parts == [(0, HEAD), (0, None)]


def test_a_tsv_of_one_column_may_hold_commas(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text("prompt\nred, green\n")
    assert [row.prompt[0].content for row in read_rows(PromptRow, str(tmp_path / "p.tsv"))] == ["red, green"]


@pytest.mark.parametrize("text", ['[{"value": 3}, {"value": 4}] Sum [x]', '[{"role": "admin", "level": 3}]', "[1]"])
def test_a_text_that_holds_json_is_a_text(text: str) -> None:
    assert to_prompt({"prompt": text})[0]["prompt"] == [{"role": "user", "content": text}]


@pytest.mark.parametrize("encode", [gzip.compress, lambda content: content.decode().encode("utf-16")])
def test_only_a_newline_ends_a_line(tmp_path: Path, encode: Any) -> None:
    file, texts = tmp_path / "p.jsonl", ["a\u2028b\x85c", "e"]
    file.write_bytes(encode(lines(*({"prompt": text} for text in texts)).encode()))
    assert [row.prompt[0].content for row in read_rows(PromptRow, str(file))] == texts


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", b"prompt,prompt\na,b\n", ":1: the column 'prompt' stands twice"),
        ("t.csv", b"prompt,prompt \na,b\n", ":1: the column 'prompt' stands twice"),
        ("t.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', ":2: not utf-8 text .* Save the file as UTF-8"),
        ("t.jsonl", '{"prompt": "a"}\n'.encode("utf-16-le"), ":1: not utf-8 text .* Save the file as UTF-8"),
        ("t.csv", b"prompt,group\na,b\nc,d,e\n", ":3: 3 cells under 2 names"),
        ("t.csv", b'prompt,group\n"a,b\nc,d\n', ":3: not a table"),
        ("t.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:-9], ": a damaged gzip file"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PreflowError, match=name + said):
        list(read_rows(PromptRow, str(tmp_path / name)))


def test_a_cell_of_a_table_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"prompt\n{'x' * 200_000}\n")
    assert [len(row.prompt[0].content) for row in read_rows(PromptRow, str(tmp_path / "t.csv"))] == [200_000]


def test_reasons_that_do_not_fit_the_completions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(lines({"prompt": "a", "completions": ["b", "c"], "finish_reasons": ["stop"]}))
    with pytest.raises(PreflowError, match=r"c.jsonl:1: finish_reasons: 1 of them for 2 completions"):
        list(read_rows(CompletionsRow, str(tmp_path / "c.jsonl")))


@pytest.mark.parametrize(
    ("content", "said"), [(b"PK\x03\x04x", "a zip archive"), (b"\x28\xb5\x2f\xfdx", "zstd"), (b"\xfd7zXZ\0", "xz")]
)
def test_another_packing_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(PreflowError, match=f"p.jsonl: {said} is not read; unpack it, or pack it with gzip"):
        list(read_rows(PromptRow, str(tmp_path / "p.jsonl")))


@pytest.mark.slow  # importing `datasets`
def test_parquet_and_a_folder_of_datasets(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the extra train brings it")
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ROWS)
    data.to_parquet(str(tmp_path / "p.parquet"))
    DatasetDict({"train": data}).save_to_disk(str(tmp_path / "saved"))
    for place in ("p.parquet", "saved/train"):
        imported = import_prompts(str(tmp_path / place), str(tmp_path / "ws"))
        assert imported.rows == 3
    with pytest.raises(PreflowError, match=r"several splits \(train\); give one of them"):
        list(read_rows(PromptRow, str(tmp_path / "saved")))


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="the extra train brings it")
    (tmp_path / "p.parquet").write_bytes(b"PAR1\x15\x04")
    with pytest.raises(PreflowError, match=r"p.parquet: damaged"):
        list(read_rows(PromptRow, str(tmp_path / "p.parquet")))


def test_the_forms_are_counted_and_text_that_is_none_is_named_by_its_line(tmp_path: Path) -> None:
    file, used = tmp_path / "pairs.jsonl", Counter[str]()
    file.write_text(lines(*(row for row, _, _ in PAIRS.values())))
    assert len(list(number_rows(PairRow, str(file), Workspace.holding(str(file)), used))) == len(PAIRS)
    assert used["explicit prompt"] == 5
    (tmp_path / "latin.csv").write_bytes("prompt\na\nGrüße\n".encode("cp1252"))
    with pytest.raises(PreflowError, match=r"latin.csv:3: not utf-8 text .* Save the file as UTF-8"):
        list(read_rows(PromptRow, str(tmp_path / "latin.csv")))
