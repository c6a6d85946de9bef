"""A stage in shards: each a cached Prefect task whose units are asked concurrently and kept as they arrive."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, Field

from tasks.batch.rows import Journal, Outcome, RowStore, ShardRef, Slice, read_slice
from tasks.errors import PreflowError
from tasks.store.workspace import Cost, Row

# The first units are made one at a time until one succeeds, or so many have failed: an endpoint that refuses all of
# them is found out by a few requests and not by a window full of them.
FIRST_ALONE = 3
# A shard is open until its slowest unit is done, which may take several times as long as most. So many windows of units
# may be open for that; more only take memory.
OPEN_WINDOWS = 8
logger = logging.getLogger(__name__)


class TooManyFailures(PreflowError):
    """More failed for good than `max_failure_ratio` allows."""


@dataclass
class Count:
    """How far one shard is, in units: all of them, those done, those of them that failed for good."""

    rows: int
    units: int
    done: int = 0
    failed: int = 0


@dataclass
class Tally:
    """How far a stage is; units of shards that have not begun are estimated at `per_row` a row."""

    rows: int
    per_row: int = 1
    allowed: float = 1.0
    shards: dict[int, Count] = field(default_factory=dict)
    failures: list[Row] = field(default_factory=list)
    stopped: PreflowError | None = None

    def begin(self, part: Slice, units: int, known: Iterable[Outcome]) -> None:
        """Count a shard's units that are known already; a shard that is tried again is counted again from zero."""
        self.shards[part.index] = Count(rows=part.rows, units=units)
        for outcome in known:
            self.add(part, outcome)

    def take(self, part: Slice, shard: ShardRef) -> None:
        """Count a shard that was finished before, unless it was made just now."""
        if part.index not in self.shards:
            count = Count(rows=part.rows, units=shard.rows, done=shard.rows, failed=shard.failed)
            self.shards[part.index] = count

    def add(self, part: Slice, outcome: Outcome) -> None:
        """Count one unit."""
        count = self.shards[part.index]
        count.done += 1
        if outcome.error is not None:
            count.failed += 1
            self.failures.append(outcome.error)
            if self.failed > self.allowed * self.total:
                self.stop(TooManyFailures(f"{self.failed} of {self.total} failed for good"))

    def stop(self, reason: PreflowError) -> None:
        """Have no further unit begun; the first reason counts."""
        self.stopped = self.stopped or reason

    @property
    def total(self) -> int:
        """All units, as far as that is known."""
        begun = self.shards.values()
        return sum(c.units for c in begun) + (self.rows - sum(c.rows for c in begun)) * self.per_row

    @property
    def done(self) -> int:
        """Units that are done, whenever they were made."""
        return sum(count.done for count in self.shards.values())

    @property
    def failed(self) -> int:
        """Units that failed for good."""
        return sum(count.failed for count in self.shards.values())


