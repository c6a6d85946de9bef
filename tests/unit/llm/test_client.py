"""The client's parts that need no server: limits, reading of answers and errors."""

import asyncio
import json
import pickle
import re
import time
from email.utils import formatdate
from typing import Any

import pytest

from tasks.config import EndpointConfig
from tasks.llm.limits import Budget, BudgetExceeded, Gate, Window
from tasks.llm.responses import (
    CreditUsedUp,
    KeyRefused,
    NotPermitted,
    QuotaUsedUp,
    RequestRefused,
    Transient,
    classify,
    price,
    read_answer,
)
from tasks.store.workspace import Cost

# ---- the window


async def most_in(window: Window) -> int:
    """Return how many of many requests were in flight together."""
    flying: list[int] = []

    async def work() -> None:
        async with window:
            flying.append((flying[-1] if flying else 0) + 1)
            await asyncio.sleep(0.001)
            flying.append(flying[-1] - 1)

    await asyncio.gather(*(work() for _ in range(60)))
    return max(flying)


async def test_window_halves_once_for_requests_in_flight_together_and_grows_by_one_for_a_window_of_successes() -> None:
    window, sent_at = Window(16), time.monotonic()
    async with asyncio.timeout(60):
        holders = [asyncio.ensure_future(hold(window)) for _ in range(16)]
        await asyncio.sleep(0)
        for _ in range(10):
            window.throttled(sent_at)
        await asyncio.gather(*holders)
        assert await most_in(window) == window.size == 8
        for successes, size in ((9, 9), (1000, 16)):
            for _ in range(successes):
                window.succeeded()
            assert await most_in(window) == window.size == size
        for _ in range(20):
            window.throttled(time.monotonic())
        assert window.size == 1
        window.succeeded()
        assert await most_in(window) == window.size == 2
        idle = Window(16)
        async with idle:
            idle.throttled(time.monotonic())
            assert await most_in(idle) == 7, "places that nobody has go at once"


async def hold(window: Window) -> None:
    async with window:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("handed_over", [False, True], ids=["while it waits", "as it gets its place"])
async def test_a_cancelled_waiter_takes_no_place(handed_over: bool) -> None:
    window = Window(1)
    async with window:
        waiter = asyncio.ensure_future(hold(window))
        await asyncio.sleep(0)
        if not handed_over:
            waiter.cancel()
            await asyncio.sleep(0)
    waiter.cancel()  # the place has been handed over, but the waiter has not run yet
    await asyncio.gather(waiter, return_exceptions=True)
    assert waiter.cancelled()
    async with asyncio.timeout(60):
        assert await most_in(window) == 1


# ---- caps per period


