"""Data as people have it, read as preflow's rows: files of many formats, prompts and preference pairs of many forms.

    files          JSONL, a JSON array, CSV, TSV (all also .gz, UTF-8 with a BOM, UTF-16), parquet, a `datasets` folder
    prompts        prompt (messages or text), messages (OpenAI), conversations (ShareGPT), instruction/input (Alpaca),
                   question or query, a plain string; with a `system` or `system_prompt` column
    pairs          TRL's explicit and implicit prompt, as messages or as text; UltraFeedback; HH-RLHF ("\n\nHuman: ...")
                   OpenAI's input, preferred_output and non_preferred_output; LLaMA-Factory's sides of one message
    completions    a prompt of any form with completions, responses, outputs, generations, or choices (OpenAI's answer)

The first of `PROMPT_FORMS` that fits decides. What fits none is refused, with the row that is wanted.
"""

import codecs
import csv
import gzip
import io
import itertools
import json
import math
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tasks.errors import PreflowError
from tasks.store.workspace import Row, Workspace

Messages = list[dict[str, str]]

ROLES = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "chatgpt": "assistant", "model": "assistant", "system": "system", "developer": "system",
}  # fmt: skip
TEXT = ("text", "input_text", "output_text")
SAMPLES = ("completions", "responses", "outputs", "generations", "choices")
ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16's does
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What providers and gateways say where OpenAI says "stop" and "length".
ENDED = re.compile(
    r"(finish_reason_)?(stop(_(sequence|token|string))?|end(_?(of_)?turn)?|eos(_token|_found)?|completed?|finished|done)$",
    re.IGNORECASE,
)
AT_LIMIT = re.compile(
    r"(finish_reason_)?(length|limit|(max|model)_?(output_|completion_|new_)?(tokens|length)|token_?limit"
    r"|(model_)?context_(length|window)(_exceeded)?)$",
    re.IGNORECASE,
)
GZIP, PACKED = b"\x1f\x8b", {
    b"PK\x03\x04": "a zip archive", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz",
}  # fmt: skip
OPENAI_PAIR = {"input": "prompt", "preferred_output": "chosen", "non_preferred_output": "rejected"}
# Of a file: enough to tell its format. Of a table: rows that become Python's objects, ten times as large, at once.
HEAD, ROWS_AT_ONCE = 1 << 20, 1000
HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")
MESSAGES_AS_TEXT = re.compile(
    r"""\s*\[\s*\{(?=.*["'](role|from)["']\s*:)(?=.*["'](content|value)["']\s*:).*\}\s*\]\s*$""", re.DOTALL
)


class WrongForm(ValueError):
    """A row fits no form, or not whole; says what is wrong."""


# ---- files


def no_such_file(uri: str) -> PreflowError:
    """Return the error for a file of rows that is not there."""
    what = "a folder that holds no table of `datasets`" if os.path.isdir(uri) else "no such file"
    return PreflowError(f"{uri}: {what}. Give the path of a JSONL file, one JSON object a line.")


