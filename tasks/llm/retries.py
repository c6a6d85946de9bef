"""The one retry policy of requests: tell an endpoint that is down from a request that it cannot answer."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tasks.config import EndpointConfig
from tasks.llm.limits import HEARTBEAT_SECONDS
from tasks.llm.responses import Answer, EndpointDown, RequestRefused, Transient

log = logging.getLogger("tasks.llm.client")

FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
PING_SECONDS = 10.0
# A request that fails this often while the endpoint answers others is taken to be the cause itself.
MAX_FAILURES = 10
MAX_ODD_ANSWERS = 3
# What a failure weighs when only a ping was answered, after it: the endpoint may just have come back.
PING_WEIGHT = 5


@dataclass(slots=True)
class Attempts:
    """What one request has been through: `weight` sums up the failures that it may be the cause of itself.

    Whole answers of no use (`odd`) are paid for, and counted by themselves.
    """

    failures: int = 0
    weight: int = 0
    odd: int = 0
    sent_at: float = 0.0
    answers_when_sent: int = 0


class RetryPolicy:
    """Tries requests again, for as long as that can help.

    An outage begins with the first failure after an answer, and ends with the next answer to anyone.

    Args:
        config: `max_outage_seconds` is how long an outage is waited for.
        ping: sends one short request, and raises what that raises.
        pause: holds all requests back for so many seconds.
    """

    def __init__(
        self, config: EndpointConfig, ping: Callable[[], Awaitable[object]], pause: Callable[[float], None]
    ) -> None:
        self._config, self._ping, self._pause = config, ping, pause
        self._pinging = asyncio.Lock()
        self._ping_failed_at = self._said_at = float("-inf")
        self._since: float | None = None
        self._answers = self.failures = 0

    async def call(self, attempt: Callable[[Attempts], Awaitable[Answer]]) -> Answer:
        """Return the answer of the first attempt that is answered.

        Raises `EndpointDown` when the outage has lasted `max_outage_seconds` (or would, if the endpoint's wish were
        granted), and `RequestRefused` when the request itself is the cause, which would else be retried for ever.
        """
        attempts, longest = Attempts(), FIRST_BACKOFF_SECONDS
        while True:
            try:
                return await attempt(attempts)
            except Transient as failure:
                await self._check_hope(attempts, failure)
                pause = min(max(self._left(), FIRST_BACKOFF_SECONDS), random.uniform(0, longest))
                if failure.retry_after:
                    pause = 0.0  # the gate's holds for every request, this one too
            await asyncio.sleep(pause)
            longest = min(LONGEST_BACKOFF_SECONDS, 2 * longest)

    def sent(self, attempts: Attempts) -> None:
        """Note that an attempt is being sent."""
        attempts.sent_at, attempts.answers_when_sent = time.monotonic(), self._answers

    def answered(self) -> None:
        """Note a sign of life; a refusal is one, too."""
        self._since = None
        self._answers += 1

    async def _check_hope(self, attempts: Attempts, failure: Transient) -> None:
        """Raise why there is no further attempt, if there is none."""
        self.failures += 1
        self._since = self._since or time.monotonic()
        if not failure.throttled:
            attempts.failures += 1
            attempts.odd += failure.odd
            if self._answers > attempts.answers_when_sent:
                attempts.weight += 1
            elif attempts.failures >= MAX_FAILURES and await self._is_up():
                attempts.weight += PING_WEIGHT
        if self._left() <= 0 or (failure.retry_after or 0) > self._left():
            if failure.throttled or not await self._is_up():
                limit = f"max_outage_seconds is {self._config.max_outage_seconds:g}"
                trouble = f"has given no answer for {self._seconds():.0f} s, and {limit}; last: {failure}"
                if failure.retry_after and failure.retry_after > self._config.max_outage_seconds:
                    trouble = f"asks to wait {failure.retry_after:.0f} s, and {limit}: {failure}"
                raise EndpointDown(
                    f"{self._config.endpoint} (model {self._config.model}) {trouble}. Everything answered so far is "
                    "kept: run again when it is up and takes requests, or raise max_outage_seconds to wait longer."
                )
            attempts.weight += PING_WEIGHT
        if attempts.weight >= MAX_FAILURES or attempts.odd >= MAX_ODD_ANSWERS:
            text = f"failed {attempts.failures} times, and is the cause itself: {failure}"
            raise RequestRefused(failure.status, "keeps_failing", text)
        self.say(str(failure))
        if failure.retry_after:
            self._pause(failure.retry_after)

    def _left(self) -> float:
        return self._config.max_outage_seconds - self._seconds()

    def _seconds(self) -> float:
        return 0.0 if self._since is None else time.monotonic() - self._since

    async def _is_up(self) -> bool:
        async with self._pinging:
            if self._since is None:
                return True
            if time.monotonic() - self._ping_failed_at < LONGEST_BACKOFF_SECONDS:
                return False
            try:
                async with asyncio.timeout(PING_SECONDS):
                    await self._ping()
            except RequestRefused as refused:
                log.debug("%s refuses a ping, so it is up: %s", self._config.endpoint, refused)
            except (Transient, TimeoutError):
                self._ping_failed_at = time.monotonic()
                return False
            return True

    def say(self, trouble: str) -> None:
        """Log what is being waited for, at most one line a minute."""
        now = time.monotonic()
        if now - self._said_at < HEARTBEAT_SECONDS:
            return
        self._said_at = now
        log.warning(
            "%s: %s; waiting (no answer for %.0f s, giving up after %.0f s; %d answered, %d attempts failed so far)",
            self._config.endpoint, trouble, self._seconds(), self._config.max_outage_seconds,
            self._answers, self.failures,
        )  # fmt: skip
