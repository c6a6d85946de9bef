"""What all stages of shards have in common: the task policy, running shards within a window, and showing progress."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypedDict
from uuid import UUID

from prefect import Task
from prefect.artifacts import acreate_progress_artifact, aupdate_progress_artifact
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import exponential_backoff
from prefect.utilities.annotations import opaque

from tasks.caching import cached, open_results
from tasks.errors import PreflowError
from tasks.shards import ShardRef, ShardWorker, Slice, Tally, open_shards, settle

LOG_SECONDS = 10.0
ARTIFACT_SECONDS = 5.0
logger = logging.getLogger(__name__)


async def is_worth_retrying(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Tell whether a failed task may succeed next time: not after an error that the user must mend."""
    error = await state.aresult(raise_on_failure=False)
    return not isinstance(error, PreflowError)


class TaskPolicy(TypedDict):
    """Retry settings of a Prefect task."""

    retries: int
    retry_delay_seconds: Callable[[int], list[float]]
    retry_jitter_factor: float
    retry_condition_fn: Callable[[Task[..., Any], TaskRun, State[Any]], Coroutine[Any, Any, bool]]


# Requests are retried by the endpoint client; this is for what lies around them, such as storage.
SHARD_POLICY: TaskPolicy = {
    "retries": 3,
    "retry_delay_seconds": exponential_backoff(backoff_factor=2),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": is_worth_retrying,
}


class Plan(Protocol):
    """A stage's plan, as far as running its shards needs it."""

    @property
    def workspace(self) -> str:
        """Where the artifacts are kept."""

    @property
    def slices(self) -> list[Slice]:
        """The shards' input."""

    def shard_key(self, part: Slice) -> str:
        """Return the content key of one shard."""


async def run_shards(
    shell: Task[..., Any], plan: Plan, worker: ShardWorker, max_concurrency: int
) -> list[ShardRef]:
    """Run every shard as a cached task, with as many open as keep the window of requests full.

    Raises:
        PreflowError: a shard failed for a reason that the user can mend; what was finished is kept.
    """
    results = await open_results(plan.workspace)

    async def run_one(part: Slice) -> ShardRef:
        label = f"{part.index + 1} of {len(plan.slices)}"
        made = worker.tally.done
        record = await cached(shell, plan.shard_key(part), results)(opaque(label), opaque(part), opaque(worker))
        if worker.tally.done == made:
            worker.tally.done += part.rows
        return ShardRef.model_validate(record)

    async with showing(worker.tally, shell.name):
        return await settle((run_one(part) for part in plan.slices), open_shards(max_concurrency, plan.slices))


@asynccontextmanager
async def showing(tally: Tally, name: str) -> AsyncIterator[None]:
    """Log a stage's rate, ETA and failures while it runs, and keep a progress artifact of it in the UI."""
    artifact = await acreate_progress_artifact(progress=0.0, description=f"{name}: {tally.total} rows")
    reporter = asyncio.create_task(_report(tally, name, artifact))
    try:
        yield
    finally:
        reporter.cancel()
        await asyncio.gather(reporter, return_exceptions=True)
        await aupdate_progress_artifact(artifact, progress=_percent(tally))
        logger.info("%s: %d of %d rows, %d made now, %d failed", name, tally.done, tally.total, tally.made,
                    tally.failed)


async def _report(tally: Tally, name: str, artifact: UUID) -> None:
    start = logged = time.monotonic()
    while True:
        await asyncio.sleep(ARTIFACT_SECONDS)
        await aupdate_progress_artifact(artifact, progress=_percent(tally))
        now = time.monotonic()
        if now - logged >= LOG_SECONDS and tally.made:
            logged, rate = now, tally.made / (now - start)
            logger.info("%s: %d of %d rows, %.1f rows/s, %d failed, about %.0f s to go", name, tally.done, tally.total,
                        rate, tally.failed, (tally.total - tally.done) / rate)


def _percent(tally: Tally) -> float:
    return min(100.0, 100.0 * tally.done / max(1, tally.total))