def read_table(uri: str, store: Workspace) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a file with their line (or row) numbers from 1; JSONL is streamed, the other formats are read.

    Raises:
        PreflowError: a line is no row of its format; names the file and the line.
    """
    is_file = store.exists(uri)
    head = store.read_bytes(uri, 0, HEAD).partition(b"\n")[0] if is_file else b""
    if not is_file or head.startswith(b"PAR1"):
        yield from enumerate(_read_arrow(uri, store), 1)
    elif other := next((name for magic, name in PACKED.items() if head.startswith(magic)), None):
        raise PreflowError(f"{uri}: {other} is not read; unpack it, or pack it with gzip")
    elif _name(uri).endswith((".csv", ".tsv")):
        yield from _read_csv(uri, _text(uri, store))
    elif head.startswith((GZIP, *(bom for bom, _ in ENCODINGS))) or b"\r" in head.rstrip(b"\r\n"):
        text = _text(uri, store)
        is_array = text.lstrip().startswith("[")
        yield from enumerate(parse_json(text, uri), 1) if is_array else _read_lines(uri, text.split("\n"))
    elif head.lstrip().startswith(b"["):
        yield from enumerate(parse_json(_text(uri, store), uri), 1)
    else:
        yield from _read_lines(uri, store.lines(uri))


def _name(uri: str) -> str:
    return uri.lower().removesuffix(".gz")


def _text(uri: str, store: Workspace) -> str:
    content = store.read_bytes(uri)
    try:
        content = gzip.decompress(content) if content.startswith(GZIP) else content
    except (OSError, EOFError, zlib.error) as error:
        raise PreflowError(f"{uri}: a damaged gzip file ({error}). Pack it again.") from error
    return decode_text(content, uri).replace("\r\n", "\n").replace("\r", "\n")


def decode_text(content: bytes, where: str) -> str:
    """Return text that is UTF-8, or UTF-16 with its byte order mark, without the mark.

    Raises:
        PreflowError: it is neither; names the line.
    """
    encoding = next((name for bom, name in ENCODINGS if content.startswith(bom)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise PreflowError(f"{where}:{line}: not {encoding} text ({error.reason}). Save the file as UTF-8.") from error
    before, zero, _ = text.partition("\0")
    if zero:
        line = before.count("\n") + 1
        raise PreflowError(f"{where}:{line}: a byte 0, so UTF-16 without its mark or no text. Save the file as UTF-8.")
    return text


def _read_lines(uri: str, lines: Iterable[str | bytes]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, parse_json(line, f"{uri}:{number}")


def parse_json(line: str | bytes, where: str) -> Any:
    """Return the value of one line of JSON.

    Raises:
        PreflowError: it is not JSON, or holds what does not survive being written again: a key twice, a number too
            large for a float, half a surrogate pair.
    """
    try:
        value = json.loads(line, parse_constant=_number, parse_float=_number, object_pairs_hook=_object)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half, fields = error.object[error.start], value.items() if isinstance(value, dict) else ()
        field = next((f"{name}: " for name, of in fields if half in json.dumps(of, ensure_ascii=False)), "")
        raise PreflowError(
            f"{where}: {field}half a character (\\u{ord(half):04x}). Write the text again as UTF-8."
        ) from error
    except UnicodeDecodeError as error:
        raise PreflowError(f"{where}: not utf-8 text ({error.reason}). Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise PreflowError(f"{where}: not usable JSON ({error}). Each line must be one JSON object.") from error
    return value


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no number that JSON can hold")
    return value


def _object(pairs: Sequence[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"the key {twice[0]!r} stands twice in one object")
    return row


def _read_csv(uri: str, text: str) -> Iterator[tuple[int, Row]]:
    head = text.partition("\n")[0]
    # German and French tables have semicolons.
    usual = "\t" if _name(uri).endswith(".tsv") else ","
    delimiter = max("\t;,", key=lambda mark: (head.count(mark), mark == usual))
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        if twice := [name for name, count in Counter(filter(None, names)).items() if count > 1]:
            raise PreflowError(f"{uri}:1: the column {twice[0]!r} stands twice: rename one")
        for cells in reader:
            if any(cells[len(names) :]):
                raise PreflowError(
                    f"{uri}:{reader.line_num}: {len(cells)} cells under {len(names)} names of columns. Put a cell that "
                    f"holds {delimiter!r} in quotes."
                )
            if cells:
                found = zip(names, cells, strict=False)
                yield reader.line_num, {name: value for name, value in found if name and value != ""}
    except csv.Error as error:
        raise PreflowError(
            f"{uri}:{reader.line_num}: not a table ({error}). Put cells with quotes in quotes."
        ) from error


def _read_arrow(uri: str, store: Workspace) -> Iterator[Row]:
    """Yield the rows of a parquet file, or of a folder saved by `datasets` (one split)."""
    try:
        from pyarrow import ArrowException, ipc, parquet
    except ImportError as error:
        raise PreflowError(
            f"{uri}: reading this takes pyarrow: pip install pyarrow, or save the data as JSONL"
        ) from error
    files = [uri] if store.exists(uri) else store.list(uri)
    if any(file.endswith("dataset_dict.json") for file in files):
        splits = ", ".join(sorted(store.folders(uri)))
        raise PreflowError(f"{uri}: a folder of several splits ({splits}); give one of them, such as {uri}/train")
    shards = [file for file in files if file == uri or file.endswith((".arrow", ".parquet"))]
    if not shards:
        raise no_such_file(uri)
    for file in shards:
        content = io.BytesIO(store.read_bytes(file))
        try:
            table = ipc.open_stream(content).read_all() if file.endswith(".arrow") else parquet.read_table(content)
        except ArrowException as error:
            raise PreflowError(f"{file}: damaged, or not what its name says ({error}). Write it again.") from error
        rows = (row for batch in table.to_batches(ROWS_AT_ONCE) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            try:  # as JSON holds it: dates as text, and no number that JSON has not
                yield json.loads(json.dumps(row, default=str, allow_nan=False))
            except ValueError as error:
                raise PreflowError(f"{file}, row {number}: {error}. Replace it by an empty value.") from error


# ---- forms


def to_prompt(row: Any) -> tuple[Row, str]:
    """Return a row with its `prompt` as messages, and the form that it had; other fields are kept.

    Raises:
        WrongForm: it has no prompt in a known form.
    """
    if isinstance(row, str):
        return {"prompt": _user(row)}, "plain text"
    if not isinstance(row, dict):
        raise WrongForm(f"a JSON {type(row).__name__}, not an object")
    for name, field, read in PROMPT_FORMS:
        if row.get(field) not in (None, ""):
            rest = {key: value for key, value in row.items() if key not in (field, "system", "system_prompt")}
            converted = read(row[field], field, rest)
            return _with_group({**rest, "prompt": _with_system(row, converted)}), name
    if {"chosen", "rejected"} <= row.keys():  # pairs, of which only the prompt is wanted
        pair, form = to_pair(row)
        return {name: value for name, value in pair.items() if name not in ("chosen", "rejected")}, form
    raise WrongForm(f"no prompt in it (the row has: {', '.join(sorted(row)) or 'no fields'})")


def _with_system(row: Row, turns: Messages) -> Messages:
    """Return a prompt's turns with the system message that a column of its own holds."""
    texts = [value for name in ("system", "system_prompt") if (value := row.get(name)) not in (None, "")]
    if not texts:
        return turns
    if not isinstance(texts[0], str):
        raise WrongForm(f"system: a {type(texts[0]).__name__}, not a text")
    own = [turn["content"] for turn in turns[:1] if turn["role"] == "system"]
    if any(text != texts[0] for text in (*texts, *own)):
        raise WrongForm("system: two system messages that differ; keep one")
    return turns if own else [{"role": "system", "content": texts[0]}, *turns]


