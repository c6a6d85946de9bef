"""Telling an endpoint that is down from a request that it cannot answer, and how long to wait for either."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tasks.config import EndpointConfig
from tasks.llm.limits import HEARTBEAT_SECONDS
from tasks.llm.responses import EndpointDown, RequestRefused, Transient

log = logging.getLogger("tasks.llm.client")

FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
PROBE_SECONDS = 10.0
# A request that fails this often while the endpoint answers others is taken to be the cause itself.
MOST_BLAME = 10
# What a failure weighs when only a probe was answered, after it: the endpoint may just have come back.
PROBE_BLAME = 5


@dataclass(slots=True)
class Attempts:
    """What one request has been through."""

    count: int = 0
    failures: int = 0
    blame: int = 0
    sent_at: float = 0.0
    answers_when_sent: int = 0


class Outage:
    """The endpoint's outage, if there is one: it begins with the first failure after an answer, and ends with the next.

    `probe` sends one short request, and raises what that raises.
    """

    def __init__(self, config: EndpointConfig, probe: Callable[[], Awaitable[object]]) -> None:
        self._config = config
        self._probe = probe
        self._probing = asyncio.Lock()
        self._probe_failed_at = float("-inf")
        self._since: float | None = None
        self._said_at = float("-inf")
        self._answers = 0
        self._failures = 0

    def sent(self, attempts: Attempts) -> None:
        """Note that an attempt is being sent."""
        attempts.count += 1
        attempts.sent_at = time.monotonic()
        attempts.answers_when_sent = self._answers

    def answered(self) -> None:
        """Note a sign of life; a refusal is one, too."""
        self._since = None
        self._answers += 1

    async def delay(self, failure: Transient, attempts: Attempts) -> float:
        """Return the seconds until the next attempt: what the endpoint asks for, or exponential backoff with jitter.

        Raises `EndpointDown` when the outage has lasted `max_outage_seconds` (or would, if the endpoint's wish were
        granted), and `RequestRefused` when the request itself is the cause, which would else be retried for ever.
        """
        self._failures += 1
        now = time.monotonic()
        self._since = self._since or now
        if not failure.throttled:
            await self._doubt(failure, attempts)
        left = (self._since or now) + self._config.max_outage_seconds - now
        if left <= 0 or (failure.retry_after or 0) > left:
            await self._give_up(failure, attempts)
            left = LONGEST_BACKOFF_SECONDS
        self.say(str(failure))
        if failure.retry_after:
            return failure.retry_after
        backoff = min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(attempts.count - 1, 10))
        return min(left, backoff * random.uniform(0.5, 1.0))

    async def _doubt(self, failure: Transient, attempts: Attempts) -> None:
        attempts.failures += 1
        if self._answers > attempts.answers_when_sent:
            self._blame(failure, attempts, 1)
        elif attempts.failures >= MOST_BLAME and await self._is_up():
            self._blame(failure, attempts, PROBE_BLAME)

    async def _give_up(self, failure: Transient, attempts: Attempts) -> None:
        if failure.throttled or not await self._is_up():
            raise self._down(failure)
        self._blame(failure, attempts, PROBE_BLAME)

    def _blame(self, failure: Transient, attempts: Attempts, weight: int) -> None:
        attempts.blame += weight
        if attempts.blame >= MOST_BLAME:
            text = f"failed {attempts.failures} times, although others were answered: {failure}"
            raise RequestRefused(failure.status, "keeps_failing", text)

    async def _is_up(self) -> bool:
        async with self._probing:
            if self._since is None:
                return True
            if time.monotonic() - self._probe_failed_at < LONGEST_BACKOFF_SECONDS:
                return False
            try:
                async with asyncio.timeout(PROBE_SECONDS):
                    await self._probe()
            except RequestRefused:
                return True
            except (Transient, TimeoutError):
                self._probe_failed_at = time.monotonic()
                return False
            return True

    def _down(self, failure: Transient) -> EndpointDown:
        limit = f"max_outage_seconds is {self._config.max_outage_seconds:g}"
        if failure.retry_after and failure.retry_after > self._config.max_outage_seconds:
            trouble = f"asks to wait {failure.retry_after:.0f} s, and {limit}: {failure}"
        else:
            trouble = f"has given no answer for {self._seconds():.0f} s, and {limit}; last: {failure}"
        return EndpointDown(
            f"{self._config.endpoint} (model {self._config.model}) {trouble}. Everything answered so far is kept: run "
            "again when it is up and takes requests, or raise max_outage_seconds to wait longer."
        )

    def _seconds(self) -> float:
        return 0.0 if self._since is None else time.monotonic() - self._since

    def say(self, trouble: str) -> None:
        """Log what is being waited for, at most one line a minute."""
        now = time.monotonic()
        if now - self._said_at < HEARTBEAT_SECONDS:
            return
        self._said_at = now
        log.warning(
            "%s: %s; waiting (no answer for %.0f s, giving up after %.0f s; %d answered, %d attempts failed so far)",
            self._config.endpoint, trouble, self._seconds(), self._config.max_outage_seconds,
            self._answers, self._failures,
        )  # fmt: skip
