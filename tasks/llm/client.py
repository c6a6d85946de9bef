"""The OpenAI-compatible client: one window of requests, retries, rate limits, outages, budget and token usage."""

import asyncio
import json
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any, NotRequired, Self, TypedDict, Unpack
from urllib.parse import parse_qsl

import httpx2
from openai import AsyncOpenAI, DefaultAioHttpClient

from tasks.config import EndpointConfig
from tasks.llm import vllm_admin
from tasks.llm.batches import MOST_REQUESTS, Batches
from tasks.llm.dialect import Dialect
from tasks.llm.limits import Budget, BudgetExceeded, Gate, Window, per_minute
from tasks.llm.responses import (
    BATCH_PRICE,
    PERMANENT,
    Answer,
    Choice,
    CreditUsedUp,
    EndpointDown,
    KeyRefused,
    ModelInfo,
    QuotaUsedUp,
    RequestRefused,
    ServerError,
    StageStopped,
    Transient,
    as_batch,
    classify,
    classify_error,
    price,
    read_answer,
)
from tasks.llm.retries import Attempts, RetryPolicy
from tasks.llm.secrets import resolve_secret
from tasks.store.refs import Cost
from tasks.store.workspace import Workspace

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
    "resolve_secret",
]

# Completion tokens assumed for a request without max_tokens when money or tokens are set aside for it.
UNBOUNDED_COMPLETION = 4096
# Refusals that have nothing to do with the request's settings.
CERTAIN = PERMANENT | {"not_found", "cut", "keeps_failing"}


class Template(TypedDict):
    """The chat template that turns messages into tokens, where it is not the server's own, and what it is handed."""

    chat_template: NotRequired[str | None]
    chat_template_kwargs: NotRequired[Mapping[str, Any] | None]


class Sampling(Template):
    """The settings of a chat request; None and absent ones are not sent."""

    n: NotRequired[int | None]
    temperature: NotRequired[float | None]
    top_p: NotRequired[float | None]
    max_tokens: NotRequired[int | None]
    frequency_penalty: NotRequired[float | None]
    seed: NotRequired[int | None]
    stop: NotRequired[Sequence[str] | None]
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
    usage: Cost = field(default_factory=Cost)


class _Request:
    """One chat request over all its attempts."""

    def __init__(
        self,
        config: EndpointConfig,
        messages: Sequence[Mapping[str, str]],
        settings: Sampling,
        may_wait: bool = False,
    ) -> None:
        self.may_wait = may_wait
        given = {name: value for name, value in settings.items() if value is not None}
        if config.reasoning_effort:
            given["reasoning_effort"] = config.reasoning_effort
        self.body: dict[str, Any] = {"model": config.model, "messages": list(messages), **given, **config.extra_body}
        self.prompt_bytes = sum(len(message["content"].encode()) + 16 for message in messages)
        if "response_format" in given:
            self.prompt_bytes += len(json.dumps(given["response_format"]))
        completion_tokens = (settings.get("max_tokens") or UNBOUNDED_COMPLETION) * (settings.get("n") or 1)
        self.tokens = self.prompt_bytes // 3 + completion_tokens
        # A byte-level tokenizer makes at most one token of a byte; the chat template adds some.
        self.most_usd = price(
            Cost(prompt_tokens=self.prompt_bytes + 64, completion_tokens=completion_tokens), config
        ).usd