class FastClock(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer instead of waiting for it."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now + 1e-4, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def run(gate: Gate, expected: list[int], used: int | None = None) -> list[float]:
    """Return the seconds at which a gate lets requests of so many tokens out, of which each uses so many in the end."""
    times: list[float] = []

    async def request(tokens: int) -> None:
        counted = await gate.admit(tokens)
        times.append(asyncio.get_running_loop().time())
        gate.settle(counted, tokens if used is None else used)

    async def all_requests() -> None:
        await asyncio.gather(*map(request, expected))

    with asyncio.Runner(loop_factory=FastClock) as runner:
        runner.run(all_requests())
    return times


@pytest.mark.parametrize("limit", [5, 60, 1000])
def test_no_minute_holds_more_requests_than_the_cap(limit: int) -> None:
    times = run(Gate(limit, None, on_pause=lambda: None), [1] * (3 * limit))
    assert all(later - earlier >= 60 for earlier, later in zip(times, times[limit:], strict=False))
    assert times[-1] - times[0] < 190


def test_tokens_are_estimated_before_and_corrected_after() -> None:
    """What is set aside for a request follows the others' mean, and what it used more or less is made up for."""
    first, *times = run(Gate(None, 1000, on_pause=lambda: None), [1000] * 21, used=100)
    assert first > 55, "nothing is known before: the most it may be"
    assert 110 < times[-1] - times[0] < 130, "without correction they would take 20 minutes"


def test_a_request_larger_than_the_cap_waits_its_time_and_not_for_ever() -> None:
    (out,) = run(Gate(None, 100, on_pause=lambda: None), [150])
    assert 80 < out < 100


async def test_a_pause_holds_all_requests() -> None:
    said: list[float] = []
    gate = Gate(None, None, on_pause=lambda: said.append(time.monotonic()))
    gate.pause(0.05)
    gate.pause(0.01)  # a shorter wish does not shorten the pause
    start = time.monotonic()
    await asyncio.gather(*(gate.admit(1) for _ in range(10)))
    assert time.monotonic() - start >= 0.049
    assert said


# ---- the budget


async def test_the_budget_waits_for_what_is_set_aside_and_refuses_what_could_go_beyond_it() -> None:
    budget = Budget(1.0)
    for _ in range(1000):  # reservations leave nothing behind
        await budget.reserve(0.1)
        await budget.reserve(0.9)
        budget.settle(0.1, 0.0)
        budget.settle(0.9, 0.0)
    await budget.reserve(0.6)
    waiting = asyncio.ensure_future(budget.reserve(0.6))
    await asyncio.sleep(0)
    assert not waiting.done()
    budget.settle(0.6, 0.1)
    await waiting
    budget.settle(0.6, 0.6)
    with pytest.raises(BudgetExceeded, match=r"0\.7 is spent.*make 1\.1\..*raise budget_usd"):
        await budget.reserve(0.4)
    await budget.reserve(0.3)
    assert budget.spent == pytest.approx(0.7)


async def test_a_lost_answer_counts_as_much_as_the_others_on_average() -> None:
    budget = Budget(None)
    for cost, spent in ((None, 0.5), (0.1, 0.2), (0.3, 0.6)):  # at first nothing else is known
        budget.settle(0.5, cost)
        assert budget.spent == pytest.approx(spent)


def test_usage_adds_up_and_costs_per_million() -> None:
    config = EndpointConfig(prompt_price=0.3, completion_price=2.5)
    usage = Cost(requests=1, prompt_tokens=1_000_000, completion_tokens=400_000, thinking_tokens=100_000)
    assert ((usage + usage).requests, (usage + usage).thinking_tokens) == (2, 200_000)
    assert price(usage, config).usd == pytest.approx(0.3 + 1.0)


# ---- answers


def completion(usage: Any = None, finish: Any = "stop", **message: Any) -> bytes:
    choice = {
        "index": None,
        "message": {"role": "assistant", "content": "abcdefgh", **message},
        "finish_reason": finish,
    }
    return json.dumps({"model": "m", "choices": [choice], "usage": usage}).encode()


SEVEN = {"prompt_tokens": 7, "completion_tokens": 5}


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({**SEVEN, "total_tokens": 12, "completion_tokens_details": {"reasoning_tokens": 4}}, (7, 5, 4)),
        ({**SEVEN, "total_tokens": 112}, (7, 105, 100)),  # Gemini hides thinking
        ({"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 57}, (7, 50, 50)),
        ({**SEVEN, "completion_tokens_details": {"reasoning_tokens": -9}}, (7, 5, 0)),
        ({"input_tokens": 7, "output_tokens": 5, "completion_tokens_details": None}, (7, 5, 0)),
        # What is no count is estimated, of 40 and 8 bytes.
        ({"prompt_tokens": 11, "completion_tokens": -35, "total_tokens": -24}, (11, 3, 0)),
        ({"prompt_tokens": "many", "completion_tokens": 5}, (11, 5, 0)),
        ({"prompt_tokens": 7, "completion_tokens": float("inf")}, (7, 3, 0)),
        ({"prompt_tokens": True, "completion_tokens": [5]}, (11, 3, 0)),
        ({"prompt_tokens": 10**400, "completion_tokens": float("nan")}, (11, 3, 0)),
        ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, (11, 3, 0)),
        *((odd, (11, 3, 0)) for odd in (None, [7, 5], "12")),
    ],
)
def test_usage_as_endpoints_report_it(usage: Any, expected: tuple[int, int, int]) -> None:
    found = read_answer(completion(usage), prompt_bytes=40).usage
    assert (found.requests, found.prompt_tokens, found.completion_tokens, found.thinking_tokens) == (1, *expected)
    if usage is None:  # thinking is estimated, too
        thought = read_answer(completion(reasoning_content="x" * 400), prompt_bytes=40).usage
        assert thought.completion_tokens == 103


