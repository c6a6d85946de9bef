"""What an OpenAI-compatible endpoint sends back: answers, token usage, and errors told apart by what helps.

    StageStopped     no request of the stage can be answered now
        KeyRefused       another key
        CreditUsedUp     money
        QuotaUsedUp      tomorrow
        EndpointDown     later
    RequestRefused   this request will never be answered; others may
    Transient        another attempt may be answered

Errors are classified by their structured fields (status, error.code, error.type, quotaId, RetryInfo) first, and by
their words where there are none: providers word them alike for causes that have nothing in common.
"""

import json
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from tasks.config import EndpointConfig
from tasks.errors import PreflowError
from tasks.store.forms import finish_name
from tasks.store.refs import Cost

# 409 is sent by some gateways for a lock conflict, 424 by TGI and Azure for a model that failed, 499 by Google for a
# request that it cancelled, 529 for an overload.
RETRIED = frozenset({408, 409, 424, 425, 429, 499})
THROTTLES = frozenset({429, 503, 529})
# Such refusals depend on the row alone: at the next start they would be the same.
PERMANENT = frozenset({"context_length", "content_filter", "too_large"})

_RATE_CODES = frozenset(
    {"rate_limit_exceeded", "rate_limit_error", "rate_limited", "resource_exhausted", "too_many_requests", "throttling",
     "throttlingexception"}
)  # fmt: skip
_CREDIT_CODES = frozenset(
    {"insufficient_quota", "insufficient_balance", "insufficient_credits", "billing_error", "billing_not_active",
     "billing_hard_limit_reached", "arrearage", "payment_required"}
)  # fmt: skip
_KEY_CODES = frozenset({"invalid_api_key", "api_key_invalid", "authentication_error", "unauthenticated"})
_FILTER_CODES = frozenset(
    {"content_filter", "responsibleaipolicyviolation", "content_policy_violation", "data_inspection_failed",
     "datainspectionfailed", "prohibited_content"}
)  # fmt: skip
# The names of fields that say what kind of error it is, wherever they stand; and those that have its words.
_CODE_FIELDS = frozenset({"code", "type", "__type", "status", "reason", "quotaid", "error_type"})
_STATUS_FIELDS = ("code", "status", "status_code", "statusCode")
_WORD_FIELDS = (
    "message", "msg", "detail", "error", "errors", "error_msg", "error_message", "status_msg", "base_resp", "title",
)  # fmt: skip
# An error inside a 200 that has no status of its own has that of its code.
_STATUS_OF = {
    "invalid_request_error": 400, "invalid_argument": 400, "bad_request": 400, "badrequesterror": 400,
    "unsupported_parameter": 400, "unsupported_value": 400, "permission_denied": 403, "permission_error": 403,
    "not_found": 404, "not_found_error": 404, "model_not_found": 404,
}  # fmt: skip


def _words(*alternatives: str) -> re.Pattern[str]:
    return re.compile("|".join(alternatives), re.IGNORECASE)


_RATE = _words(r"rate.?limit", r"too many requests", r"throttl")
_CREDIT = _words(
    r"credit balance", r"insufficient[_ ](balance|credits?|funds|quota)", r"(out of|not enough|no|more) credits",
    r"payment required", r"spend(ing)? (limit|cap)", r"overdue payment", r"arrear", r"余额不足",
    r"reached your ([\w ]{0,30})?usage limits?",
)  # fmt: skip
_PERIOD = _words(r"per(second|minute|hour|day)")
_PER_DAY = _words(
    r"per[-_ ]?(day|week|month)", r"(daily|weekly|monthly) ([a-z]+ )?(limit|quota|allowance)", r"\b(rpd|tpd)\b"
)
_BAD_KEY = _words(r"api[ _]key (not valid|not found|expired)", r"(invalid|incorrect) api[ _]key", r"login fail")
# Not what was asked for next to a prompt, but a limit of its own.
_OVER_A_LIMIT = _words(
    r"(?<!\+ )(?<!\+ `)max[_ ]?(new_|completion_|output_)?tokens[`'\"]? must be (<|less than|at most)"
)
_CONTEXT_LENGTH = _words(
    r"context[_ -]?(length|window|size|limit)", r"max_model_len", r"maximum model length", r"max_new_tokens",
    r"exceeds? the (maximum number of|configured limit of \d+) tokens", r"(input|prompt) is too long",
    r"too many (input )?tokens", r"input (token count|length)", r"reduce the length",
    r"(?<!max[_ ])(?<!output[_ ])(?<!completion[_ ])\btokens?[_ ]limit",
    r"string[_ ](is )?(too[_ ]long|above[_ ]max)", r"prompt (exceeds|contains \d+ tokens)", r"max message tokens",
)  # fmt: skip
_CONTENT_FILTER = _words(
    r"content[_ ](filter|policy|management|exists risk)", r"moderation", r"safety (system|filter|setting)", r"flagged",
    r"(inappropriate|prohibited|sensitive|unsafe)[_ ]content", r"usage polic", r"data[_ ]?inspection", r"敏感内容",
)  # fmt: skip
# OpenRouter's, where the model is known and none of its providers takes what was asked for.
_NO_ROUTE = _words(r"no endpoints found that (can handle|support)")
_CUT = _words(r"max_tokens or model output limit was reached")
# Such a request has more tokens than a minute may have: it will never pass.
_OVER_A_MINUTE = re.compile(r"limit:? ([\d,]+), requested:? ([\d,]+)", re.IGNORECASE)
_FILTERED = _words(
    r"content_?filter", r"safety", r"recitation", r"prohibited", r"block", r"spii", r"sensitive", r"refus", r"toxic"
)
_TIME = r"(\d+(?:\.\d+)?) ?(h|milli|ms|m|s)(?:ours?|ins?|inutes?|ecs?|econds?|seconds?)?(?![a-z])"
_WAIT = re.compile(rf"(?:again|retry|wait)(?: in| after| for)? ((?:{_TIME}(?: and |, | )?)+)", re.IGNORECASE)
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "milli": 0.001}

