"""Training on a work pool, as a run of a deployment: started once, found again, followed to its end."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect.artifacts import acreate_link_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.client.schemas.objects import FlowRun, State, StateType, WorkPool
from prefect.deployments import arun_deployment
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.runtime import flow_run as this_run
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelling, Crashed
from prefect.utilities.urls import url_for
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_fixed

from tasks.batch.caching import mark_used
from tasks.config import PipelineConfig, TrainingConfig
from tasks.errors import PreflowError
from tasks.store.workspace import AdapterRef, PreferencesRef, Workspace, digest
from tasks.train.deployment import FLOW
from tasks.train.launch import find_adapter, training_key
from tasks.train.pods import PodWatch

logger = logging.getLogger(__name__)
T = TypeVar("T")

POLL_SECONDS = 5.0
OUTAGE_SECONDS = 5.0
SILENT_SECONDS, SILENT_LEASES = 600.0, 10
FIRST_RESTART_SECONDS, LONGEST_RESTART_SECONDS = 15.0, 300.0


async def train_on_pool(preferences: PreferencesRef, config: PipelineConfig) -> AdapterRef:
    """Return the adapter of a pipeline's training, by `obtain_adapter`."""
    mark_used(preferences, config.workspace)
    return await obtain_adapter(TrainingOrder.of(preferences, config))


async def obtain_adapter(order: "TrainingOrder") -> AdapterRef:
    """Return the adapter of a training that runs on a work pool; one that is under way is joined, not started again.

    A run that crashed is followed by another one, from the last checkpoint. The training goes on when this process is
    killed, and whoever asks for it next finds it. It is cancelled when the flow run that waits here is cancelled.
    """
    if adapter := order.find_adapter():
        logger.info("the adapter is finished: %s asks nobody", order.deployment)
        return adapter
    crashes = 0
    while True:
        run = await retry_while_api_is_down(order.start_or_join)
        with _cancelled_together(run):
            run = await _follow(run, order)
        if adapter := order.find_adapter():
            return adapter
        crashes += 1
        if not _state(run).is_crashed() or crashes > order.max_restarts:
            raise PreflowError(_what_happened(run, order, crashes))
        delay = min(LONGEST_RESTART_SECONDS, FIRST_RESTART_SECONDS * 2 ** (crashes - 1))
        why = _state(run).message
        logger.warning("the training crashed (%s); restart %d of %d in %.0f s", why, crashes, order.max_restarts, delay)
        await asyncio.sleep(delay)


