"""What an OpenAI-compatible endpoint sends back: answers, token usage, and errors told apart by what helps."""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Self

import httpx2
from pydantic import BaseModel, ConfigDict

from tasks.config import EndpointConfig
from tasks.errors import PreflowError

# 409 is sent by some gateways for a lock conflict, 529 by some for an overload.
RETRIED = frozenset({408, 409, 425, 429})
THROTTLES = frozenset({429, 503, 529})

_CONTEXT_LENGTH = re.compile(
    r"context[_ ]length|context window|max_model_len|maximum model length|exceeds? the maximum number of tokens"
    r"|(input|prompt) is too long|too many (input )?tokens",
    re.IGNORECASE,
)
_CONTENT_FILTER = re.compile(r"content[_ ](filter|policy|management)|moderation|safety system|flagged", re.IGNORECASE)
_RESPONSE_FORMAT = re.compile(r"response_format|json_schema|structured output|guided|grammar", re.IGNORECASE)
_BAD_KEY = re.compile(r"API[ _]key (not valid|not found|expired)|API_KEY_INVALID|invalid api key", re.IGNORECASE)
_NO_MONEY = re.compile(r"insufficient_quota|insufficient (balance|credit|funds)|billing", re.IGNORECASE)
_RETRY_DELAY = re.compile(r'"retryDelay":\s*"([\d.]+)s"')


class Usage(BaseModel):
    """Tokens that were billed; completion tokens include the thinking tokens."""

    model_config = ConfigDict(frozen=True)

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    thinking_tokens: int = 0

    def __add__(self, other: Self) -> Self:
        return type(self)(
            requests=self.requests + other.requests,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            thinking_tokens=self.thinking_tokens + other.thinking_tokens,
        )

    def cost(self, config: EndpointConfig) -> float:
        """Return what this usage costs at the prices of `config`, in US$."""
        prompt = self.prompt_tokens * config.prompt_price
        return (prompt + self.completion_tokens * config.completion_price) / 1e6


@dataclass(frozen=True, slots=True)
class Choice:
    """One completion: its text, why it ended ("stop", "length", "content_filter", ...), and its tokens if told."""

    text: str
    finish_reason: str
    token_ids: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The completions of one request, in the order of the endpoint's indices."""

    choices: list[Choice]
    usage: Usage
    model: str
    prompt_token_ids: list[int] | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that the endpoint serves; `root` is its weights' path, `parent` the base model of a LoRA adapter."""

    id: str
    max_model_len: int | None = None
    root: str | None = None
    parent: str | None = None


class RequestRefused(Exception):
    """The endpoint refuses this one request for good; others may pass.

    `reason` is one of context_length, content_filter, too_large, not_found, response_format, max_tokens_name,
    keeps_failing, bad_request; `text` is what the server said, shortened.
    """

    def __init__(self, status: int, reason: str, text: str) -> None:
        super().__init__(status, reason, text)
        self.status = status
        self.reason = reason
        self.text = text

    def __str__(self) -> str:
        return f"refused ({self.status}, {self.reason}): {self.text}"


class KeyRefused(PreflowError):
    """The endpoint does not accept the key, or its account has no money left."""


class EndpointDown(PreflowError):
    """The endpoint did not answer for longer than `max_outage_seconds`."""


class Transient(Exception):
    """An attempt failed in a way that another one may not: the endpoint is down, busy or broke off.

    `status` is 0 without a response; `retry_after` is in seconds; `maybe_billed` says that the work may have been done
    although its result did not arrive.
    """

    def __init__(
        self, text: str, *, status: int = 0, retry_after: float | None = None, maybe_billed: bool = False
    ) -> None:
        super().__init__(text)
        self.status = status
        self.retry_after = retry_after
        self.maybe_billed = maybe_billed

    @property
    def throttled(self) -> bool:
        """Whether the endpoint said that it gets too many requests."""
        return self.status in THROTTLES


