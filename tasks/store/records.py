"""The rows that travel, and reading them with errors that name file, line and field."""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tasks.errors import PreflowError
from tasks.store.workspace import Workspace, digest


class Message(BaseModel):
    """One chat message."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class KeepingRow(BaseModel):
    """A row of an artifact; fields that it does not know are kept."""

    model_config = ConfigDict(extra="allow")


class PromptRow(KeepingRow):
    """A prompt, or an SFT row whose `completion` is carried along.

    `id` is the digest of the messages; one that the row brings along is kept as `source_id`.
    """

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
    def _check(self) -> "PromptRow":
        if self.prompt[-1].role == "assistant":
            raise ValueError("prompt: the last message is the assistant's own; it must be the user's")
        if not any(message.content.strip() for message in self.prompt):
            raise ValueError("prompt: every message is empty")
        self.id = prompt_id([message.model_dump() for message in self.prompt])
        return self


class CompletionsRow(KeepingRow):
    """The N completions of one prompt, in sampling order.

    Attributes:
        finish_reasons: of each completion: `stop` ended by itself, `length` was cut at max_tokens.
        prompt_token_ids: the prompt as the server tokenized it, template included; None where it does not say.
        token_ids: what was sampled for each completion, its end of turn included; None for one whose text was changed.
    """

    id: str = Field(min_length=1)
    prompt: list[Message] = Field(min_length=1)
    completions: list[str] = Field(min_length=1)
    finish_reasons: list[str] = []
    prompt_token_ids: list[int] | None = None
    token_ids: list[list[int] | None] = []
    group: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_id(cls, row: Any) -> Any:
        if isinstance(row, dict) and not row.get("id") and isinstance(row.get("prompt"), list):
            return {**row, "id": prompt_id(row["prompt"])}
        return row


class Vote(KeepingRow):
    """What one judge said about a row's completions in one order; `best` and `worst` are indexes of completions."""

    judge: str
    order: list[int]
    best: int | None = None
    worst: int | None = None
    confidence: int | None = None
    error: str | None = None
    raw: str | None = None


class VerdictsRow(CompletionsRow):
    """Completions with the votes of all judges on them."""

    votes: list[Vote]


class ComparisonRow(VerdictsRow):
    """Two samples of a held-out prompt, [baseline, candidate], and what the votes are worth to the candidate."""

    prompt_id: str
    outcome: float


class PairRow(KeepingRow):
    """TRL's conversational preference row, with what was sampled next to it where that is known.

    Attributes:
        prompt_token_ids: the prompt's tokens, template included.
        chosen_token_ids: what was sampled, its end of turn included; likewise `rejected_token_ids`.
        chosen_finish_reason: `length` for a side that was cut at max_tokens; likewise `rejected_finish_reason`.
    """

    prompt: list[Message] = Field(min_length=1)
    chosen: list[Message]
    rejected: list[Message]
    prompt_token_ids: list[int] | None = None
    chosen_token_ids: list[int] | None = None
    rejected_token_ids: list[int] | None = None
    chosen_finish_reason: str | None = None
    rejected_finish_reason: str | None = None

    @field_validator("chosen", "rejected")
    @classmethod
    def _check_side(cls, side: list[Message]) -> list[Message]:
        if [message.role for message in side] != ["assistant"]:
            roles = ", ".join(message.role for message in side) or "nothing"
            raise ValueError(f"must be one message of the assistant, not {roles}; the conversation belongs in `prompt`")
        return side


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
    for _, row in number_rows(model, uri, store):
        empty = False
        yield row
    if empty:
        raise PreflowError(f"{uri}: has no rows. Give a JSONL file with at least one row.")


def number_rows(model: type[Row], uri: str, store: Workspace) -> Iterator[tuple[str, Row]]:
    """Yield each row with its place, `file:line`; see `read_rows`."""
    for number, line in enumerate(store.lines(uri), 1):
        if line.strip():
            yield f"{uri}:{number}", parse_row(model, line, f"{uri}:{number}")
