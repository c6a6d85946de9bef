"""The rows that travel, and reading them with errors that name file, line and field."""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tasks.errors import PreflowError
from tasks.store.workspace import Workspace, digest


class Message(BaseModel):
    """One chat message."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class Prompt(BaseModel):
    """A prompt, or an SFT row whose `completion` is carried along; unknown fields are kept.

    `id` is the digest of the messages; one that the row brings along is kept as `source_id`.
    """

    model_config = ConfigDict(extra="allow")

    id: str = ""
    prompt: list[Message] = Field(min_length=1)
    group: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _keep_source_id(cls, row: Any) -> Any:
        if not isinstance(row, dict) or "id" not in row:
            return row
        given = row["id"]
        rest = {name: value for name, value in row.items() if name != "id"}
        is_ours = isinstance(given, str) and re.fullmatch(r"[0-9a-f]{64}", given)
        return rest if is_ours else {"source_id": given, **rest}

    @model_validator(mode="after")
    def _check(self) -> "Prompt":
        if self.prompt[-1].role == "assistant":
            raise ValueError("prompt: the last message is the assistant's own; it must be the user's")
        if not any(message.content.strip() for message in self.prompt):
            raise ValueError("prompt: every message is empty")
        self.id = prompt_id([message.model_dump() for message in self.prompt])
        return self


class Completions(BaseModel):
    """The N completions of one prompt, in sampling order."""

    model_config = ConfigDict(extra="allow")

    id: str = Field(min_length=1)
    prompt: list[Message] = Field(min_length=1)
    completions: list[str] = Field(min_length=1)
    finish_reasons: list[str] = []
    group: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_id(cls, row: Any) -> Any:
        if isinstance(row, dict) and not row.get("id") and isinstance(row.get("prompt"), list):
            return {**row, "id": prompt_id(row["prompt"])}
        return row


class PreferencePair(BaseModel):
    """TRL's conversational preference row."""

    model_config = ConfigDict(extra="allow")

    prompt: list[Message] = Field(min_length=1)
    chosen: list[Message] = Field(min_length=1)
    rejected: list[Message] = Field(min_length=1)


def prompt_id(messages: list[dict[str, str]]) -> str:
    """Return the sha256 (hex) of the canonical messages: only role and content count."""
    return digest([{"role": m.get("role"), "content": m.get("content")} for m in messages])


Row = TypeVar("Row", bound=BaseModel)


def parse_row(model: type[Row], line: bytes, where: str) -> Row:
    """Parse one JSONL line.

    Raises:
        PreflowError: naming `where` (file:line) and each wrong field.
    """
    try:
        value = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise PreflowError(f"{where}: not JSON ({error}). Each line must be one JSON object.") from error
    if not isinstance(value, dict):
        raise PreflowError(f"{where}: a JSON {type(value).__name__}, not an object with a `prompt`")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise PreflowError(f"{where}: {_explain(error, value)}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _explain(error: ValidationError, value: dict[str, Any]) -> str:
    fields = []
    for problem in error.errors(include_input=False, include_url=False):
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
        fields.append(f"{name}: {problem['msg']}" if name else problem["msg"].removeprefix("Value error, "))
    has = ", ".join(sorted(value)) or "no fields"
    return f"{'; '.join(fields[:3])} (the row has: {has})"


def read_rows(model: type[Row], uri: str, store: Workspace | None = None) -> Iterator[Row]:
    """Yield the rows of a JSONL file, streaming; blank lines are skipped.

    Raises:
        PreflowError: the file is missing or empty, or a line is wrong (file, line and field are named).
    """
    store = store or Workspace.holding(uri)
    if not store.exists(uri):
        raise PreflowError(f"{uri}: no such file. Give the path of a JSONL file, one JSON object a line.")
    empty = True
    for number, line in enumerate(store.lines(uri), 1):
        if line.strip():
            empty = False
            yield parse_row(model, line, f"{uri}:{number}")
    if empty:
        raise PreflowError(f"{uri}: has no rows. Give a JSONL file with at least one row.")