@dataclass(frozen=True)
class TrainingOrder:
    """One training as it is asked of a deployment; `job_variables` override the work pool's."""

    deployment: str
    preferences: PreferencesRef
    workspace: str
    training: TrainingConfig
    max_restarts: int
    job_variables: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, preferences: PreferencesRef, config: PipelineConfig) -> "TrainingOrder":
        """Return what a pipeline asks for."""
        deployment = str(config.training_deployment)
        return cls(deployment, preferences, config.workspace, config.training, config.max_restarts)

    @cached_property
    def key(self) -> str:
        """The training's key: equal orders train the same, in the same folder."""
        return training_key(self.preferences, self.training)

    def find_adapter(self) -> AdapterRef | None:
        """Return the adapter from the workspace, if it is finished; what a run returned is never read."""
        return find_adapter(Workspace(self.workspace), self.key)

    def heartbeat(self) -> object:
        """Return what the training's lease says now: it changes for as long as the trainer lives."""
        store = Workspace(self.workspace)
        lease = store.uri("training", self.key, "lease.json")
        try:
            return store.read_bytes(lease) if store.exists(lease) else None
        except Exception:
            logger.warning("%s cannot be read now; that says nothing of the training", lease, exc_info=True)
            return object()

    def attempt_key(self, attempt: int) -> str:
        """Return the idempotency key under which everybody finds the same run."""
        return f"{digest([self.deployment, self.workspace, self.key])[:32]}-{attempt}"

    async def start_or_join(self) -> FlowRun:
        """Return the run that trains: the one that is under way, or a new one.

        A run that ended without an adapter stays as it is, for its log, and the next attempt gets a run of its own. Two
        who ask at the same moment ask for the same attempt, and so get the same run.
        """
        runs = await self.runs()
        if not runs or (state := _state(runs[-1])).is_final() or state.is_cancelling():
            return await self._start(len(runs))
        logger.info("joining the training run %r, which is %s", runs[-1].name, state.name)
        return runs[-1]

    async def runs(self) -> list[FlowRun]:
        """Return the runs of all attempts so far, the newest last."""
        found, flow = list[FlowRun](), FlowFilter(name=FlowFilterName(any_=[FLOW]))
        async with get_client() as client:
            while True:
                key = FlowRunFilterIdempotencyKey(any_=[self.attempt_key(len(found))])
                wanted = FlowRunFilter(idempotency_key=key)
                run = await client.read_flow_runs(flow_filter=flow, flow_run_filter=wanted, limit=1)
                if not run:
                    return found
                found += run

    async def _start(self, attempt: int) -> FlowRun:
        parameters = {
            "preferences": self.preferences.model_dump(mode="json"),
            "workspace": self.workspace,
            "training": self.training.model_dump(mode="json"),
        }
        run = await arun_deployment(
            self.deployment, parameters=parameters, idempotency_key=self.attempt_key(attempt), timeout=0,
            job_variables=dict(self.job_variables),
        )  # fmt: skip
        logger.info("asked %s to train, as run %r", self.deployment, run.name)
        return run


def _state(run: FlowRun) -> State[Any]:
    if run.state is None:
        raise RuntimeError(f"the Prefect server shows flow run {run.id} without a state")
    return run.state