def _with_group(row: Row) -> Row:
    """Return a row whose group is a text, as a table has it where JSON has a number; an empty one is none."""
    group = row.get("group")
    if isinstance(group, float) and group.is_integer():  # of a column that pandas has read, with gaps
        group = int(group)
    if isinstance(group, int) and not isinstance(group, bool):
        return {**row, "group": str(group)}
    if isinstance(group, str) and group.strip():
        return {**row, "group": group.strip()}
    is_none = group is None or isinstance(group, str)
    return {name: value for name, value in row.items() if name != "group"} if is_none else row


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _from_prompt(value: Any, field: str, _: Row) -> Messages:
    if not isinstance(value, str):
        return messages(value, field)
    if HH_TURN.match(value) and value.rstrip().endswith("\n\nAssistant:"):
        return _hh_turns(value.rstrip())[:-1]
    return messages(_unpack(value, field), field) if MESSAGES_AS_TEXT.match(value) else _user(value)


def _unpack(text: str, field: str) -> Any:
    """Return the messages in a table's cell, which have become text there."""
    try:
        return json.loads(text)
    except ValueError:
        raise WrongForm(f"{field}: a text that looks like messages and is not JSON; save them as JSON") from None


def _from_messages(value: Any, field: str, rest: Row) -> Messages:
    """Split a conversation into the prompt and the assistant's last answer, which is kept as `completion`."""
    found = messages(_unpack(value, field) if isinstance(value, str) else value, field)
    if found and found[-1]["role"] == "assistant":
        rest["completion"] = found.pop()["content"]
    return found


def _from_instruction(value: Any, field: str, rest: Row) -> Messages:
    given = rest.pop("input", None)
    if "completion" not in rest and (answer := rest.pop("output", None)) is not None:
        rest["completion"] = answer
    asked = _plain(value, field)
    return _user(f"{asked}\n\n{_plain(given, 'input')}" if given else asked)


