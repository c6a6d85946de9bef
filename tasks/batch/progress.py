"""What all stages of shards have in common: the task policy, running the shards, and showing progress and cost."""

import asyncio
import gc
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from prefect import Task, task
from prefect.artifacts import acreate_progress_artifact, aupdate_progress_artifact
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Cancelled
from prefect.tasks import exponential_backoff
from prefect.transactions import get_transaction
from prefect.utilities.annotations import opaque

from tasks.batch import leaving
from tasks.batch.caching import cached, open_results
from tasks.batch.costs import CostLog, format_seconds, format_usd
from tasks.batch.rows import Outcome, ShardRef, Slice
from tasks.batch.shards import ShardWorker, Tally, TooManyFailures
from tasks.errors import PreflowError
from tasks.llm.batches import BatchPending
from tasks.llm.client import Endpoint
from tasks.llm.responses import price, shorten

LOG_SECONDS = 10.0
ARTIFACT_SECONDS = 5.0
# The cost of a stage is projected from so many answers, and that may be wrong by such a share.
PROJECTED_FROM = 20
PROJECTION_ERROR = 0.25
logger = logging.getLogger(__name__)


async def is_worth_retrying(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Tell whether a failed task may succeed next time: not after an error that the user must fix."""
    error = await state.aresult(raise_on_failure=False)
    return not isinstance(error, PreflowError)


def shard_task(verb: str) -> Task[..., Any]:
    """Return the task that makes one shard of a stage.

    Requests are retried by the endpoint's client; its own attempts are for what lies around them, such as storage.
    """

    @task(
        name=f"{verb}-shard",
        task_run_name=f"{verb} {{label}}",
        retries=3,
        retry_delay_seconds=exponential_backoff(backoff_factor=2),
        retry_jitter_factor=0.5,
        retry_condition_fn=is_worth_retrying,
    )
    async def make_shard(label: str, part: Slice, worker: ShardWorker) -> dict[str, object] | State[Any]:
        try:
            return (await worker.run(part)).model_dump()
        except BatchPending as pending:  # the server starts the run again, which makes this shard then
            if (transaction := get_transaction()) is not None:
                transaction.write_on_commit = False  # else None is written as the shard's result
            return Cancelled(name=leaving.STATE, message=str(pending))

    return make_shard


async def run_shards(
    verb: str, slices: Sequence[Slice], worker: ShardWorker, endpoint: Endpoint, costs: CostLog
) -> list[ShardRef]:
    """Run every shard as a cached task, with as many open as keep the window of requests full.

    Raises:
        PreflowError: a shard failed for a reason that the user can fix, or too much failed for good; what was
            finished is kept.
    """
    results, shell = await open_results(worker.rows.store.root), shard_task(verb)
    monitor = Monitor(f"{shell.name} ({endpoint.config.model})", worker.tally, endpoint, costs)
    worker.watch = monitor.count

    async def make(part: Slice, refresh: bool = False) -> ShardRef:
        shard = cached(shell, worker.rows.shard_key(part), results, refresh)
        made = await shard(opaque(f"{part.index + 1} of {len(slices)}"), opaque(part), opaque(worker))
        if isinstance(made, State) and worker.tally.stopped:
            raise worker.tally.stopped
        return ShardRef.model_validate(made)

    async def run_one(part: Slice) -> ShardRef:
        shard = await make(part)
        if shard.passing and part.index not in worker.tally.shards:  # of an earlier start: what failed is asked again
            shard = await make(part, refresh=True)
        worker.tally.take(part, shard)
        return shard

    # What is loaded by now stays: else the collector goes through it again and again, for a fifth of the stage's CPU.
    gc.collect()
    gc.freeze()
    async with monitor.showing():
        try:
            if worker.rows.lacks(slices):
                await worker.get_ready()
            shards = await worker.run_all(slices, run_one)
            if worker.tally.stopped:
                raise worker.tally.stopped
        except TooManyFailures as reason:
            where = f"{costs.folder}/failures.jsonl"
            raise refuse_failures(where, worker, endpoint.config.max_failure_ratio) from reason
    return shards


async def try_question(stage: str, endpoint: Endpoint, answering: Awaitable[Outcome]) -> None:
    """Await the answer to one real question before a stage is paid for, and say what such a question takes.

    Raises `PreflowError`, with the reason, if the answer is of no use.
    """
    config, outcome = endpoint.config, await answering
    if outcome.error is not None:
        raise PreflowError(
            f"{stage}: {config.endpoint} (model {config.model}) did not answer a trial question: "
            f"{_cause(outcome.error)}. Nothing else was asked."
        )
    usage = price(outcome.usage, config)
    logger.info(
        "%s: %s answers; the trial question took %d prompt and %d completion tokens (%d of thinking), %s US$",
        stage, config.model, usage.prompt_tokens, usage.completion_tokens, usage.thinking_tokens,
        format_usd(usage.usd),
    )  # fmt: skip


def _cause(failure: Mapping[str, object]) -> str:
    reason, detail = str(failure.get("reason")), str(failure.get("detail"))[:300]
    return reason if detail == reason else f"{reason}: {detail}"


def refuse_failures(where: str, worker: ShardWorker, allowed: float) -> PreflowError:
    """Write the failures to the file `where`, have the next run try them again, and return the error."""
    tally = worker.tally
    with worker.rows.store.writing(where) as out:
        for failure in tally.failures:
            out.write_row(failure)
    worker.rows.forget_failures()
    first = tally.failures[0] if tally.failures else {}
    return PreflowError(
        f"{tally.failed} of {tally.total} requests failed for good, over max_failure_ratio ({allowed:.1%}); the first: "
        f"{_cause(first)}. All of them are in {where}. What succeeded is kept. Fix the "
        "cause and run again, only the others are asked for; or raise max_failure_ratio to go on without them."
    )


class Monitor:
    """Shows how far a stage is and what it costs, and stops one that is going to cost far more than its budget."""

    def __init__(self, name: str, tally: Tally, endpoint: Endpoint, costs: CostLog) -> None:
        self._name, self._tally, self._endpoint, self._costs = name, tally, endpoint, costs
        self._start = time.monotonic()
        self._noting = threading.Lock()  # so that an older note never replaces a newer one
        self._made = 0
        self._per_unit: float | None = None

    def count(self) -> None:
        """Note that one more unit was made; after the first ones, say what all will cost.

        Raises `PreflowError` if that is far over the budget.
        """
        self._made += 1
        if self._made != PROJECTED_FROM:
            return
        stats, config = self._endpoint.stats, self._endpoint.config
        self._per_unit = stats.spent_usd / self._made
        to_go = self._tally.total - self._tally.done
        tokens = stats.usage.prompt_tokens + stats.usage.completion_tokens
        priced = config.prompt_price or config.completion_price
        cost = f"all of it about {format_usd(self._projected())} US$" if priced else "no price is set"
        logger.info(
            "%s: going by the first %d, the other %d will take about %s tokens; %s", self._name, self._made,
            to_go, f"{tokens / self._made * to_go:,.0f}", cost,
        )  # fmt: skip
        if config.budget_usd is not None and self._projected() * (1 - PROJECTION_ERROR) > config.budget_usd:
            stop = PreflowError(
                f"{self._name} is going to cost about {format_usd(self._projected())} US$, going by its first "
                f"{self._made} requests ({format_usd(stats.spent_usd)} US$), and budget_usd leaves "
                f"{format_usd(config.budget_usd)}. It was stopped here and what was answered is kept: raise budget_usd "
                "and run again, or take fewer prompts or a cheaper model."
            )
            self._tally.stop(stop)
            raise stop

    def _projected(self) -> float:
        """What this attempt will have cost at its end, in US$."""
        to_go = self._tally.total - self._tally.done
        return self._endpoint.stats.spent_usd + (self._per_unit or 0.0) * to_go

    @asynccontextmanager
    async def showing(self) -> AsyncIterator[None]:
        """Log rate, ETA, failures and cost during the block, keep a progress artifact, and note what was spent."""
        artifact = await acreate_progress_artifact(progress=0.0, description=self.describe())
        reporter = asyncio.create_task(self._report(artifact))
        try:
            yield
        finally:
            reporter.cancel()
            await asyncio.gather(reporter, return_exceptions=True)
            await self._update(artifact)
            logger.info("%s", self.describe())

    async def _report(self, artifact: UUID) -> None:
        logged = time.monotonic()
        while True:
            await asyncio.sleep(ARTIFACT_SECONDS)
            await self._update(artifact)
            if time.monotonic() - logged >= LOG_SECONDS:
                logged = time.monotonic()
                logger.info("%s", self.describe())

    async def _update(self, artifact: UUID) -> None:
        """Update the artifact and note what was spent; neither is worth a paid stage, whatever it fails with."""
        share = min(100.0, 100.0 * self._tally.done / max(1, self._tally.total))
        show = aupdate_progress_artifact(artifact, progress=share, description=self.describe())
        for error in await asyncio.gather(show, asyncio.to_thread(self._note), return_exceptions=True):
            if isinstance(error, Exception):
                logger.warning("%s: progress or cost could not be written (%s)", self._name, shorten(repr(error)))

    def _note(self) -> None:
        with self._noting:
            stats = self._endpoint.stats
            if stats.sent:
                self._costs.note(stats.usage.model_copy(update={"usd": round(stats.spent_usd, 9)}))

    def describe(self) -> str:
        """Return one line: done of all, rate, failures, time to go and cost."""
        tally, seconds = self._tally, max(1e-6, time.monotonic() - self._start)
        parts = [f"{self._name}: {tally.done:,} of {tally.total:,}"]
        if self._made:
            rate = self._made / seconds
            parts += [f"{rate:.1f}/s", f"about {format_seconds((tally.total - tally.done) / rate)} to go"]
        if tally.done > self._made:
            parts.append(f"{tally.done - self._made:,} known before")
        parts.append(f"{tally.failed:,} failed")
        if spent := self._endpoint.stats.spent_usd:
            about = f" of about {format_usd(self._projected())}" if self._per_unit is not None else ""
            parts.append(f"{format_usd(spent)}{about} US$")
        return ", ".join(parts)