# Where a message has the thinking, which is no part of its text.
_THOUGHTS = ("reasoning_content", "reasoning", "reasoning_details", "thinking")
_MARKUP = re.compile(r"<(style|script)\b.*?</\1>|<[^>]*>", re.DOTALL | re.IGNORECASE)
LONGEST_PAGE, LONGEST_TEXT = 20_000, 2_000

# What a token costs through the batch APIs of OpenAI and Google (2026-11), as a share of its price.
BATCH_PRICE = 0.5


def usd_of(cost: Cost, config: EndpointConfig) -> float:
    """Return the US$ that a cost's tokens take at the prices of `config`, and half of them in a batch."""
    prompt = cost.prompt_tokens - (1 - BATCH_PRICE) * cost.batch_prompt_tokens
    completion = cost.completion_tokens - (1 - BATCH_PRICE) * cost.batch_completion_tokens
    return (prompt * config.prompt_price + completion * config.completion_price) / 1e6


def price(cost: Cost, config: EndpointConfig) -> Cost:
    """Return a cost with its US$ (`usd_of`)."""
    return cost.model_copy(update={"usd": usd_of(cost, config)})


def as_batch(cost: Cost) -> Cost:
    """Return a cost with all of its tokens marked as those of a batch."""
    tokens = {"batch_prompt_tokens": cost.prompt_tokens, "batch_completion_tokens": cost.completion_tokens}
    return cost.model_copy(update=tokens)


@dataclass(frozen=True, slots=True)
class Choice:
    """One completion: its text, why it ended ("stop", "length", ...), why it is empty, its tokens if they are told."""

    text: str
    finish_reason: str
    note: str = ""
    token_ids: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The completions of one request, in the order of the endpoint's indices; `refused` names settings not heeded."""

    choices: list[Choice]
    usage: Cost
    model: str
    prompt_token_ids: list[int] | None = None
    refused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that the endpoint serves; `root` is its weights' path, `parent` the base model of a LoRA adapter."""

    id: str
    max_model_len: int | None = None
    root: str | None = None
    parent: str | None = None


class RequestRefused(Exception):
    """The endpoint refuses this one request for good; others may pass.

    `reason` is one of context_length, content_filter, too_large, over_a_minute, not_found, moved, cut, keeps_failing,
    bad_request; `text` is what the server said, `param` the setting that it names in a field of its own, and
    `usage` what was billed all the same.
    """

    def __init__(self, status: int, reason: str, text: str, param: str = "", usage: Cost | None = None) -> None:
        super().__init__(status, reason, text, param, usage)
        self.status, self.reason, self.text, self.param, self.usage = status, reason, text, param, usage or Cost()

    def __str__(self) -> str:
        return f"refused ({self.status}, {self.reason}): {shorten(self.text)}"


class StageStopped(PreflowError):
    """No request of the stage can be answered now; what was answered is kept."""


class KeyRefused(StageStopped):
    """The endpoint does not accept the key."""


class NotPermitted(KeyRefused):
    """The key is known, and may not do this."""


class CreditUsedUp(KeyRefused):
    """The key's account has no money left."""


class QuotaUsedUp(StageStopped):
    """What the account may ask for in a day is used up."""