def _plain(value: Any, field: str) -> str:
    """Return a text, or a number as one."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise WrongForm(f"{field}: a {type(value).__name__}, not a text")
    return str(value)


PROMPT_FORMS: tuple[tuple[str, str, Callable[[Any, str, Row], Messages]], ...] = (
    ("prompt", "prompt", _from_prompt),
    ("messages (OpenAI)", "messages", _from_messages),
    ("conversations (ShareGPT)", "conversations", _from_messages),
    ("conversation", "conversation", _from_messages),
    ("instruction (Alpaca)", "instruction", _from_instruction),
    ("question", "question", lambda value, field, _: _user(_plain(value, field))),
    ("query", "query", lambda value, field, _: _user(_plain(value, field))),
)


def messages(value: Any, field: str) -> Messages:
    """Return chat messages in OpenAI's or ShareGPT's form as {role, content}; parts of text are joined.

    Raises:
        WrongForm: a message has no known role, or content that is not text.
    """
    if not isinstance(value, list):
        raise WrongForm(f"{field}: a {type(value).__name__}, not a list of messages or a text")
    return [_message(item, f"{field}[{number}]") for number, item in enumerate(value)]


def _message(item: Any, where: str) -> dict[str, str]:
    if not isinstance(item, dict):
        raise WrongForm(f"{where}: not a message with role and content")
    role = item.get("role", item.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise WrongForm(f"{where}: the role {role!r} is not system, user or assistant")
    content = item.get("content", item.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") in TEXT for part in content):
        texts = [part.get("text", "") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not isinstance(content, str):
        raise WrongForm(f"{where}: its content is not text")
    known = {"role", "from", "content", "value", "weight"}
    if lost := sorted(name for name, value in item.items() if name not in known and value not in (None, [], "")):
        raise WrongForm(f"{where}.{lost[0]}: a message has role and content; this field would be lost")
    return {"role": ROLES[role], "content": content}


def to_completions(row: Any) -> tuple[Row, str]:
    """Return a row with its prompt as messages and its `completions` as texts, and the form that it had.

    Raises:
        WrongForm: it has no prompt or no completions in a known form.
    """
    if not isinstance(row, dict):
        raise WrongForm(f"a JSON {type(row).__name__}, not an object")
    field = next((name for name in SAMPLES if isinstance(row.get(name), list)), None)
    if field is None:
        raise WrongForm(f"no list of completions in it (the row has: {', '.join(sorted(row)) or 'no fields'})")
    converted, form = to_prompt({name: value for name, value in row.items() if name != field})
    _check_turns(converted["prompt"])
    told = [item.get("finish_reason") if isinstance(item, dict) else None for item in row[field]]
    if any(reason is not None for reason in told):
        converted.setdefault("finish_reasons", told)
    if isinstance(reasons := converted.get("finish_reasons"), list):
        converted["finish_reasons"] = [finish_name(reason) for reason in reasons]
    return {**converted, "completions": [_sample(item, f"{field}[{n}]") for n, item in enumerate(row[field])]}, form


def finish_name(reason: Any) -> str:
    """Return OpenAI's name for why an answer ended: stop or length; another reason as it is."""
    if not isinstance(reason, str) or not reason:
        return "unknown"
    reason = reason.strip()
    return "stop" if ENDED.match(reason) else "length" if AT_LIMIT.match(reason) else reason or "unknown"


def ended_by_itself(reason: str | None) -> bool:
    """Tell whether an answer ended by itself, or it is not told; else it was cut: length, abort, content_filter, ..."""
    return finish_name(reason).lower() in ("stop", "unknown", "tool_calls", "tool_use", "function_call")


def _sample(item: Any, where: str) -> str:
    if isinstance(item, dict):
        item = item["message"] if isinstance(item.get("message"), dict) else item
        item = item.get("response", item.get("content", item.get("text")))
    if isinstance(item, list):
        turns = messages(item, where)
        item = turns[-1]["content"] if turns and turns[-1]["role"] == "assistant" else None
    if not isinstance(item, str):
        raise WrongForm(f"{where}: not the text of a completion")
    return item


