"""Runs that share a process, and waiting without one: a run that ends for now and is started again later.

A run of a deployment is started by whoever serves it when its state is a scheduled one whose time has come. So it may
leave: what was paid for is kept, its stages are found finished, and what it waits for stands in its state. A run of a
script has nobody to start it again.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import NoReturn

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.exceptions import Pause
from prefect.states import Scheduled

# So long a run stays away before it looks again: a batch takes minutes to hours, a start half a minute.
AWAY_SECONDS = 600.0
STATE = "AwaitingBatch"
# Held in turn by the runs that are under way in this process at once; None where there is one.
_turns: ContextVar[asyncio.Lock | None] = ContextVar("turns", default=None)
logger = logging.getLogger(__name__)


@asynccontextmanager
async def sharing_endpoints(at_once: int) -> AsyncIterator[None]:
    """Have the runs that are under way at once in the block take `endpoint_lock` one after another."""
    token = _turns.set(asyncio.Lock() if at_once > 1 else None)
    try:
        yield
    finally:
        _turns.reset(token)


@asynccontextmanager
async def endpoint_lock() -> AsyncIterator[None]:
    """Serialise sampling and judging across the points of a sweep: later points find what earlier ones have asked."""
    async with _turns.get() or nullcontext():
        yield


async def may_leave() -> bool:
    """Tell whether nothing else is under way here, and the server starts this run again when it has left."""
    if _turns.get() is not None:  # a second process must not run the others as well
        return False
    async with get_client() as client:
        runs = await _with_parents(client)
    return bool(runs) and runs[-1].deployment_id is not None


def has_left() -> bool:
    """Tell whether this run has left before: what it needs was checked at its first start."""
    context = FlowRunContext.get()
    return bool(context and context.flow_run and STATE in context.flow_run.tags)


async def leave(reason: object) -> NoReturn:
    """End this run for now, and those that it is a part of; all are started again in `AWAY_SECONDS`."""
    again = datetime.now(UTC) + timedelta(seconds=AWAY_SECONDS)
    message = f"{reason}; looked at again at {again:%H:%M} UTC"
    logger.info("%s; until then this run has no process", message)
    state: State[object] = Scheduled(name=STATE, scheduled_time=again, message=message)
    async with get_client() as client:
        for run in await _with_parents(client):
            await client.update_flow_run(run.id, tags=[*{*run.tags, STATE}])
            await client.set_flow_run_state(run.id, state)
    raise Pause(state=state)


async def _with_parents(client: PrefectClient) -> list[FlowRun]:
    """Return this flow run and those that it is a part of, up to the one that has this process to itself."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    runs: list[FlowRun] = []
    while run is not None:
        runs.append(run)
        if run.deployment_id is not None:  # whoever had it started runs elsewhere, and waits
            break
        task = await client.read_task_run(run.parent_task_run_id) if run.parent_task_run_id else None
        run = await client.read_flow_run(task.flow_run_id) if task and task.flow_run_id else None
    return runs
