"""The rows that travel, and reading them with errors that name file, line and field."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from tasks.errors import PreflowError
from tasks.store.forms import WrongForm, read_table, to_completions, to_pair, to_prompt
from tasks.store.workspace import Row, Workspace, digest

# Of a file with many wrong lines: enough to see what they have in common.
PROBLEMS_SHOWN = 5


class Message(BaseModel, extra="forbid"):
    """One chat message."""

    role: Literal["system", "user", "assistant"]
    content: str


class KeepingRow(BaseModel, extra="allow"):
    """A row of an artifact; fields that it does not know are kept."""


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
        rest = {name: value for name, value in row.items() if name != "id"}
        is_ours = isinstance(row.get("prompt"), list) and row["id"] == prompt_id(row["prompt"])
        return rest if is_ours else {"source_id": row["id"], **rest}

    @model_validator(mode="after")
    def _check(self) -> "PromptRow":
        if (last := self.prompt[-1].role) != "user":
            raise ValueError(f"prompt: the last message is the {last}'s; it must be the user's")
        if not any(message.content.strip() for message in self.prompt):
            raise ValueError("prompt: every message is empty")
        self.id = prompt_id([message.model_dump() for message in self.prompt])
        return self


class CompletionsRow(KeepingRow):
    """The N completions of one prompt, in sampling order.

    Attributes:
        finish_reasons: of each completion: `stop`, a tool call or unknown ended by itself; `length`, `content_filter`,
            `abort` and all else were cut.
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
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), list):
            return row
        given = row.get("id")
        if isinstance(given, str) and given:
            return row
        kept = {} if given in (None, "") else {"source_id": given}
        return {**kept, **row, "id": prompt_id(row["prompt"])}

    @model_validator(mode="after")
    def _check_lengths(self) -> "CompletionsRow":
        for name in ("finish_reasons", "token_ids"):
            if (count := len(getattr(self, name))) not in (0, len(self.completions)):
                raise ValueError(f"{name}: {count} of them for {len(self.completions)} completions")
        return self


class Vote(KeepingRow):
    """What one judge said about a row's completions in one order; `best` and `worst` are indexes of completions.

    `scores`, where they were asked for, are in the order in which the completions were shown.
    """

    judge: str
    order: list[int]
    best: int | None = None
    worst: int | None = None
    confidence: int | None = None
    scores: list[int] | None = None
    error: str | None = None
    raw: str | None = None


class VerdictsRow(CompletionsRow):
    """Completions with the votes of all judges on them."""

    votes: list[Vote]


class PairRow(KeepingRow):
    """TRL's conversational preference row, with what was sampled next to it where that is known.

    Attributes:
        prompt_token_ids: the prompt's tokens, template included.
        chosen_token_ids: what was sampled, its end of turn included; likewise `rejected_token_ids`.
        chosen_finish_reason: `length`, `content_filter`, `abort`: it was cut; likewise `rejected_finish_reason`.
        sft_only: no pair: both sides are equal, so that DPO has no gradient, and an added SFT loss learns from it.
    """

    prompt: list[Message] = Field(min_length=1)
    chosen: list[Message]
    rejected: list[Message]
    prompt_token_ids: list[int] | None = None
    chosen_token_ids: list[int] | None = None
    rejected_token_ids: list[int] | None = None
    chosen_finish_reason: str | None = None
    rejected_finish_reason: str | None = None
    sft_only: bool | None = None


class ConversationPairRow(PairRow):
    """A pair whose sides may part before their last answer: it can be looked at, and not be trained on."""


def prompt_id(messages: list[dict[str, str]]) -> str:
    """Return the sha256 (hex) of the canonical messages: only role and content count."""
    return digest([{"role": m.get("role"), "content": m.get("content")} for m in messages])


RowT = TypeVar("RowT", bound=BaseModel)
CONVERT: dict[type[BaseModel], Callable[[Any], tuple[Row, str]]] = {
    PromptRow: to_prompt,
    CompletionsRow: to_completions,
    PairRow: to_pair,
    ConversationPairRow: partial(to_pair, one_answer=False),
}
_PROMPT = '"prompt": [{"role": "user", "content": "..."}]'
_ANSWER = '[{"role": "assistant", "content": "..."}]'
_PAIR = f'{{{_PROMPT}, "chosen": {_ANSWER}, "rejected": {_ANSWER}}}'
WANTED: dict[type[BaseModel], str] = {
    PromptRow: f"{{{_PROMPT}}}",
    CompletionsRow: f'{{{_PROMPT}, "completions": ["...", "..."]}}',
    PairRow: _PAIR,
    ConversationPairRow: _PAIR,
}


def _explain(error: ValidationError, value: object) -> str:
    fields = []
    for problem in error.errors(include_input=False, include_url=False):
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
        fields.append(f"{name}: {problem['msg']}" if name else problem["msg"].removeprefix("Value error, "))
    has = ", ".join(sorted(value)) if isinstance(value, dict) else ""
    return f"{'; '.join(fields[:3])} (the row has: {has or 'no fields'})"


def read_rows(model: type[RowT], uri: str, store: Workspace | None = None) -> Iterator[RowT]:
    """Yield the rows of a file in any form of `tasks.store.forms`; JSONL is streamed, blank lines are skipped.

    Raises:
        PreflowError: the file is missing or empty, or lines are wrong (the first few, by file, line and field).
    """
    store = store or Workspace.holding(uri)
    empty = True
    for _, row in number_rows(model, uri, store):
        empty = False
        yield row
    if empty:
        raise PreflowError(f"{uri}: has no rows. Give a JSONL file with at least one row.")


def number_rows(
    model: type[RowT], uri: str, store: Workspace, used: Counter[str] | None = None
) -> Iterator[tuple[str, RowT]]:
    """Yield each row with its place, `file:line`; `used` counts the forms that the rows had. See `read_rows`."""
    convert, wrong = CONVERT.get(model), []
    for number, value in read_table(uri, store):
        place = f"{uri}:{number}"
        try:
            value, form = convert(value) if convert else (value, "")
            row = model.model_validate(value)
        except WrongForm as error:
            wrong.append(f"{place}: {error}")
        except ValidationError as error:
            wrong.append(f"{place}: {_explain(error, value)}")
        else:
            if used is not None:
                used[form] += 1
            if not wrong:
                yield place, row
        if len(wrong) == PROBLEMS_SHOWN:
            break
    if wrong:
        wanted = f"\nA row that is right: {WANTED[model]}" if model in WANTED else ""
        raise PreflowError("\n".join(wrong) + wanted)
