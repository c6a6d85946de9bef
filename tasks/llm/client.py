"""The OpenAI-compatible client: one window of requests, retries, rate limits, outages, budget and token usage."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, NotRequired, Self, TypedDict, Unpack

import httpx2
from openai import APIConnectionError, APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient

from tasks.config import EndpointConfig
from tasks.llm import vllm_admin as served
from tasks.llm.limits import Budget, BudgetExceeded, Gate, PeriodCap, Window
from tasks.llm.outage import Attempts, Outage
from tasks.llm.responses import (
    Answer,
    Choice,
    CreditUsedUp,
    EndpointDown,
    KeyRefused,
    ModelInfo,
    QuotaUsedUp,
    RequestRefused,
    StageStopped,
    Transient,
    Usage,
    classify,
    read_answer,
)
from tasks.llm.secrets import resolve_secret

__all__ = [
    "Answer",
    "BudgetExceeded",
    "Choice",
    "CreditUsedUp",
    "Endpoint",
    "EndpointDown",
    "KeyRefused",
    "ModelInfo",
    "QuotaUsedUp",
    "RequestRefused",
    "Stats",
    "Usage",
    "resolve_secret",
]

# Completion tokens assumed for a request without max_tokens when money or tokens are set aside for it.
UNBOUNDED_COMPLETION = 4096


class Sampling(TypedDict):
    """The settings of a chat request; None and absent ones are not sent."""

    n: NotRequired[int | None]
    temperature: NotRequired[float | None]
    top_p: NotRequired[float | None]
    max_tokens: NotRequired[int | None]
    frequency_penalty: NotRequired[float | None]
    seed: NotRequired[int | None]
    stop: NotRequired[Sequence[str] | None]
    chat_template: NotRequired[str | None]
    chat_template_kwargs: NotRequired[Mapping[str, Any] | None]
    return_token_ids: NotRequired[bool | None]
    response_format: NotRequired[Mapping[str, Any] | None]


@dataclass
class Stats:
    """Counters for progress; seconds are summed over the requests that waited."""

    sent: int = 0
    succeeded: int = 0
    refused: int = 0
    retried: int = 0
    in_flight: int = 0
    window: int = 0
    waited_seconds: float = 0.0
    spent_usd: float = 0.0
    usage: Usage = field(default_factory=Usage)


class _Request:
    """One chat request over all its attempts."""

    def __init__(self, config: EndpointConfig, messages: Sequence[Mapping[str, str]], settings: Sampling) -> None:
        given = {name: value for name, value in settings.items() if value is not None}
        self.body: dict[str, Any] = {"model": config.model, "messages": list(messages), **given}
        self.prompt_bytes = sum(len(message["content"].encode()) + 16 for message in messages)
        if "response_format" in given:
            self.prompt_bytes += len(json.dumps(given["response_format"]))
        completion_tokens = (settings.get("max_tokens") or UNBOUNDED_COMPLETION) * (settings.get("n") or 1)
        self.tokens = self.prompt_bytes // 3 + completion_tokens
        # A byte-level tokenizer makes at most one token of a byte; the chat template adds some.
        self.most_usd = Usage(prompt_tokens=self.prompt_bytes + 64, completion_tokens=completion_tokens).cost(config)
        self.attempts = Attempts()

    def rename_max_tokens(self) -> None:
        """Newer OpenAI models know this parameter by its new name only."""
        if "max_tokens" in self.body:
            self.body["max_completion_tokens"] = self.body.pop("max_tokens")


class Endpoint:
    """A model behind an OpenAI-compatible address; all callers share one window, one set of limits, one budget.

    Use as an async context manager, in one event loop. `config` says where and within which limits; `api_key` is the
    key itself (see `resolve_secret`) and appears in no message.
    """

    def __init__(self, config: EndpointConfig, api_key: str | None) -> None:
        self.config = config
        self._key = api_key
        self._stats = Stats()
        self._window = Window(config.max_concurrency)
        caps = PeriodCap(config.requests_per_minute), PeriodCap(config.tokens_per_minute)
        self._outage = Outage(config, self._probe)
        self._gate = Gate(*caps, on_pause=lambda: self._outage.say("asked to pause"))
        self._budget = Budget(config.budget_usd)
        self._max_tokens_renamed = False
        self._client = self._connect()

    def _connect(self) -> AsyncOpenAI:
        connections = self.config.max_concurrency + 2  # room for a probe and /models
        seconds = self.config.request_timeout_seconds
        http = DefaultAsyncHttpxClient(
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            timeout=httpx2.Timeout(seconds, connect=min(30.0, seconds), pool=None),
        )
        # Without a key the client would send this endpoint whatever OPENAI_API_KEY holds.
        return AsyncOpenAI(base_url=self.config.endpoint, api_key=self._key or "none", max_retries=0, http_client=http)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    @property
    def stats(self) -> Stats:
        """A snapshot of the counters."""
        return replace(
            self._stats,
            window=self._window.size,
            waited_seconds=self._stats.waited_seconds + self._gate.waited_seconds,
            spent_usd=self._budget.spent,
        )

    async def chat(self, messages: Sequence[Mapping[str, str]], **sampling: Unpack[Sampling]) -> Answer:
        """Return the model's answer to `messages`, trying again for as long as that can help.

        Raises `RequestRefused` if this request can never be answered, and `PreflowError` if none can: `KeyRefused`,
        `EndpointDown` or `BudgetExceeded`.
        """
        request = _Request(self.config, messages, sampling)
        while True:
            if self._max_tokens_renamed:
                request.rename_max_tokens()
            try:
                answer = await self._attempt(request)
            except Transient as failure:
                await self._wait_out(failure, request)
            except RequestRefused as refused:
                if refused.reason != "max_tokens_name" or "max_tokens" not in request.body:
                    self._stats.refused += 1
                    raise
                self._max_tokens_renamed = True
            else:
                self._stats.succeeded += 1
                return answer

    async def _attempt(self, request: _Request) -> Answer:
        async with self._window:
            await self._budget.reserve(request.most_usd)
            cost: float | None = 0.0
            try:
                entry = await self._gate.admit(request.tokens)
                cost = None
                answer = await self._send(request)
                cost = answer.usage.cost(self.config)
                self._gate.correct(entry, answer.usage.prompt_tokens + answer.usage.completion_tokens)
            except (Transient, RequestRefused, StageStopped) as failure:
                if not getattr(failure, "maybe_billed", False):
                    cost = 0.0
                    self._gate.correct(entry, 0)
                raise
            finally:
                self._budget.settle(request.most_usd, cost)
        if all(choice.finish_reason == "content_filter" for choice in answer.choices):
            raise RequestRefused(200, "content_filter", "the endpoint's content filter withheld the completion")
        return answer

    async def _send(self, request: _Request) -> Answer:
        self._outage.sent(request.attempts)
        self._stats.sent += 1
        self._stats.in_flight += 1
        try:
            response = await self._call("/chat/completions", request.body, self.config.request_timeout_seconds)
            answer = read_answer(response.content, request.prompt_bytes)
        except StageStopped as stopped:
            # The original's text may hold the key: it is not chained.
            raise self._explain(stopped) from None
        except RequestRefused:
            self._outage.answered()
            raise
        finally:
            self._stats.in_flight -= 1
        self._outage.answered()
        self._window.succeeded()
        self._stats.usage += answer.usage
        return answer

    async def _call(self, path: str, body: dict[str, Any] | None, seconds: float) -> httpx2.Response:
        """Post `body`, or get without one; all failures as Transient, RequestRefused or KeyRefused.

        The raw response is asked for because building the client's typed answer costs more than everything here.
        """
        try:
            async with asyncio.timeout(seconds):
                if body is None:
                    return await self._client.get(path, cast_to=httpx2.Response)
                return await self._client.post(path, cast_to=httpx2.Response, body=body)
        except APIStatusError as error:
            raise classify(error.response, hide=self._key) from None
        except APIConnectionError as error:
            cause = error.__cause__ or error
            sent = not isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout)
            raise Transient(f"{type(cause).__name__}: {cause or error}", maybe_billed=sent) from None
        except TimeoutError:
            raise Transient(f"no answer within {seconds:g} s", maybe_billed=True) from None

    def _explain(self, stopped: StageStopped) -> StageStopped:
        """Return why the stage stops with where, which key and what to do."""
        name, where = self.config.api_key, f"{self.config.endpoint} (model {self.config.model})"
        which = f"the key {name}" if name else "a request without a key"
        kept = "Everything answered so far is kept"
        if isinstance(stopped, CreditUsedUp):
            return CreditUsedUp(f"{where}: {which} has no credit left: {stopped}. {kept}: top it up, then run again")
        if isinstance(stopped, QuotaUsedUp):
            return QuotaUsedUp(
                f"{where}: the day's quota of {which} is used up: {stopped}. {kept}: run again after that"
            )
        if not isinstance(stopped, KeyRefused):
            return stopped
        if name is None:
            remedy = "it wants a key: set api_key to env:NAME (and export NAME=...) or to a Prefect Secret block's name"
        elif name.startswith("env:"):
            remedy = f"check the key and its account, and export {name.removeprefix('env:')}=... where the flow runs"
        else:
            remedy = f"check the key and its account, and change the Prefect Secret block {name!r}"
        return KeyRefused(f"{self.config.endpoint} refused {which} for {self.config.model}: {stopped}; {remedy}")

    async def _wait_out(self, failure: Transient, request: _Request) -> None:
        if failure.throttled:
            self._window.throttled(request.attempts.sent_at)
        try:
            delay = await self._outage.delay(failure, request.attempts)
        except RequestRefused:
            self._stats.refused += 1
            raise
        self._stats.retried += 1
        if failure.retry_after:
            self._gate.pause(delay)
        else:
            self._stats.waited_seconds += delay
            await asyncio.sleep(delay)

    async def _probe(self) -> Answer:
        request = _Request(self.config, [{"role": "user", "content": "ping"}], {"max_tokens": 16})
        if self._max_tokens_renamed:
            request.rename_max_tokens()
        return await self._attempt(request)

    async def models(self) -> list[ModelInfo]:
        """Return the models that the endpoint serves, LoRA adapters included."""
        return await served.list_models(self._call)

    async def check_model(self) -> ModelInfo:
        """Return the configured model, after at most about 10 s; raise `PreflowError` if it cannot be used."""
        return await served.check_model(self._call, self.config)

    async def load_adapter(self, name: str, path: str, replace: bool) -> None:
        """Have vLLM serve the LoRA adapter in the folder `path`, as the server sees it, under `name`.

        With `replace`, an adapter already served under that name is exchanged. Raises `PreflowError`.
        """
        await served.load_adapter(self._call, self.config, {"lora_name": name, "lora_path": path}, replace)

    async def unload_adapter(self, name: str) -> None:
        """Have vLLM no longer serve the LoRA adapter `name`; one it does not serve is left at that."""
        await served.unload_adapter(self._call, self.config, name)

    async def token_log_prob(self, prefix: Sequence[int], token: int) -> float:
        """Return the log-prob (nats) that the model gives `token` after the token ids `prefix`; vLLM alone tells it.

        Raises `PreflowError`.
        """
        return await served.token_log_prob(self._call, self.config, prefix, token)