async def retry_while_api_is_down(call: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """Return what the call returns, calling again for as long as the Prefect server does not answer."""

    def is_outage(error: BaseException) -> bool:
        if isinstance(error, httpx.HTTPStatusError):
            return error.response.status_code >= 500
        is_away = isinstance(error, RuntimeError) and "Failed to reach API" in str(error)
        return is_away or isinstance(error, httpx.TransportError)

    def say(state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            why = state.outcome.exception()
            logger.warning("the Prefect server does not answer (%s); waiting, the training goes on", why)

    retrying = AsyncRetrying(
        retry=retry_if_exception(is_outage), wait=wait_fixed(OUTAGE_SECONDS), before_sleep=say, reraise=True
    )
    answer: T = await retrying(call, *arguments)
    if retrying.statistics["attempt_number"] > 1:
        seconds = time.monotonic() - retrying.statistics["start_time"]
        logger.info("the Prefect server answers again after %.0f s", seconds)
    return answer


async def _follow(run: FlowRun, order: TrainingOrder) -> FlowRun:
    """Wait until a run is over, and return it; link to it, for it shows its progress, and log its states."""
    if (address := url_for(run)) is not None:
        about = f"The training, on {order.deployment}."
        await retry_while_api_is_down(partial(acreate_link_artifact, address, link_text=run.name, description=about))
    pool, job_variables = await retry_while_api_is_down(_read_pool, run, order.deployment)
    pods = PodWatch.of(run.id, pool, job_variables | dict(order.job_variables))
    limit = max(SILENT_SECONDS, SILENT_LEASES * order.training.lease_seconds)
    said, heard, since = None, None, time.monotonic()
    while True:
        run = await retry_while_api_is_down(_read, run.id)
        state = _state(run)
        if state.id != said:
            said = state.id
            waits = state.type is StateType.SCHEDULED and state.name in ("Scheduled", "Late")
            more = ", waiting for a worker" if waits else f" ({state.message})" if state.message else ""
            logger.info("%s, run %r: %s%s", order.deployment, run.name, state.name, more)
        if state.is_final():
            return run
        if (heartbeat := (said, order.heartbeat() if state.is_running() else None)) != heard:
            heard, since = heartbeat, time.monotonic()
        quiet = time.monotonic() - since
        if pods is not None:
            await pods.say(quiet)
        # Nobody else would report it: its worker is gone with it. On Kubernetes a lost pod is replaced, however late.
        begun = state.type in (StateType.PENDING, StateType.RUNNING)
        if pool is not None and pool.type == "process" and begun and quiet > limit:
            await retry_while_api_is_down(_mark_crashed, run)
        await asyncio.sleep(POLL_SECONDS)


async def _read(run_id: UUID) -> FlowRun:
    async with get_client() as client:
        try:
            return await client.read_flow_run(run_id)
        except ObjectNotFound as error:
            raise PreflowError(
                f"the training run {run_id} was deleted from the Prefect server. Run again: what it had saved is kept"
            ) from error


async def _read_pool(run: FlowRun, deployment: str) -> tuple[WorkPool | None, dict[str, Any]]:
    """Return a run's work pool, and what its deployment changes of the pool's settings."""
    async with get_client() as client:
        pool = await client.read_work_pool(run.work_pool_name) if run.work_pool_name else None
        return pool, (await client.read_deployment_by_name(deployment)).job_variables


async def _mark_crashed(run: FlowRun) -> None:
    async with get_client() as client:
        reason = "No sign of life: its machine, or its worker and its process, are gone."
        await client.set_flow_run_state(run.id, Crashed(message=reason))


def _what_happened(run: FlowRun, order: TrainingOrder, crashes: int) -> str:
    state = _state(run)
    where = f"Its run is {url_for(run) or run.id}"
    store = Workspace(order.workspace)
    if store.exists(log := store.uri("training", order.key, "train.log")):
        where += f" and its log {log}"
    again = "run again: what it had saved is kept, and a new training run goes on from there"
    if state.is_completed():
        return (
            f"{order.deployment} says that it has trained, but there is no adapter in {order.workspace} as it is seen "
            f"from here. {where}. If it runs on another machine, give a workspace that both see (gs://bucket/prefix). "
            "If they do, its image is of another commit, and so is its key: set `image` in the pool's settings."
        )
    if state.is_cancelled():
        return f"the training on {order.deployment} was cancelled ({state.message}). {where}. To go on, {again}."
    if state.is_crashed():
        return (
            f"the training on {order.deployment} crashed {crashes} times, over max_restarts ({order.max_restarts}); "
            f"the last time: {state.message} {where}. Fix the cause, or raise max_restarts, and {again}."
        )
    reason = str(state.message).removeprefix("Flow run encountered an exception: ").removeprefix("PreflowError: ")
    return f"the training on {order.deployment} failed: {reason}\n{where}. Fix the cause and {again}."


@contextmanager
def _cancelled_together(run: FlowRun) -> Iterator[None]:
    """Cancel the training if this run is cancelled while the block runs; if this process is only stopped, leave it."""
    mine = {UUID(run_id) for run_id in (this_run.get_id(), this_run.get_root_flow_run_id()) if run_id}
    try:
        yield
    except Exception:
        raise
    except BaseException:
        try:
            _cancel_if_this_is(run, mine)
        except (httpx.HTTPError, PrefectException) as error:
            logger.warning("the training run %s goes on: the Prefect server does not answer (%s)", run.id, error)
        raise


def _cancel_if_this_is(run: FlowRun, mine: set[UUID]) -> None:
    """Cancel a run if one of `mine` is; a preempted process has little time, and perhaps no event loop any more."""
    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(httpx_settings={"timeout": 3.0}, sync_client=True) as client,
    ):
        states = [_state(client.read_flow_run(run_id)) for run_id in mine]
        if not any(state.is_cancelling() or state.is_cancelled() for state in states):
            logger.warning("stopped; the training goes on without this run: %s", url_for(run) or run.id)
            return
        client.set_flow_run_state(run.id, Cancelling(message="The run that waits for the adapter was cancelled."))
        logger.warning("cancelled, and the training with it: %s", url_for(run) or run.id)