class EndpointDown(StageStopped):
    """The endpoint did not answer for longer than `max_outage_seconds`."""


class Transient(Exception):
    """An attempt failed in a way that another one may not: the endpoint is down, busy or broke off.

    `odd` marks a whole answer of no use: it is paid for, and only a few more of the kind are asked for.
    """

    def __init__(
        self,
        text: str,
        status: int = 0,
        retry_after: float | None = None,
        maybe_billed: bool = False,
        odd: bool = False,
    ) -> None:
        super().__init__(text)
        self.status, self.retry_after, self.maybe_billed, self.odd = status, retry_after, maybe_billed, odd

    @property
    def throttled(self) -> bool:
        """Whether the endpoint said that it gets too many requests."""
        return self.status in THROTTLES


Failure = Transient | RequestRefused | StageStopped


# ---- answers


def read_answer(body: bytes, prompt_bytes: int) -> Answer:
    """Return the answer in a chat completion's JSON; usage the server does not report is estimated at 4 bytes a token.

    Raises what `classify` returns for an error inside, and `Transient` for a body that is not a chat completion.
    """
    streams = body.lstrip().startswith(b"data:")
    data = _parse(body.lstrip()[5:].split(b"\n")[0] if streams else body)
    data = data[0] if isinstance(data, list) and data else data
    items = data.get("choices") if isinstance(data, dict) else None
    if isinstance(data, dict) and not items and (data.get("error") or _message(data)):
        raise classify_error(ServerError.of(200, {}, data))
    items = items if isinstance(items, list) and not streams else []
    if not items or not all(map(_is_choice, items)):
        what = "a stream, which was not asked for" if streams else "not a chat completion"
        text, odd = shorten(body.decode(errors="replace"), 80), streams or not isinstance(data, str)
        raise Transient(f"the answer is {what}: {text}", status=200, maybe_billed=True, odd=odd)
    items = sorted(items, key=lambda item: item["index"] if isinstance(item.get("index"), int) else 0)
    try:
        choices = [_read_choice(item) for item in items]
    except RequestRefused as refused:  # what was written before the error is billed
        refused.usage = _read_usage(data["usage"], prompt_bytes, 0) if data.get("usage") else refused.usage
        raise
    thoughts = (item["message"].get(name) for item in items for name in _THOUGHTS)
    written = [*(choice.text for choice in choices), *(text for text in thoughts if isinstance(text, str))]
    usage = _read_usage(data.get("usage"), prompt_bytes, sum(map(len, written)))
    return Answer(choices, usage, str(data.get("model") or ""), _read_ids(data.get("prompt_token_ids")))


def _parse(content: bytes) -> Any:
    """Return what JSON holds, or as a text what is none; of a page its words."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        text = content.decode(errors="replace")
        is_page = text.lstrip().startswith("<")
        return _MARKUP.sub(" ", text[:LONGEST_PAGE]) if is_page else text


def _read_ids(value: Any) -> list[int] | None:
    """Return token ids as vLLM gives them; None for what is no such list."""
    is_list = isinstance(value, list) and all(isinstance(number, int) for number in value)
    return value if is_list else None


def _is_choice(item: Any) -> bool:
    return isinstance(item, dict) and (isinstance(item.get("message"), dict) or bool(item.get("error")))


def _read_choice(item: Mapping[str, Any]) -> Choice:
    finish, error = finish_name(item.get("finish_reason")), item.get("error")
    if finish == "error" or error:
        failure = classify_error(ServerError.of(200, {}, {"error": error or "the provider broke off"}))
        if isinstance(failure, Transient):
            failure.maybe_billed = True
        raise failure
    message = item["message"]
    text, refusal, thinks = _read_content(message.get("content"))
    refusal, note = message.get("refusal") or refusal, ""
    if _FILTERED.search(finish):
        finish, note = "content_filter", "" if text else f"withheld by the provider's filter ({finish})"
    elif not text.strip() and isinstance(refusal, str) and refusal:
        text, finish, note = "", "content_filter", f"the model refused: {shorten(refusal, 200)}"
    elif not text.strip() and (thinks or any(map(message.get, _THOUGHTS))):
        text = ""
        note = "the model only thought and wrote no answer: raise max_tokens, or have it think less (reasoning_effort)"
    elif not text.strip():
        note = f"the model wrote nothing (finish_reason {finish})"
    return Choice(text, finish, note, _read_ids(item.get("token_ids")))


def _read_content(content: Any) -> tuple[str, str, bool]:
    """Return what is text and what a refusal in a message's content, a text or parts, and whether it has thinking."""
    texts, refusals, thinks = list[Any](), list[Any](), False
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and (part.get("type") or "text") in ("text", "output_text"):
            texts.append(part.get("text"))
        elif isinstance(part, dict):
            refusals.append(part.get("refusal"))
            thinks = True
    text, refusal = ("".join(part for part in parts if isinstance(part, str)) for parts in (texts, refusals))
    return text, refusal, thinks