def read_answer(body: bytes, prompt_bytes: int) -> Answer:
    """Return the answer in a chat completion's JSON; usage the server does not report is estimated at 4 bytes a token.

    Raises `Transient` for a body that is not a chat completion.
    """
    try:
        data = json.loads(body)
        choices = [
            Choice(
                text=item["message"].get("content") or "",
                finish_reason=item.get("finish_reason") or "unknown",
                token_ids=item.get("token_ids"),
            )
            for item in sorted(data["choices"], key=lambda item: item.get("index") or 0)
        ]
        usage = _read_usage(data.get("usage"), prompt_bytes, sum(len(choice.text) for choice in choices))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        text = shorten(body.decode(errors="replace"), 80)
        raise Transient(f"the answer is not a chat completion: {text}", status=200, maybe_billed=True) from error
    if not choices:
        raise Transient("the answer holds no choices", status=200, maybe_billed=True)
    return Answer(choices, usage, str(data.get("model") or ""), data.get("prompt_token_ids"))


def _read_usage(data: Mapping[str, Any] | None, prompt_bytes: int, completion_length: int) -> Usage:
    if not data:
        return Usage(requests=1, prompt_tokens=prompt_bytes // 4 + 1, completion_tokens=completion_length // 4 + 1)
    prompt = int(data.get("prompt_tokens") or 0)
    completion = int(data.get("completion_tokens") or 0)
    thinking = int((data.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0)
    # OpenAI counts thinking among the completion tokens; Gemini leaves it out of them and shows it in the total only.
    hidden = max(0, int(data.get("total_tokens") or 0) - prompt - completion)
    return Usage(
        requests=1,
        prompt_tokens=prompt,
        completion_tokens=completion + hidden,
        thinking_tokens=max(thinking, hidden),
    )


def shorten(text: str, limit: int = 300) -> str:
    """Return `text` on one line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def server_text(response: httpx2.Response, hide: str | None) -> str:
    """Return the message in an error response, in whichever of the usual places it is, shortened, without the key."""
    text = response.text.replace(hide, "***") if hide else response.text
    try:
        data = json.loads(text)
    except ValueError:
        return shorten(text) or response.reason_phrase
    if isinstance(data, list) and data:  # Gemini wraps its errors in a list
        data = data[0]
    if isinstance(data, dict):
        error = data.get("error") or data.get("detail") or data.get("message") or data
        data = error.get("message") or error if isinstance(error, dict) else error
    return shorten(data if isinstance(data, str) else json.dumps(data))


def classify(response: httpx2.Response, hide: str | None) -> Transient | RequestRefused | KeyRefused:
    """Return what an error response means: try again, this request is refused, or the key is.

    A `KeyRefused` carries only the server's words; the endpoint adds which key and what to do. `hide` is the key, which
    some servers repeat in their message.
    """
    status, text = response.status_code, server_text(response, hide)
    if status in (401, 402) or (status == 400 and _BAD_KEY.search(text)):
        return KeyRefused(text)
    if status == 403 and not _CONTENT_FILTER.search(text):
        return KeyRefused(text)
    if status == 429 and _NO_MONEY.search(response.text):
        return KeyRefused(text)
    if status in RETRIED or status >= 500:
        waits = _retry_after(response)
        return Transient(f"{status}: {text}", status=status, retry_after=waits, maybe_billed=status in (408, 504))
    return RequestRefused(status, _reason(status, response.text), text)


def _reason(status: int, text: str) -> str:
    if _CONTEXT_LENGTH.search(text):
        return "context_length"
    if "max_completion_tokens" in text:
        return "max_tokens_name"
    if _CONTENT_FILTER.search(text):
        return "content_filter"
    if status == 413:
        return "too_large"
    if status == 404:
        return "not_found"
    return "response_format" if _RESPONSE_FORMAT.search(text) else "bad_request"


def _retry_after(response: httpx2.Response) -> float | None:
    """Return the seconds the server asks to wait: header in ms, seconds or as a date, or Google's RetryInfo."""
    in_body = _RETRY_DELAY.search(response.text)
    header = response.headers.get("retry-after", "")
    if in_ms := _seconds(response.headers.get("retry-after-ms", "")):
        return in_ms / 1000
    if (in_seconds := _seconds(header)) is not None:
        return in_seconds
    if header:
        try:
            return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
        except ValueError:
            return None
    return _seconds(in_body.group(1)) if in_body else None


def _seconds(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d*)?", text.strip()) else None
