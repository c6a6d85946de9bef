"""What holds requests back: the window with AIMD, the server's pauses, caps per minute, and the budget."""

import asyncio
import time
from collections.abc import Callable

from aiolimiter import AsyncLimiter

from tasks.errors import PreflowError

HEARTBEAT_SECONDS = 60.0
MINUTE = 60.0
# What is set aside for an answer, by the mean of those before.
MARGIN = 1.25


class BudgetExceeded(PreflowError):
    """The next request might cost more than what is left of `budget_usd`."""


class Window(asyncio.Semaphore):
    """At most `size` requests in flight, over all callers, first come first served.

    Additive increase, multiplicative decrease (Chiu and Jain 1989): a throttled request halves the window, unless it
    was sent before the last cut; a window full of successes opens it by one, up to `maximum`.
    """

    def __init__(self, maximum: int) -> None:
        super().__init__(maximum)
        self._maximum = maximum
        self._size = float(maximum)
        self._cut_at = float("-inf")
        self._to_close = 0  # places that go when the requests that have them are answered

    @property
    def size(self) -> int:
        """The number of requests that may be in flight now."""
        return int(self._size)

    def release(self) -> None:
        """Give a place back."""
        if self._to_close:
            self._to_close -= 1
        else:
            super().release()

    def succeeded(self) -> None:
        """Grow by one per window of successes."""
        before, self._size = self.size, min(float(self._maximum), self._size + 1 / self._size)
        if self.size > before:
            self.release()

    def throttled(self, sent_at: float) -> None:
        """Halve, once for all requests that were in flight together; `sent_at` is of `time.monotonic`."""
        if sent_at > self._cut_at:
            before, self._size = self.size, max(1.0, self._size / 2)
            free = min(self._value, before - self.size)
            self._value -= free
            self._to_close += before - self.size - free
            self._cut_at = time.monotonic()


def _per_minute(limit: int | None) -> AsyncLimiter | None:
    """Return a limiter that lets at most `limit` units through in any minute, or None.

    A leaky bucket lets its burst through on top of what leaks: the burst is a second's worth. It is taken off the
    rate twice, for `Gate` may owe requests as much again.
    """
    if limit is None:
        return None
    burst = max(1.0, limit / 60)
    return AsyncLimiter(burst, MINUTE * burst / (limit - 2 * burst if burst > 1 else limit))


class Gate:
    """Lets requests out one after the other, as the server's pauses and the caps of requests and tokens a minute allow.

    A request's tokens are known when it is answered: until then it counts somewhat more than the others on average, and
    the difference is settled with the next.
    """

    def __init__(self, requests: int | None, tokens: int | None, on_pause: Callable[[], None]) -> None:
        self._requests, self._tokens, self._on_pause = _per_minute(requests), _per_minute(tokens), on_pause
        self._turn = asyncio.Lock()
        self._paused_until = 0.0
        self._known, self._answered, self._debt = 0.0, 0, 0.0

    def pause(self, seconds: float) -> None:
        """Let nothing out for `seconds` from now."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    async def admit(self, tokens: int) -> float:
        """Wait until a request may be sent that has at most about `tokens` tokens; return what it counts as."""
        async with self._turn:
            expected = min(float(tokens), MARGIN * self._known / self._answered if self._answered else tokens)
            if self._tokens is not None:
                due = max(0.0, expected + self._debt)
                self._debt += expected - due
                while due > 0:  # one larger than the bucket goes in parts
                    part = min(due, self._tokens.max_rate)
                    await self._tokens.acquire(part)
                    due -= part
            if self._requests is not None:
                await self._requests.acquire()
            while (pause := self._paused_until - time.monotonic()) > 0:
                self._on_pause()
                await asyncio.sleep(min(pause, HEARTBEAT_SECONDS))
            return expected

    def settle(self, expected: float, tokens: int) -> None:
        """Correct what `admit` returned by the tokens that were used."""
        least = -self._tokens.max_rate if self._tokens else 0.0  # what was not used must not come as a burst
        self._debt = max(least, self._debt + tokens - expected)
        if tokens:
            self._known, self._answered = self._known + tokens, self._answered + 1


class Budget:
    """Money: what was spent, and what the requests in flight may cost at most; together never over the limit."""

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._known, self._answered = 0.0, 0
        self._lost: list[float] = []
        self._reserved, self._holders = 0.0, 0
        self._settled = asyncio.Event()

    @property
    def spent(self) -> float:
        """US$ so far; an answer that was lost on its way is taken to have cost the mean of the others."""
        lost = self._known * len(self._lost) / self._answered if self._answered else sum(self._lost)
        return self._known + lost

    async def reserve(self, most: float) -> None:
        """Set `most` US$ aside, waiting for requests in flight to cost less than was set aside for them.

        Raises `BudgetExceeded` when even the answers to all of them would leave too little.
        """
        while self._limit is not None and (projected := self.spent + self._reserved + most) > self._limit:
            if self.spent + most > self._limit or not self._holders:
                raise BudgetExceeded(
                    f"budget_usd is {self._limit:.4g} US$: {self.spent:.4g} is spent, and the next request may cost up "
                    f"to {most:.4g}, which would make {projected:.4g}. It was not sent. Everything answered so far is "
                    "kept: raise budget_usd (or lower max_tokens) and run again to go on from here."
                )
            self._settled.clear()
            await self._settled.wait()
        self._reserved += most
        self._holders += 1

    def settle(self, most: float, cost: float | None) -> None:
        """Replace the reservation by the cost: 0 when nothing was billed, None when the answer was lost."""
        self._holders -= 1
        self._reserved = self._reserved - most if self._holders else 0.0
        if cost is None:
            self._lost.append(most)
        elif cost:
            self._known += cost
            self._answered += 1
        self._settled.set()