def _read_usage(data: Any, prompt_bytes: int, written: int) -> Cost:
    """Return the usage; a count that is missing, that is no count, or 0 where there is text is estimated."""
    data = data if isinstance(data, dict) else {}
    names = ("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"), ("total_tokens",)
    found = ([count for name in named if (count := _count(data.get(name))) is not None] for named in names)
    prompt, completion, total = (counts[0] if counts else None for counts in found)
    details = data.get("completion_tokens_details")
    thinking = _count(details.get("reasoning_tokens")) if isinstance(details, dict) else None
    # OpenAI counts thinking among the completion tokens; Gemini leaves it out of them and shows it in the total only.
    hidden = max(0, (total or 0) - prompt - completion) if prompt and completion is not None else 0
    used = None if completion is None else completion + hidden
    completion = written // 4 + 1 if used is None or (written and not used) else used
    return Cost(
        requests=1,
        prompt_tokens=prompt or prompt_bytes // 4 + 1,
        completion_tokens=completion,
        thinking_tokens=min(completion, max(thinking or 0, hidden)),
    )


def _count(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 <= value < 1e9 else None  # NaN is in no range


# ---- errors


def shorten(text: str, limit: int = 300) -> str:
    """Return `text` on one line of at most `limit` characters, all of which UTF-8 can hold."""
    line = " ".join(text.encode(errors="replace").decode().split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


@dataclass(frozen=True)
class ServerError:
    """An error as the server told it: the status that counts, its words, its codes in lower case, the wait it asks."""

    status: int
    text: str
    codes: frozenset[str]
    param: str
    wait: float | None
    resets_at: float | None

    @classmethod
    def of(cls, status: int, headers: Mapping[str, str], data: Any) -> Self:
        """Read a parsed body, or a text that is none."""
        if isinstance(data, list) and data:  # Gemini wraps its errors in a list
            data = data[0]
        error = data.get("error") or data if isinstance(data, dict) else data
        fields = list(_walk(data))
        codes = frozenset(str(value).lower() for name, value in fields if name.lower() in _CODE_FIELDS)
        text = shorten(_message(error) or _message(data), LONGEST_TEXT).rstrip(".")
        if status < 400:  # gateways put the upstream's status into the body
            status = _status_inside((error, data), codes, text)
        param = next((value for name, value in fields if name == "param" and isinstance(value, str)), "")
        return cls(status, text, codes, param, _wait(headers, fields, text), _epoch(headers, fields))


def _status_inside(parts: tuple[Any, Any], codes: frozenset[str], text: str) -> int:
    """Return the status of an error inside a 200: by its number, its code or its words; of none it is the server's."""
    for part in parts:
        for name in _STATUS_FIELDS if isinstance(part, dict) else ():
            if 400 <= (number := _number(part.get(name)) or 0) < 600:
                return int(number)
    told = [_STATUS_OF[code] for code in codes if code in _STATUS_OF]
    told += [status for status, words in ((402, _CREDIT), (401, _BAD_KEY), (429, _RATE)) if words.search(text)]
    return max(told, default=502)


def _walk(data: Any) -> Iterator[tuple[str, Any]]:
    """Yield the named plain values of an error, wherever they stand."""
    waiting = deque([("", data)])
    while waiting:
        name, value = waiting.popleft()
        if isinstance(value, dict):
            waiting.extend((str(name), inner) for name, inner in value.items())
        elif isinstance(value, list):
            waiting.extend(("", inner) for inner in value)
        else:
            yield name, value


def _message(data: Any) -> str:
    """Return an error's words: never the input, which servers repeat and which may hold any words."""
    if isinstance(data, str):
        return data
    if isinstance(data, list):
        return "; ".join(filter(None, map(_message, data[:5])))
    if not isinstance(data, dict):
        return ""
    where = ".".join(map(str, data["loc"])) if isinstance(data.get("loc"), list) else ""
    words = next((found for name in _WORD_FIELDS if (found := _message(data.get(name)))), "")
    raw = _message((data.get("metadata") or {}).get("raw")) if isinstance(data.get("metadata"), dict) else ""
    return " ".join(filter(None, (where, words, raw)))


def classify(status: int, headers: Mapping[str, str], content: bytes) -> Failure:
    """Return what a response of 400 or above means."""
    return classify_error(ServerError.of(status, headers, _parse(content)))


def classify_error(error: ServerError) -> Failure:
    """Return what an error means: the stage stops, this request is refused, or it is tried again."""
    codes, status, words = error.codes, error.status, error.text or f"status {error.status}"
    text = shorten(words)
    per_day = any("perday" in code for code in codes)
    structured = error.wait is not None or codes & _RATE_CODES or any(map(_PERIOD.search, codes))
    if codes & _CREDIT_CODES or status == 402 or (status < 500 and _CREDIT.search(words) and not structured):
        return CreditUsedUp(text)
    rated = status == 429 or codes & _RATE_CODES or (status == 403 and _RATE.search(words))
    if rated and (per_day or (_PER_DAY.search(words) and error.wait is None)):
        return QuotaUsedUp(f"{text}; it resets {_reset(error, google=per_day)}")
    if status == 401 or codes & _KEY_CODES or (status == 400 and _BAD_KEY.search(words)):
        return KeyRefused(text)
    reason = _reason(error)
    if reason == "over_a_minute":
        return RequestRefused(status, reason, words, error.param)
    if rated:
        return Transient(f"{status}: {text}", status=429, retry_after=error.wait)
    if status == 403 and reason != "content_filter":
        return NotPermitted(text)
    if status in RETRIED or (status >= 500 and reason not in ("context_length", "content_filter")):
        billed = status in (408, 504)
        return Transient(f"{status}: {text}", status=status, retry_after=error.wait, maybe_billed=billed)
    return RequestRefused(status, reason, words, error.param)


def _reason(error: ServerError) -> str:
    text = f"{error.text} {' '.join(error.codes)}"
    if _CUT.search(text):
        return "cut"
    if (told := _OVER_A_MINUTE.search(text)) and int(told[2].replace(",", "")) > int(told[1].replace(",", "")):
        return "over_a_minute"
    if error.codes & _FILTER_CODES or _CONTENT_FILTER.search(text):
        return "content_filter"
    if _CONTEXT_LENGTH.search(text) and not _OVER_A_LIMIT.search(text):
        return "context_length"
    if error.status == 404 and _NO_ROUTE.search(text):
        return "bad_request"
    return {413: "too_large", 404: "not_found"}.get(error.status, "bad_request")


def _reset(error: ServerError, google: bool) -> str:
    """Say when a quota of a day or more is there again."""
    if error.resets_at is not None:
        return f"at {datetime.fromtimestamp(error.resets_at, UTC):%Y-%m-%d %H:%M} UTC"
    if not google:
        return "after a day or more (the endpoint does not say when)"
    try:
        tomorrow = datetime.now(ZoneInfo("America/Los_Angeles")) + timedelta(days=1)
    except ZoneInfoNotFoundError:
        return "at midnight Pacific time"
    midnight = tomorrow.replace(hour=0, minute=0, second=0, microsecond=0).astimezone(UTC)
    return f"at midnight Pacific time, {midnight:%Y-%m-%d %H:%M} UTC"


def _wait(headers: Mapping[str, str], fields: list[tuple[str, Any]], text: str) -> float | None:
    """Return the seconds the server asks to wait: a header (ms, seconds or a date), Google's RetryInfo, or words."""
    if (in_ms := _number(headers.get("retry-after-ms"))) is not None:
        return in_ms / 1000
    if header := headers.get("retry-after", ""):
        if (in_seconds := _number(header)) is not None:
            return in_seconds
        try:
            return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
        except ValueError:
            return None
    delays = [str(value) for name, value in fields if name == "retryDelay"]
    told = _WAIT.search(text)
    parts = re.findall(_TIME, delays[0] if delays else told[1] if told else "", re.IGNORECASE)
    return sum(float(number) * _UNITS[unit.lower()] for number, unit in parts) if parts else None


def _epoch(headers: Mapping[str, str], fields: list[tuple[str, Any]]) -> float | None:
    """Return the moment that an X-RateLimit-Reset names, in seconds since 1970 (OpenRouter: in ms, in the body too)."""
    inside = next((value for name, value in fields if name.lower() == "x-ratelimit-reset"), None)
    moment = _number(headers.get("x-ratelimit-reset") or inside)
    if moment is not None and moment > 1e11:
        moment /= 1000
    return moment if moment is not None and 1e9 <= moment < 1e11 else None


def _number(value: Any) -> float | None:
    text = "" if isinstance(value, bool) else str(value).strip()
    return float(text) if re.fullmatch(r"\d{1,15}(\.\d*)?", text) else None