@dataclass
class ShardWorker:
    """Makes a stage's shards.

    Args:
        rows: where the units lie.
        units_of: the units of an input row, by their keys.
        work: makes one unit.
        tally: how far the stage is.
        concurrency: units under way at once, over all shards.
        prepare: awaited once, before the first unit is made, and only if one has to be.
        watch: called after each unit that was made.
    """

    rows: RowStore
    units_of: Callable[[Row], Mapping[str, Any]]
    work: Callable[[Any], Awaitable[Outcome]]
    tally: Tally
    concurrency: int
    prepare: Callable[[], Awaitable[object]]
    watch: Callable[[], None] = lambda: None
    _gate: asyncio.Semaphore = field(init=False)
    _first: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _prepared: bool = field(default=False, init=False)
    _tried: int = field(default=0, init=False)
    _making: dict[str, asyncio.Future[Outcome]] = field(default_factory=dict, init=False)
    # Gives on the place of an open shard of which units wait to be begun.
    _give_on: dict[int, Callable[[], None]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        # Twice the window, so that a request that waits for its next attempt keeps no other from being sent.
        self._gate = asyncio.Semaphore(2 * self.concurrency)

    async def run_all(self, slices: Sequence[Slice], run_one: Callable[[Slice], Awaitable[ShardRef]]) -> list[ShardRef]:
        """Await `run_one`, which calls `run`, for each slice: the next when of those before hardly a unit is to begin.

        So the window is full however long single units take, and no more shards are in memory than that needs.
        """
        places, failed = asyncio.Semaphore(_shards_of(self.concurrency, slices)), False

        async def open_one(part: Slice) -> ShardRef | None:
            nonlocal failed
            await places.acquire()
            self._give_on[part.index] = places.release
            try:
                return None if failed else await run_one(part)
            except BaseException:
                failed = True
                raise
            finally:
                self._all_begun(part)

        return await settle(map(open_one, slices), _shards_of(OPEN_WINDOWS * self.concurrency, slices))

    def _all_begun(self, part: Slice) -> None:
        if give_on := self._give_on.pop(part.index, None):
            give_on()

    async def run(self, part: Slice) -> ShardRef:
        """Make the units of one slice that are not known yet, and commit the shard.

        Raises the first error of `work`; units that others finished meanwhile are kept.
        """
        source = await asyncio.to_thread(read_slice, self.rows.store, part)
        units = {key: unit for row in source for key, unit in self.units_of(row).items()}
        outcomes = await asyncio.to_thread(self.rows.find, list(units))
        self.tally.begin(part, len(units), outcomes.values())
        async with self.rows.journal(part) as journal:

            async def make(key: str, unit: Any) -> None:
                try:
                    outcome = await self._make_once(key, unit, journal)
                except PreflowError as error:  # such as a refused key or a full disk: no other unit would fare better
                    self.tally.stop(error)
                    raise
                outcomes[key] = outcome
                self.tally.add(part, outcome)
                self.watch()

            async def follow() -> None:
                async with self._gate:  # first come, first served: the shard's units have all passed
                    self._all_begun(part)

            missing = [make(key, unit) for key, unit in units.items() if key not in outcomes]
            await settle([*missing, follow()])
            async with journal.replaced():
                shard = await asyncio.to_thread(self.rows.commit, part, list(units), outcomes)
            for key in units:
                self._making.pop(key, None)
        return shard

    async def _make_once(self, key: str, unit: Any, journal: Journal) -> Outcome:
        """Make and keep a unit, or wait for an open shard that has an equal one and makes it already."""
        if twin := self._making.get(key):
            return await asyncio.shield(twin)
        made = self._making[key] = asyncio.get_running_loop().create_future()
        try:
            # A shard with an equal unit may have been committed between this one's look and now.
            kept = await asyncio.to_thread(self.rows.find, [key]) if self.rows.was_kept(key) else {}
            outcome = kept.get(key) or await self._make(unit)
            await journal.append(key, outcome)
        except BaseException as error:
            del self._making[key]
            made.set_exception(error if isinstance(error, Exception) else asyncio.CancelledError())
            made.exception()  # nobody may have waited for it
            raise
        made.set_result(outcome)
        return outcome

    async def _make(self, unit: Any) -> Outcome:
        async with self._gate:
            await self.get_ready()
            if self._tried < FIRST_ALONE:
                async with self._first:
                    self._check_stopped()
                    if self._tried < FIRST_ALONE:  # those that have waited for the first ones need not be alone
                        outcome = await self.work(unit)
                        self._tried = FIRST_ALONE if outcome.error is None else self._tried + 1
                        return outcome
            return await self.work(unit)

    async def get_ready(self) -> None:
        """Await `prepare` if that has not been done; raises the reason if the stage has been stopped."""
        self._check_stopped()
        if self._prepared:
            return
        async with self._first:
            self._check_stopped()
            if not self._prepared:
                await self.prepare()
                self._prepared = True

    def _check_stopped(self) -> None:
        if self.tally.stopped is not None:
            raise self.tally.stopped


async def settle(coroutines: Iterable[Coroutine[Any, Any, Any]], limit: int | None = None) -> list[Any]:
    """Run coroutines, at most `limit` at once; after an error none is started, but those under way go on to their end.

    Unlike a bare `asyncio.gather`, an error does not abandon requests in flight that are already paid for. Raises the
    first error in time.
    """
    gate = asyncio.Semaphore(limit) if limit else contextlib.nullcontext()
    errors: list[BaseException] = []

    async def gated(coroutine: Coroutine[Any, Any, Any]) -> Any:
        async with gate:
            if errors:
                coroutine.close()
                return None
            try:
                return await coroutine
            except BaseException as error:
                errors.append(error)
                raise

    results = await asyncio.gather(*(gated(c) for c in coroutines), return_exceptions=True)
    if errors:
        raise errors[0]
    return results


def _shards_of(units: int, slices: Sequence[Slice]) -> int:
    """Return how many shards have so many units, with one that begins and one that ends."""
    size = max((part.rows for part in slices), default=1)
    return -(-units // size) + 2


class MergeCounts(BaseModel):
    """What a merge found: input rows, units, those that failed, and those of them that the next start asks again.

    `refused` counts the units that were made without a setting which the endpoint does not take, by its name.
    """

    rows: int = 0
    units: int = 0
    failed: int = 0
    passing: int = 0
    refused: Counter[str] = Field(default_factory=Counter)
    usage: Cost = Cost()

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Count one input row's outcomes."""
        self.rows += 1
        for outcome in outcomes:
            self.units += 1
            self.failed += outcome.error is not None
            self.passing += outcome.error is not None and not outcome.final
            self.refused.update(outcome.refused)
            self.usage += outcome.usage

    def named(self, *names: str) -> dict[str, int]:
        """Return the counts of `names`, and of each setting that was refused, as a manifest has them."""
        refused = {f"refused {setting}": count for setting, count in sorted(self.refused.items())}
        return {name: getattr(self, name) for name in names} | refused


def merge_shards(
    source: Sequence[Slice],
    shards: Sequence[ShardRef],
    rows: RowStore,
    units_of: Callable[[Row], Mapping[str, Any]],
    fit: Callable[[Any, Outcome], Outcome] = lambda _, outcome: outcome,
) -> Iterator[tuple[Row, list[Outcome]]]:
    """Yield each input row with the outcomes of its units, joined by their keys, in input order.

    Equal units are one: each row that has it gets its outcome, as `fit` has it for this unit, and only the first one
    its usage. Raises `PreflowError` if a shard does not hold exactly its slice's units.
    """
    counted: set[int] = set()
    for part, shard in zip(source, shards, strict=True):
        known = dict(rows.read_shard(shard))
        wanted: set[str] = set()
        for row in read_slice(rows.store, part):
            units = units_of(row)
            if missing := units.keys() - known.keys():
                raise PreflowError(f"{shard.uri}: lacks {len(missing)} of its rows; delete this file and run again")
            outcomes = [fit(unit, known[key]) for key, unit in units.items()]
            for place, key in enumerate(units):
                if hash(key) in counted:
                    outcomes[place] = outcomes[place].model_copy(update={"usage": Cost()})
            counted.update(map(hash, units))
            wanted |= units.keys()
            yield row, outcomes
        if others := known.keys() - wanted:
            raise PreflowError(f"{shard.uri}: holds {len(others)} rows of others; delete this file and run again")
