"""The OpenAI-compatible client: one window of requests, retries, rate limits, outages, budget and token usage."""

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NotRequired, Unpack
from urllib.parse import parse_qsl

from openai import AsyncOpenAI

from tasks.config import EndpointConfig
from tasks.llm.batches import MOST_REQUESTS, Batches
from tasks.llm.dialect import CERTAIN, Body, Dialect
from tasks.llm.limits import Budget, BudgetExceeded, Gate, Window
from tasks.llm.responses import (
    BATCH_PRICE,
    Answer,
    RequestRefused,
    StageStopped,
    Transient,
    as_batch,
    classify,
    read_answer,
    usd_of,
)
from tasks.llm.retries import Attempts, RetryPolicy
from tasks.llm.vllm_admin import Administration, Template
from tasks.store.refs import Cost, digest
from tasks.store.workspace import Workspace

# Completion tokens assumed for a request without max_tokens when money or tokens are set aside for it.
UNBOUNDED_COMPLETION = 4096
log = logging.getLogger(__name__)


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
    """Counters for progress."""

    sent: int = 0
    succeeded: int = 0
    window: int = 0
    spent_usd: float = 0.0
    usage: Cost = field(default_factory=Cost)


class _Request:
    """One chat request over all its attempts."""

    def __init__(
        self, config: EndpointConfig, messages: Sequence[Mapping[str, str]], settings: Sampling, may_wait: bool = False
    ) -> None:
        self.may_wait = may_wait
        given = {name: value for name, value in settings.items() if value is not None}
        if config.reasoning_effort:
            given["reasoning_effort"] = config.reasoning_effort
        self.body: Body = {"model": config.model, "messages": list(messages), **given, **config.extra_body}
        self.prompt_bytes = sum(len(message["content"].encode()) + 16 for message in messages)
        if "response_format" in given:
            self.prompt_bytes += len(json.dumps(given["response_format"]))
        completion_tokens = (settings.get("max_tokens") or UNBOUNDED_COMPLETION) * (settings.get("n") or 1)
        self.tokens = self.prompt_bytes // 3 + completion_tokens
        # A byte-level tokenizer makes at most one token of a byte; the chat template adds some.
        most = Cost(prompt_tokens=self.prompt_bytes + 64, completion_tokens=completion_tokens)
        self.most_usd = usd_of(most, config)