def to_pair(row: Any, one_answer: bool = True) -> tuple[Row, str]:
    """Return a row as TRL's conversational preference pair, and the form that it had.

    The prompt is what both sides begin with, turn by turn; what is left must be one answer of the assistant each, or
    else, without `one_answer`, end in one.

    Raises:
        WrongForm: it has no two sides in a known form, or they differ before the last answer.
    """
    if isinstance(row, dict) and OPENAI_PAIR.keys() <= row.keys():
        row = {OPENAI_PAIR.get(name, name): value for name, value in row.items()}
        row["prompt"] = row["prompt"].get("messages") if isinstance(row["prompt"], dict) else row["prompt"]
    if not isinstance(row, dict) or not {"chosen", "rejected"} <= row.keys():
        has = ", ".join(sorted(row)) if isinstance(row, dict) else f"a JSON {type(row).__name__}"
        raise WrongForm(f"no chosen and rejected in it (the row has: {has or 'no fields'})")
    rest = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
    prompt: Messages = []
    if any(row.get(field) not in (None, "") for _, field, _ in PROMPT_FORMS):
        rest, _ = to_prompt(rest)
        prompt = rest["prompt"]
    sides, form = _sides(row, prompt)
    whole = [prompt + side if side[0]["role"] == "assistant" else side for side in sides]
    most = min(map(len, whole)) - 1  # a last answer is never a part of the prompt, though both sides have it
    shared = whole[0][: next((n for n in range(most) if whole[0][n] != whole[1][n]), most)]
    turns = _joined(prompt, shared)
    _check_turns(turns)
    answers = [side[len(shared) :] for side in whole]
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if [turn["role"] for turn in (answer if one_answer else answer[-1:])] != ["assistant"]:
            roles = ", ".join(turn["role"] for turn in answer) or "nothing"
            raise WrongForm(f"{name}: after what both sides share it holds {roles}, not one answer of the assistant")
    return _with_group({**rest, "prompt": turns, "chosen": answers[0], "rejected": answers[1]}), form


def _check_turns(turns: Messages) -> None:
    if turns and turns[-1]["role"] != "user":
        raise WrongForm(f"prompt: the last message is the {turns[-1]['role']}'s; it must be the user's")


def _joined(prompt: Messages, shared: Messages) -> Messages:
    """Return the prompt's turns where the row has some, and both sides begin with some, too.

    Raises:
        WrongForm: they are not the same, and neither is a part of the other.
    """
    given, begun = ([(turn["role"], turn["content"].split()) for turn in turns] for turns in (prompt, shared))
    if any(begun[n : n + len(given)] == given for n in range(len(begun) + 1)):
        return shared
    if given[len(given) - len(begun) :] == begun:  # a system message of the row's own before it
        return prompt
    if all(turn["role"] == "system" for turn in prompt) and shared[0]["role"] != "system":
        return [*prompt, *shared]
    raise WrongForm("prompt: chosen and rejected begin with other messages than these")


def _sides(row: Row, prompt: Messages) -> tuple[list[Messages], str]:
    given: list[Any] = [[side] if isinstance(side, dict) else side for side in (row["chosen"], row["rejected"])]
    if all(isinstance(side, list) and side for side in given):
        sides = [messages(side, name) for side, name in zip(given, ("chosen", "rejected"), strict=True)]
        has_prompt = sides[0][0]["role"] != "assistant"
        return sides, "implicit prompt" if not prompt else "UltraFeedback" if has_prompt else "explicit prompt"
    if not all(isinstance(side, str) for side in given):
        raise WrongForm("chosen and rejected: both must be texts, or both lists of messages")
    if all(HH_TURN.match(side) for side in given):
        return [_hh_turns(side) for side in given], "HH-RLHF"
    if prompt:
        return [[{"role": "assistant", "content": side}] for side in given], "explicit prompt, text"
    # Where the two texts part, at the last blank before that, as TRL's `extract_prompt` does.
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*given, strict=False))
    both = "".join(letter for letter, _ in alike)
    start = len(both) if both[-1:].isspace() else both.rfind(" ") + 1
    if not both[:start].strip():
        raise WrongForm("no prompt in it, and chosen and rejected do not begin alike")
    sides = [[*_user(side[:start].rstrip()), {"role": "assistant", "content": side[start:]}] for side in given]
    return sides, "implicit prompt, text"


def _hh_turns(text: str) -> Messages:
    _, *parts = HH_TURN.split(text)
    roles = ("user" if name == "Human" else "assistant" for name in parts[::2])
    return [{"role": role, "content": content.strip()} for role, content in zip(roles, parts[1::2], strict=True)]