class Endpoint:
    """A model behind an OpenAI-compatible address; all callers share one window, one set of limits, one budget.

    Use as an async context manager, in one event loop. `config` says where and within which limits; `api_key` is the
    key itself (see `resolve_secret`), `headers` are further headers; neither appears in a message.
    """

    def __init__(self, config: EndpointConfig, api_key: str | None, headers: Mapping[str, str] | None = None) -> None:
        self.config = config
        self._key = api_key
        self._stats = Stats()
        self._window = Window(config.max_concurrency)
        caps = per_minute(config.requests_per_minute), per_minute(config.tokens_per_minute)
        self._gate = Gate(*caps, on_pause=lambda: self._retries.say("asked to pause"))
        self._retries = RetryPolicy(config, self.ping, self._gate.pause)
        self._budget = Budget(config.budget_usd)
        self._dialect = Dialect(config.model)
        self._client = self._connect(headers)
        self._batches: Batches | None = None

    @classmethod
    async def connect(cls, config: EndpointConfig, field: str) -> Self:
        """Return the endpoint with its key and headers looked up; `field` names the configuration in messages.

        Raises:
            PreflowError: a secret is missing.
        """
        key = await resolve_secret(config.api_key, f"{field}.api_key")
        names = config.extra_headers.items()
        headers = {name: await resolve_secret(value, f"{field}.extra_headers.{name}") or "" for name, value in names}
        return cls(config, key, headers)

    def use_batches(self, store: Workspace, folder: str) -> None:
        """Send what may wait through the batch API from now on; batches are written down in `folder`."""
        address, _, query = self.config.endpoint.partition("?")
        client = AsyncOpenAI(
            base_url=address, api_key=self._key or "none", http_client=self._client, max_retries=0,
            default_query=dict(parse_qsl(query)),
        )  # fmt: skip
        self._batches = Batches(client, store, folder, self.config.max_outage_seconds, self._key)

    @property
    def most_in_flight(self) -> int:
        """How many requests callers may have under way at once."""
        return MOST_REQUESTS if self._batches else self.config.max_concurrency

    def _connect(self, headers: Mapping[str, str] | None) -> httpx2.AsyncClient:
        """Open openai's aiohttp transport, without its client: that takes as much CPU a request as all the rest."""
        connections = self.config.max_concurrency + 2  # room for a ping and /models
        seconds = self.config.request_timeout_seconds
        key = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return DefaultAioHttpClient(
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            timeout=httpx2.Timeout(seconds, connect=min(30.0, seconds), pool=None),
            headers={"Content-Type": "application/json", **key, **(headers or {})},
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._batches is not None:
            self._batches.close()
        await self._client.aclose()

    @property
    def stats(self) -> Stats:
        """A snapshot of the counters."""
        return replace(
            self._stats,
            retried=self._retries.failures,
            window=self._window.size,
            waited_seconds=self._retries.waited_seconds + self._gate.waited_seconds,
            spent_usd=self._budget.spent,
        )

    @property
    def left_out(self) -> list[str]:
        """The settings that the endpoint has refused by name, and that are not sent to it any more."""
        return sorted(self._dialect.dropped)

    def allowed_tokens(self, wanted: int) -> int:
        """Return `wanted`, or the most completion tokens that the endpoint has said to allow."""
        return self._dialect.allowed_tokens(wanted)

    async def chat(
        self, messages: Sequence[Mapping[str, str]], may_wait: bool = False, **sampling: Unpack[Sampling]
    ) -> Answer:
        """Return the model's answer to `messages`, trying again for as long as that can help.

        What `may_wait` goes through the batch API where that is used. An endpoint that gives fewer than `n`
        completions is asked for the others one by one, with seeds seed + i. Raises `RequestRefused` if this request can
        never be answered, and `PreflowError` if none can: `KeyRefused`, `EndpointDown` or `BudgetExceeded`.
        """
        try:
            answer = await self._chat(messages, sampling, may_wait)
        except RequestRefused as refused:
            self._stats.refused += 1
            if refused.reason == "not_found" and not self._stats.succeeded:
                raise vllm_admin.not_served(self.config, refused) from refused
            raise
        self._stats.succeeded += 1
        return answer

    async def _chat(self, messages: Sequence[Mapping[str, str]], sampling: Sampling, may_wait: bool) -> Answer:
        wanted, given = sampling.get("n") or 1, Answer([], Cost(), "")
        if wanted == 1 or "n" not in self._dialect.dropped:
            given = await self._ask(_Request(self.config, messages, sampling, may_wait))
            if wanted > 1 and len(given.choices) == 1 and "n" not in self._dialect.dropped:
                self._dialect.drop("n")
        answers = [given]
        if missing := range(len(given.choices), wanted):
            first = sampling.get("seed")
            singles = [sampling | Sampling(n=None, seed=None if first is None else first + place) for place in missing]
            answers += await _all(self._ask(_Request(self.config, messages, single)) for single in singles)
        choices = [choice for answer in answers for choice in answer.choices[:wanted]][:wanted]
        usage = sum((answer.usage for answer in answers), Cost())
        if all(choice.finish_reason == "content_filter" for choice in choices):
            raise RequestRefused(200, "content_filter", choices[0].note, usage=usage)
        return Answer(choices, usage, answers[-1].model, answers[-1].prompt_token_ids)

    async def _ask(self, request: _Request) -> Answer:
        """Return the answer to one request, leaving out what the endpoint refuses by name."""
        doubtful = False  # the schema is left out once, to see whether that is why the request fails
        while True:
            body = self._dialect.shape(request.body)
            if doubtful:
                body.pop("response_format", None)
            try:
                answer = await self._retries.call(partial(self._attempt, request, body))
            except RequestRefused as refused:
                if self._dialect.learned_since(request.body, body) or self._dialect.learn(refused, body):
                    continue
                if doubtful or not self._dialect.doubts_format(body) or refused.reason in CERTAIN:
                    raise
                doubtful = True
                continue
            if doubtful:
                self._dialect.drop("response_format")
            self._dialect.took(body)
            return answer

    async def _attempt(self, request: _Request, body: dict[str, Any], attempts: Attempts) -> Answer:
        # The first answer comes the normal way: what the endpoint does not take is found out by one request.
        if self._batches is not None and request.may_wait and self._stats.succeeded:
            request.may_wait = False
            return await self._attempt_in_batch(self._batches, request, body)
        async with self._window:
            await self._budget.reserve(request.most_usd)
            cost: float | None = 0.0
            try:
                counted = await self._gate.admit(request.tokens)
                cost = None
                answer = await self._send(request, body, attempts)
                cost = price(answer.usage, self.config).usd
                self._gate.settle(counted, answer.usage.prompt_tokens + answer.usage.completion_tokens)
            except (Transient, RequestRefused, StageStopped) as failure:
                if not getattr(failure, "maybe_billed", False):
                    cost = 0.0
                    self._gate.settle(counted, 0)
                raise
            finally:
                self._budget.settle(request.most_usd, cost)
        return answer

    async def _attempt_in_batch(self, batches: Batches, request: _Request, body: dict[str, Any]) -> Answer:
        most, cost = request.most_usd * BATCH_PRICE, 0.0
        await self._budget.reserve(most)
        try:
            line = await batches.ask(body)
            if line is None:
                raise Transient("the batch ended without an answer")
            if line.status >= 400:
                failure = classify_error(ServerError.of(line.status, {}, line.body, hide=self._key))
                raise self._explain(failure) if isinstance(failure, StageStopped) else failure
            answer = self._read(json.dumps(line.body).encode(), request.prompt_bytes)
            answer = replace(answer, usage=as_batch(answer.usage))
            cost = price(answer.usage, self.config).usd
        finally:
            self._budget.settle(most, cost)
        self._stats.sent += 1
        self._stats.usage += answer.usage
        return answer

    async def _send(self, request: _Request, body: dict[str, Any], attempts: Attempts) -> Answer:
        self._retries.sent(attempts)
        self._stats.sent += 1
        self._stats.in_flight += 1
        try:
            response = await self._call("/chat/completions", body, self.config.request_timeout_seconds)
            answer = self._read(response.content, request.prompt_bytes)
        except Transient as failure:
            if failure.throttled:
                self._window.throttled(attempts.sent_at)
            elif self._dialect.blames_format(body, failure, attempts.failures + 1):
                raise RequestRefused(failure.status, "bad_request", str(failure)) from failure
            raise
        except RequestRefused:
            self._retries.answered()
            raise
        finally:
            self._stats.in_flight -= 1
        self._retries.answered()
        self._window.succeeded()
        self._stats.usage += answer.usage
        return answer

    async def _call(self, path: str, body: dict[str, Any] | None, seconds: float) -> httpx2.Response:
        """Post `body`, or get without one; all failures as Transient, RequestRefused or StageStopped."""
        address, _, query = self.config.endpoint.partition("?")
        url = path if path.startswith("http") else f"{address.rstrip('/')}{path}{'?' + query if query else ''}"
        try:
            async with asyncio.timeout(seconds):
                if body is None:
                    response = await self._client.get(url)
                else:
                    response = await self._client.post(url, content=json.dumps(body))
        except httpx2.HTTPError as error:
            sent = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
            raise Transient(f"{type(error).__name__}: {error}", maybe_billed=sent) from None
        except TimeoutError:
            raise Transient(f"no answer within {seconds:g} s", maybe_billed=True) from None
        if response.status_code < 400:
            return response
        failure = classify(response, hide=self._key)
        raise self._explain(failure) if isinstance(failure, StageStopped) else failure

    def _read(self, content: bytes, prompt_bytes: int) -> Answer:
        try:
            return read_answer(content, prompt_bytes)
        except StageStopped as stopped:
            raise self._explain(stopped) from None

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
        return type(stopped)(f"{self.config.endpoint} refused {which} for {self.config.model}: {stopped}; {remedy}")

    async def ping(self) -> Answer:
        """Send one short request, once; raise what became of it."""
        request = _Request(self.config, [{"role": "user", "content": "ping"}], {"max_tokens": 16})
        return await self._attempt(request, self._dialect.shape(request.body), Attempts())

    async def models(self) -> list[ModelInfo]:
        """Return the models that the endpoint serves, LoRA adapters included."""
        return await vllm_admin.list_models(self._call)

    async def check_model(self) -> ModelInfo:
        """Return the configured model, after at most about 10 s; raise `PreflowError` if it cannot be used."""
        return await vllm_admin.check_model(self._call, self.config, self.ping)

    async def load_adapter(self, name: str, path: str, replace: bool) -> None:
        """Have vLLM serve the LoRA adapter in the folder `path`, as the server sees it, under `name`.

        With `replace`, an adapter already served under that name is exchanged. Raises `PreflowError`.
        """
        await vllm_admin.load_adapter(self._call, self.config, {"lora_name": name, "lora_path": path}, replace)

    async def unload_adapter(self, name: str) -> None:
        """Have vLLM no longer serve the LoRA adapter `name`; one it does not serve is left at that."""
        await vllm_admin.unload_adapter(self._call, self.config, name)

    async def tokenize(
        self, prompt: Sequence[Mapping[str, str]] | str, **template: Unpack[Template]
    ) -> list[int] | None:
        """Return the tokens of messages, or of a text as it stands, as vLLM sees them; None where it does not tell."""
        given = {name: value for name, value in template.items() if value is not None}
        return await vllm_admin.tokenize(self._call, self.config, prompt, given)

    async def token_log_prob(self, prefix: Sequence[int], token: int) -> float:
        """Return the log-prob (nats) that the model gives `token` after the token ids `prefix`; vLLM alone tells it.

        Raises `PreflowError`.
        """
        return await vllm_admin.token_log_prob(self._call, self.config, prefix, token)


async def _all(coroutines: Iterable[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """Await all to their end, for they are paid for, and then raise the first error."""
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if isinstance(result, Answer)]
