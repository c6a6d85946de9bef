"""What holds requests back: the window with AIMD, the server's pauses, caps per minute, and the budget."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tasks.errors import PreflowError

HEARTBEAT_SECONDS = 60.0


class BudgetExceeded(PreflowError):
    """The next request might cost more than what is left of `budget_usd`."""


class Window:
    """At most `size` requests in flight, over all callers, first come first served.

    Additive increase, multiplicative decrease (Chiu and Jain 1989): a throttled request halves the window, unless it
    was sent before the last cut; a window full of successes opens it by one, up to `maximum`.
    """

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._size = float(maximum)
        self._cut_at = float("-inf")
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.in_flight = 0

    @property
    def size(self) -> int:
        """The number of requests that may be in flight now."""
        return int(self._size)

    async def __aenter__(self) -> Self:
        if self.in_flight < self.size and not self._waiting:
            self.in_flight += 1
            return self
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._admit()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        self.in_flight -= 1
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self.in_flight < self.size:
            place = self._waiting.popleft()
            if not place.done():
                self.in_flight += 1
                place.set_result(None)

    def succeeded(self) -> None:
        """Grow by one per window of successes."""
        if self._size < self._maximum:
            self._size = min(float(self._maximum), self._size + 1 / self._size)
            self._admit()

    def throttled(self, sent_at: float) -> None:
        """Halve, once for all requests that were in flight together; `sent_at` is of `time.monotonic`."""
        if sent_at > self._cut_at:
            self._size = max(1.0, self._size / 2)
            self._cut_at = time.monotonic()


@dataclass(slots=True)
class _Spent:
    at: float
    amount: int
    counted: bool = True


class PeriodCap:
    """At most `limit` units in any `period` seconds: a sliding log.

    A leaky or token bucket would let twice the limit through in the first minute, and could not be corrected when the
    true amount is known.
    """

    def __init__(self, limit: int | None, period: float = 60.0) -> None:
        self._limit = limit
        self._period = period
        self._log: deque[_Spent] = deque()
        self._used = 0

    def delay(self, amount: int) -> float:
        """Return the seconds until `amount` fits; one larger than the limit fits an empty log."""
        now = time.monotonic()
        while self._log and self._log[0].at + self._period <= now:
            self._forget(self._log.popleft())
        if self._limit is None:
            return 0.0
        excess, free_at = self._used + amount - self._limit, now
        for entry in self._log:
            if excess <= 0:
                break
            excess, free_at = excess - entry.amount, entry.at + self._period
        return free_at - now

    def take(self, amount: int) -> _Spent:
        """Note `amount` as used now; correct it later with `correct`."""
        entry = _Spent(time.monotonic(), amount, counted=self._limit is not None)
        if entry.counted:
            self._log.append(entry)
            self._used += amount
        return entry

    def correct(self, entry: _Spent, amount: int) -> None:
        """Replace the estimate in `entry` by the true amount."""
        if entry.counted:
            self._used += amount - entry.amount
            entry.amount = amount

    def _forget(self, entry: _Spent) -> None:
        entry.counted = False
        self._used -= entry.amount


class Gate:
    """Lets requests out one after the other, as the server's pauses and the caps per minute allow."""

    def __init__(self, requests: PeriodCap, tokens: PeriodCap, on_pause: Callable[[], None]) -> None:
        self._requests = requests
        self._tokens = tokens
        self._on_pause = on_pause
        self._turn = asyncio.Lock()
        self._corrected = asyncio.Event()
        self._paused_until = 0.0
        self.waited_seconds = 0.0

    def pause(self, seconds: float) -> None:
        """Let nothing out for `seconds` from now."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    async def admit(self, tokens: int) -> _Spent:
        """Wait until a request of about `tokens` tokens may be sent; correct the returned entry afterwards."""
        async with self._turn:
            while True:
                pause = self._paused_until - time.monotonic()
                delay = max(self._requests.delay(1), self._tokens.delay(tokens))
                if pause <= 0 and delay <= 0:
                    break
                if pause > 0:
                    self._on_pause()
                await self._sleep(min(max(pause, delay), HEARTBEAT_SECONDS))
            self._requests.take(1)
            return self._tokens.take(tokens)

    def correct(self, entry: _Spent, tokens: int) -> None:
        """Replace the estimate that was admitted by the tokens that were used."""
        self._tokens.correct(entry, tokens)
        self._corrected.set()

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not on when an estimate is corrected: there may be room now."""
        started = time.monotonic()
        self._corrected.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._corrected.wait()
        self.waited_seconds += time.monotonic() - started


class Budget:
    """Money: what was spent, and what the requests in flight may cost at most; together never over the limit."""

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._known = 0.0
        self._answered = 0
        self._lost: list[float] = []
        self._reserved = 0.0
        self._holders = 0
        self._settled = asyncio.Event()

    @property
    def spent(self) -> float:
        """US$ so far; an answer that was lost on its way is taken to have cost the mean of the others."""
        if not self._answered:
            return self._known + sum(self._lost)
        return self._known * (1 + len(self._lost) / self._answered)

    async def reserve(self, most: float) -> None:
        """Set `most` US$ aside, waiting for requests in flight to cost less than was set aside for them.

        Raises `BudgetExceeded` when even the answers to all of them would leave too little.
        """
        while self._limit is not None and self.spent + self._reserved + most > self._limit:
            if self.spent + most > self._limit or not self._holders:
                raise self._exceeded(most)
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

    def _exceeded(self, most: float) -> BudgetExceeded:
        projected = self.spent + self._reserved + most
        return BudgetExceeded(
            f"budget_usd is {self._limit:.4g} US$: {self.spent:.4g} is spent, and the next request may cost up to "
            f"{most:.4g}, which would make {projected:.4g}. It was not sent. Everything answered so far is kept: raise "
            "budget_usd (or lower max_tokens) and run again to go on from here."
        )