class Endpoint(Administration):
    """A model behind an OpenAI-compatible address; all callers share one window, one set of limits, one budget."""

    def __init__(self, config: EndpointConfig, api_key: str | None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(config, api_key, headers)
        self._stats = Stats()
        self._window = Window(config.max_concurrency)
        self._gate = Gate(
            config.requests_per_minute, config.tokens_per_minute, lambda: self._retries.say("asked to pause")
        )
        self._retries = RetryPolicy(config, self.ping, self._gate.pause)
        self._budget = Budget(config.budget_usd)
        self._dialect = Dialect(config.model)
        self._batches: Batches | None = None

    def use_batches(self, store: Workspace, folder: str, source: str = "", may_leave: bool = False) -> None:
        """Send what may wait through the batch API from now on; batches are written down in `folder`.

        `source` tells what the questions are about, so that a run does not wait for what others have handed in.
        Where the process `may_leave`, answers that take long are not waited for: `BatchPending` is raised.
        """
        headers = {name: value for name, value in self._headers.items() if name != "Content-Type"}
        client = AsyncOpenAI(
            base_url=self.base_url, api_key=self._key or "none", default_headers=headers, max_retries=0,
            default_query=dict(parse_qsl(self._query.removeprefix("?"))),
        )  # fmt: skip
        self._batches = Batches(client, store, folder, self.config.max_outage_seconds, self.conceal, source, may_leave)

    async def __aexit__(self, *failure: object) -> None:
        if self._batches is not None:
            await self._batches.close()
        await super().__aexit__(*failure)

    async def check_batches(self) -> None:
        """Raise `BatchPending` if the process may leave and what an earlier one handed in is not answered."""
        if self._batches is not None:
            await self._batches.check_pending()

    @property
    def most_in_flight(self) -> int:
        """How many requests callers may have under way at once."""
        return MOST_REQUESTS if self._batches else self.config.max_concurrency

    @property
    def stats(self) -> Stats:
        """A snapshot of the counters."""
        return replace(self._stats, window=self._window.size, spent_usd=self._budget.spent)

    def allowed_tokens(self, wanted: int) -> int:
        """Return `wanted`, or the most completion tokens that the endpoint has said to allow."""
        return self._dialect.allowed_tokens(wanted)

    async def chat(
        self, messages: Sequence[Mapping[str, str]], may_wait: bool = False, **sampling: Unpack[Sampling]
    ) -> Answer:
        """Return the model's answer to `messages`, trying again for as long as that can help.

        What `may_wait` goes through the batch API where that is used.
        Where the endpoint gives fewer than `n` completions, the others are asked for one by one, with seeds seed + i.
        Raises `RequestRefused` if this request can never be answered, and `PreflowError` if none can: `KeyRefused`,
        `EndpointDown` or `BudgetExceeded`.
        """
        try:
            answer = await self._chat(messages, sampling, may_wait)
        except RequestRefused as refused:
            if refused.reason == "not_found" and not self._stats.succeeded:
                raise self.not_served(refused) from refused
            raise
        self._stats.succeeded += 1
        return answer

    async def _chat(self, messages: Sequence[Mapping[str, str]], sampling: Sampling, may_wait: bool) -> Answer:
        wanted, first, answers = sampling.get("n") or 1, sampling.get("seed"), list[Answer]()
        if wanted == 1 or "n" not in self._dialect.dropped:
            answers.append(await self._ask(_Request(self.config, messages, sampling, may_wait)))
            if len(answers[0].choices) == 1 < wanted and "n" not in self._dialect.dropped:
                self._dialect.drop("n")
        missing = range(len(answers[0].choices) if answers else 0, wanted)
        singles = [sampling | Sampling(n=None, seed=None if first is None else first + place) for place in missing]
        requests = (self._ask(_Request(self.config, messages, single)) for single in singles)
        for found in await asyncio.gather(*requests, return_exceptions=True):  # all to their end: they are paid for
            if isinstance(found, BaseException):
                raise found
            answers.append(found)
        choices = [choice for answer in answers for choice in answer.choices[:wanted]][:wanted]
        usage = sum((answer.usage for answer in answers), Cost())
        if all(choice.finish_reason == "content_filter" for choice in choices):
            raise RequestRefused(200, "content_filter", choices[0].note, usage=usage)
        return replace(answers[-1], choices=choices, usage=usage)

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
                body, answer = await self._doubt(request, body, answer)
            sent = {name: value for name, value in body.items() if name not in answer.refused}
            self._dialect.took(sent)
            left_out = {*answer.refused, *self._dialect.refused(request.body, sent)}
            return replace(answer, refused=tuple(sorted(left_out)))

    async def _doubt(self, request: _Request, body: Body, answer: Answer) -> tuple[Body, Answer]:
        """Ask once as it is meant what was answered without the schema, to see whether that is why it failed.

        What is answered is paid for, and kept whatever comes of it.
        """
        request.may_wait, meant = False, self._dialect.shape(request.body)
        if not self._dialect.doubts_format(meant):  # another request has found it out
            return body, answer
        try:
            found = await self._attempt(request, meant, Attempts())
        except (Transient, RequestRefused) as failure:
            throttled = isinstance(failure, Transient) and failure.throttled
            if not throttled and self._dialect.doubts_format(self._dialect.shape(request.body)):
                self._dialect.drop("response_format")
        except (StageStopped, BudgetExceeded):
            log.info("%s: nothing more can be asked now: an answer without the schema is kept", self.config.endpoint)
        else:  # the server was down for another reason
            return meant, replace(found, usage=found.usage + answer.usage)
        return body, answer

    async def _attempt(self, request: _Request, body: Body, attempts: Attempts) -> Answer:
        # The first answer comes the normal way: what the endpoint does not take is found out by one request.
        if self._batches is not None and request.may_wait:
            name = digest(request.body)
            if self._stats.succeeded or await self._batches.has(name):
                request.may_wait = False
                return await self._attempt_in_batch(self._batches, request, name, body)
        async with self._window:
            await self._budget.reserve(request.most_usd)
            cost: float | None = 0.0
            try:
                counted = await self._gate.admit(request.tokens)
                cost = None
                answer = await self._send(request, body, attempts)
                cost = usd_of(answer.usage, self.config)
                self._gate.settle(counted, answer.usage.prompt_tokens + answer.usage.completion_tokens)
            except (Transient, RequestRefused, StageStopped) as failure:
                if not getattr(failure, "maybe_billed", False):
                    cost = 0.0
                    self._gate.settle(counted, 0)
                raise
            finally:
                self._budget.settle(request.most_usd, cost)
        return answer

    async def _attempt_in_batch(self, batches: Batches, request: _Request, name: str, body: Body) -> Answer:
        most: float = request.most_usd * BATCH_PRICE
        cost: float | None = 0.0
        await self._budget.reserve(most)
        try:
            line = await batches.ask(name, body, self._dialect.refused(request.body, body))
            if line is None:
                raise Transient("the batch ended without an answer")
            content = json.dumps(line.body).encode()
            if line.status >= 400:
                raise self._explained(classify(line.status, {}, self.conceal(content)))
            answer = self._read(content, request.prompt_bytes)
            answer = replace(answer, usage=as_batch(answer.usage), refused=line.refused)
            cost = usd_of(answer.usage, self.config)
        except Transient as failure:
            cost = None if failure.maybe_billed else 0.0
            raise
        finally:
            self._budget.settle(most, cost)
        self._stats.sent += 1
        self._stats.usage += answer.usage
        return answer

    async def _send(self, request: _Request, body: Body, attempts: Attempts) -> Answer:
        self._retries.sent(attempts)
        self._stats.sent += 1
        try:
            content = await self._call(f"{self.base_url}/chat/completions", body, self.config.request_timeout_seconds)
            answer = self._read(content, request.prompt_bytes)
        except Transient as failure:
            if failure.throttled:
                self._window.throttled(attempts.sent_at)
            elif self._dialect.blames_format(body, failure, attempts.failures + 1):
                raise RequestRefused(failure.status, "bad_request", str(failure)) from failure
            raise
        except RequestRefused:
            self._retries.answered()
            raise
        self._retries.answered()
        self._window.succeeded()
        self._stats.usage += answer.usage
        return answer

    def _read(self, content: bytes, prompt_bytes: int) -> Answer:
        try:
            return read_answer(content, prompt_bytes)
        except (Transient, RequestRefused, StageStopped):
            concealed = self.conceal(content)
        try:
            return read_answer(concealed, prompt_bytes)
        except StageStopped as stopped:
            raise self._explained(stopped) from None

    async def ping(self) -> Answer:
        """Send one short request, again only without what is refused by name; raise what became of it."""
        request = _Request(self.config, [{"role": "user", "content": "ping"}], {"max_tokens": 16})
        while True:
            body = self._dialect.shape(request.body)
            try:
                return await self._attempt(request, body, Attempts())
            except RequestRefused as refused:
                if not self._dialect.learn(refused, body):
                    raise