def test_choices_are_put_in_the_order_of_their_indices() -> None:
    choices = [
        {"index": index, "message": {"content": text}, "finish_reason": reason}
        for index, text, reason in [(2, None, "content_filter"), (0, "a", "stop"), (1, "b", "length")]
    ]
    answer = read_answer(json.dumps({"choices": choices}).encode(), prompt_bytes=1)
    found = [(choice.text, choice.finish_reason) for choice in answer.choices]
    assert found == [("a", "stop"), ("b", "length"), ("", "content_filter")]


@pytest.mark.parametrize(
    ("body", "odd"),
    [*((body, False) for body in (b"", b"{", b"<html>", b"\xff\xfe", b"[" * 100_000)),
     *((body, True) for body in (b"[]", b"null", b'{"choices": []}', b'{"choices": null}', b'{"choices": [1]}',
                                 b'{"choices": [{"message": null}]}', b"data:",
                                 b'data: {"choices": [{"delta": {"content": "x"}}]}\n\ndata: [DONE]\n'))],
)  # fmt: skip
def test_what_is_no_chat_completion_is_asked_for_again_and_a_whole_one_a_few_times_only(body: bytes, odd: bool) -> None:
    with pytest.raises(Transient, match="a stream, which was not" if body[:1] == b"d" else "chat completion") as caught:
        read_answer(body, prompt_bytes=1)
    assert (caught.value.maybe_billed, caught.value.odd) == (True, odd)


THOUGHT = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": [*THOUGHT, {"type": "text", "text": "one"}, {"type": "text", "text": " two"}]}, "one two"),
        ({"content": ["one", {"text": " two"}, {"type": "image_url", "image_url": {}}, 7, None]}, "one two"),
        ({"content": [{"type": "text", "text": None}, {"type": None, "text": "x"}]}, "x"),
        ({"content": {"type": "text", "text": "x"}}, "x"),
        ({"content": "x", "reasoning_content": "hm", "refusal": "no"}, "x"),
    ],
)
def test_an_answer_is_its_text_without_the_thinking(message: dict[str, Any], text: str) -> None:
    (choice,) = read_answer(completion(**message), prompt_bytes=1).choices
    assert (choice.text, choice.finish_reason, choice.note) == (text, "stop", "")


@pytest.mark.parametrize(
    ("message", "finish", "reason", "note"),
    [
        ({"refusal": "I can't assist with that."}, "stop", "content_filter", "refused: I can't"),
        ({"content": [{"type": "refusal", "refusal": "I can't."}]}, "stop", "content_filter", "refused: I can't"),
        ({"refusal": "no \ud800"}, "stop", "content_filter", r"refused: no \?$"),
        ({"reasoning_content": "hm"}, "stop", "stop", "only thought.*reasoning_effort"),
        ({"content": " ", "reasoning": "hm"}, "length", "length", "only thought"),
        ({"content": "", "reasoning_details": [{"text": "hm"}]}, "length", "length", "only thought"),
        ({"content": THOUGHT}, "stop", "stop", "only thought"),
        *(({}, said, "content_filter", rf"filter \({said}")
          for said in ("refusal", "SAFETY", "content_filter: RECITATION")),
        ({"content": {"odd": 1}}, "stop", "stop", "wrote nothing"),
    ],
)  # fmt: skip
def test_an_empty_answer_says_why(message: dict[str, Any], finish: str, reason: str, note: str) -> None:
    (choice,) = read_answer(completion(finish=finish, **{"content": None, **message}), prompt_bytes=1).choices
    assert (choice.text.strip(), choice.finish_reason) == ("", reason)
    assert re.search(note, choice.note)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("length", ["MAX_TOKENS", "model_length", "max_output_tokens", "max_new_tokens",
                    "model_context_window_exceeded"]),
        ("stop", ["STOP", "end_turn", "eos", "stop_sequence", "COMPLETE", "FINISH_REASON_STOP", "eos_found",
                  "stop_token", "stop "]),
        ("unknown", [None, ["stop"]]),
        *((word, [word]) for word in ("time_limit", "tool_calls", "stopped_by_user")),
    ],
)  # fmt: skip
def test_why_an_answer_ended_has_one_name(reason: str, words: list[Any]) -> None:
    found = [read_answer(completion(finish=said), prompt_bytes=1).choices[0].finish_reason for said in words]
    assert found == [reason] * len(words)


BROKEN_OFF = {"message": {"content": "The answer begi"}, "finish_reason": "error"}


@pytest.mark.parametrize(
    ("kind", "status", "body"),
    [
        (CreditUsedUp, None, {"error": {"code": 402, "message": "x"}}),
        (Transient, 429, {"error": {"code": 429, "message": "Rate limit exceeded: free-models-per-min"}}),
        (RequestRefused, 400, {"error": {"code": "400", "message": "Provider returned error"}}),
        (KeyRefused, None, {"error": {"code": 401, "message": "No auth"}}),
        (Transient, 429, {"error": {"message": "busy", "status": 429}}),
        (KeyRefused, None, {"error": {"message": "no"}, "statusCode": 401}),
        # Without a number its code decides, or its words.
        (RequestRefused, 400, {"type": "error", "error": {"type": "invalid_request_error", "message": "x"}}),
        (Transient, 429, {"error": "Rate limit exceeded, slow down"}),
        (CreditUsedUp, None, {"error": {"message": "Insufficient Balance"}}),
        (Transient, 502, {"error": "busy"}),
        # Errors that are not in an `error`: MiniMax, GLM, SGLang, Cloudflare.
        (CreditUsedUp, None, {"choices": None, "base_resp": {"status_code": 8, "status_msg": "insufficient balance"}}),
        (KeyRefused, None, {"choices": None, "base_resp": {"status_code": 1004, "status_msg": "login fail"}}),
        (Transient, 500, {"code": 500, "msg": "404 NOT_FOUND", "success": False}),
        (RequestRefused, 400, {"object": "error", "message": "context length is 4096", "code": 400}),
        (Transient, 429, {"success": False, "errors": [{"code": 2001, "message": "Rate limited"}]}),
        # In a choice.
        (Transient, 502, {"choices": [{**BROKEN_OFF, "error": {"code": 502, "message": "Provider disconnected"}}]}),
        (Transient, 502, {"choices": [BROKEN_OFF]}),
        (CreditUsedUp, None, {"choices": [{**BROKEN_OFF, "error": {"code": 402, "message": "Insufficient credits"}}]}),
        (RequestRefused, 403, {"choices": [{**BROKEN_OFF, "error": {"code": 403, "message": "flagged"}}]}),
    ],
)
def test_an_error_inside_a_200_counts_as_what_it_is(kind: type[Exception], status: int | None, body: Any) -> None:
    text = json.dumps(body)
    for form in (text, f"[{text}]", text if body.get("choices") else f"data: {text}\n\ndata: [DONE]"):
        with pytest.raises(kind) as caught:
            read_answer(form.encode(), prompt_bytes=1)
        assert getattr(caught.value, "status", None) == status


# ---- errors


def failure_of(status: int, body: Any, headers: dict[str, str] | None = None) -> Any:
    """Classify a body; a text stands for an error in OpenAI's form."""
    body = openai_error(body) if isinstance(body, str) else body
    return classify(status, headers or {}, body if isinstance(body, bytes) else json.dumps(body).encode())


def openai_error(message: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "t", "param": None, "code": code}}


QUOTA = "You exceeded your current quota, please check your plan and billing details."


def google_error(quota: str | None, delay: str | None) -> list[Any]:
    details: list[Any] = [{"violations": [{"quotaId": quota, "quotaValue": "10"}]}] if quota else []
    details += [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}] if delay else []
    return [{"error": {"code": 429, "message": QUOTA, "status": "RESOURCE_EXHAUSTED", "details": details}}]


REFUSED: dict[str, list[tuple[int, Any]]] = {
    "context_length": [
        (400, openai_error("the limit is 4096 tokens", "context_length_exceeded")),
        (400, "The prompt is longer than the maximum model length of 512"),
        (400, [{"error": {"message": "The input token count exceeds the maximum number of tokens"}}]),
        (400, "Input tokens exceed the configured limit of 272000 tokens."),
        (500, "the request exceeds the available context size, try increasing it"),
        (422, {"error": "`inputs` tokens + `max_new_tokens` must be <= 4096", "error_type": "v"}),
        (400, "Range of input length should be [1, 30720]"),
        (400, "40000 tokens are too large for a model with 32768 context limit"),
        (400, openai_error("string too long. Expected at most 1048576", "string_above_max_length")),
        (400, "Prompt exceeds max length"),
        (400, f"litellm.BadRequestError: {'x' * 400} maximum context length is 4096"),
        (400, {"errors": [{"message": "the prompt is too long"}]}),
    ],
    "content_filter": [
        (400, openai_error("The response was filtered", "content_filter")),
        (403, "Your input was flagged by moderation"),
        (400, "Input data may contain inappropriate content."),
        (400, "Content Exists Risk"),
        (400, {"code": "DataInspectionFailed", "message": "no"}),
        (400, {"error": {"code": "content_filter", "innererror": {"code": "Jailbreak"}}}),
        (400, "Data inspection failed: PROHIBITED_CONTENT"),
    ],
    "bad_request": [
        (400, "response_format is not supported"),
        (422, {"detail": [{"msg": "field required"}]}),
        (404, "No endpoints found that can handle the requested parameters."),
        # A limit of the answer's tokens, whatever is asked: not this row's fault.
        (422, {"error": "Input validation error: `max_new_tokens` must be <= 1024. Given: 4096", "error_type": "v"}),
        (400, "`max_tokens` must be less than or equal to `8192`, which is less than the `context_window`"),
        (400, "the max tokens limit is 4096"),
        (400, "max_tokens 8192 exceeds the model's completion token limit (4096)"),
        (400, "The requested tokens exceed the maximum output tokens limit of 4096"),
        (400, b""),
        (451, {"message": "no"}),
        # The input that a server repeats decides nothing.
        (400, {"detail": [{"loc": ["body"], "msg": "no", "input": "insufficient funds, rate limit"}]}),
        (400, {"error": {"message": "bad request", "input": "credit balance is too low"}}),
    ],
    "not_found": [(404, "The model `x` does not exist.")],
    "too_large": [(413, b"<html>Request Entity Too Large</html>")],
    "cut": [(400, "Could not finish: max_tokens or model output limit was reached.")],
    # It has more tokens than a minute may have: no wait helps, and it ends no stage.
    "over_a_minute": [
        (status, openai_error(f"Too large (TPM): Limit 6000, Requested {n}, please reduce", "rate_limit_exceeded"))
        for status, n in ((413, "8046"), (429, "80,046"))
    ],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_say_why(reason: str) -> None:
    for status, body in REFUSED[reason]:
        refused = failure_of(status, body)
        assert isinstance(refused, RequestRefused), body
        assert (refused.status, refused.reason) == (status, reason), body
        assert refused.text
        assert not re.search("funds|credit", refused.text)


@pytest.mark.parametrize(
    ("kind", "status", "body"),
    [
        (KeyRefused, 401, "Incorrect API key provided"),
        (NotPermitted, 403, "permission denied"),
        (KeyRefused, 400, [{"error": {"message": "API key not valid. Please pass a valid API key."}}]),
        (CreditUsedUp, 402, "Insufficient Balance"),
        (CreditUsedUp, 402, b"Payment Required"),
        (CreditUsedUp, 400, "Your credit balance is too low to access the API. Please go to Plans & Billing."),
        (CreditUsedUp, 400, "You have reached your specified API usage limits. You will regain access on 2026-12."),
        (CreditUsedUp, 403, {"error": {"type": "billing_error", "message": "The account is not in good standing."}}),
        (CreditUsedUp, 400, {"code": "Arrearage", "message": "Access denied."}),
        (CreditUsedUp, 429, openai_error(QUOTA, "insufficient_quota")),
        (CreditUsedUp, 429, "Your project has exceeded its monthly spending cap."),
    ],
)
def test_what_only_another_key_or_money_can_help(kind: type[Exception], status: int, body: Any) -> None:
    assert type(failure_of(status, body)) is kind


@pytest.mark.parametrize(
    ("body", "when"),
    [
        (google_error("GenerateRequestsPerDayPerProjectPerModel-FreeTier", "34s"), r"midnight Pacific time, 20\d\d-"),
        ({"error": {"message": "Rate limit exceeded: free-models-per-day", "code": 429,
                    "metadata": {"headers": {"X-RateLimit-Reset": "1795737600000"}}}}, "2026-11-27 00:00 UTC"),
        ("Daily limit of 50 requests reached", "does not say when"),
        ("You have exceeded your monthly request quota", "does not say when"),
        ("Weekly token limit reached for this key", "does not say when"),
        ({**openai_error("Daily limit"), "X-RateLimit-Reset": "999999999999999"}, "does not say when"),
    ],
)  # fmt: skip
def test_a_day_s_quota_that_is_used_up_stops_the_stage_and_says_when_it_is_back(body: Any, when: str) -> None:
    failure = failure_of(429, body)
    assert isinstance(failure, QuotaUsedUp)
    assert re.search(when, str(failure))


# The tests may run long after this file was read.
DAY = formatdate(time.time() + 86_400, usegmt=True)


@pytest.mark.parametrize(
    ("body", "headers", "seconds"),
    [
        # A rate limit is waited for, whatever page it names.
        (google_error("GenerateRequestsPerMinutePerProjectPerModel", "2s"), {}, 2),
        (google_error(None, "34.07s"), {}, 34.07),
        (google_error("GenerateContentInputTokensPerModelPerMinute", None), {}, None),
        (google_error(None, None), {}, None),
        # The wait that is asked for, in words and in headers.
        (openai_error("Limit reached on requests per day (RPD). Please try again in 7m12s.", "rate_limit_exceeded"), {},
         432),
        (openai_error("Rate limit (TPM): Limit 6000, Used 5000, Requested 1200. Please try again in 2s.",
                      "rate_limit_exceeded"), {}, 2),
        ("Please try again in 350ms. Visit the billing page.", {}, 0.35),
        ("Please retry after 30 seconds.", {}, 30),
        ("Slow down. Please wait 1 minute 5.5 sec before you try.", {}, 65.5),
        ("Try again in 1 minute and 5 seconds", {}, 65),
        ("", {"retry-after": "7"}, 7),
        ("", {"retry-after": "1.5"}, 1.5),
        ("", {"retry-after": "9", "retry-after-ms": "250"}, 0.25),
        ("", {"retry-after": DAY}, 86_400),
        ("", {"retry-after": formatdate(0, usegmt=True)}, 0),
        *(("", {"retry-after": odd}, None) for odd in ("soon", "nan", "-5", "")),
    ],
)  # fmt: skip
def test_a_rate_limit_is_waited_for_as_long_as_is_asked(
    body: Any, headers: dict[str, str], seconds: float | None
) -> None:
    failure = failure_of(429, body, headers)
    assert isinstance(failure, Transient)
    margin = 7200 if headers.get("retry-after") == DAY else 2e-3
    assert failure.retry_after == (None if seconds is None else pytest.approx(seconds, abs=margin))


@pytest.mark.parametrize(
    ("status", "body", "throttled"),
    [
        *((status, "later", status in (429, 503, 529)) for status in (408, 409, 424, 499, 500, 502, 503, 504, 529)),
        (500, b"[" * 100_000, False),
        (403, {"error": {"code": 403, "message": "Provider returned error: rate limited by upstream"}}, True),
        (400, {"__type": "ThrottlingException", "message": "Too many requests, please wait before trying"}, True),
    ],
)
def test_what_another_attempt_can_help(status: int, body: Any, throttled: bool) -> None:
    failure = failure_of(status, body)
    assert isinstance(failure, Transient)
    assert (failure.throttled, failure.retry_after) == (throttled, None)


def test_a_refusal_survives_the_way_between_processes() -> None:
    refused = pickle.loads(pickle.dumps(RequestRefused(400, "context_length", "too long")))
    assert (refused.status, refused.reason, refused.text) == (400, "context_length", "too long")
    assert str(refused) == "refused (400, context_length): too long"


def test_a_page_is_its_words_and_a_long_text_is_shortened() -> None:
    page = b"<!DOCTYPE html><html><style>p {color: red}</style><title>502: Bad\n gateway</title><p>" + b"x " * 1000
    assert str(failure_of(502, page)).startswith("502: 502: Bad gateway x x")
    assert max(len(str(failure_of(502, page))), len(str(failure_of(400, "x" * 1000)))) <= 340
