"""Taking a machine away from a training: a process here, a run of a process pool, a pod of a Kubernetes pool."""

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias, TypeVar, cast

import psutil
from aiohttp import ClientError
from kubernetes_asyncio import client as kubernetes
from kubernetes_asyncio.stream import WsApiClient

from tasks.errors import PreflowError
from tasks.store.workspace import AdapterRef, Workspace
from tasks.train.launch import Preempted, run_training
from tasks.train.pods import OVER, cluster_settings
from tasks.train.spec import TrainingPaths
from tasks.train.work_pool import TrainingOrder, obtain_adapter
from tasks.trainer.lease import is_dead

logger = logging.getLogger(__name__)
C = TypeVar("C", bound=kubernetes.ApiClient)

POLL_SECONDS, POD_SECONDS = 0.05, 1.0
# Everything in the container but its first process, which no signal from inside kills, and which ends with its child.
KILL_ALL = ["sh", "-c", "kill -KILL -1"]


class Kind(StrEnum):
    """How a training is interrupted."""

    NOTICE = "SIGTERM"
    AT_ONCE = "SIGKILL"


@dataclass
class ProcessTarget:
    """A training in a child of this process, or as a run of a process worker on this machine."""

    grace_seconds: float
    is_deployed: bool
    _over: threading.Event = field(default_factory=threading.Event)

    async def train(self, order: TrainingOrder) -> AdapterRef:
        """Train as the pipeline does, or in a thread that starts the child again after every preemption."""
        if self.is_deployed:
            return await obtain_adapter(order)
        try:
            return await asyncio.to_thread(self._train, order)
        except asyncio.CancelledError:
            self._over.set()
            _signal([find_trainer(order)], signal.SIGTERM)
            raise

    def _train(self, order: TrainingOrder) -> AdapterRef:
        while True:
            try:
                return run_training(order.preferences, order.workspace, order.training, order.key)
            except Preempted as reason:
                if self._over.is_set():
                    raise
                logger.info("preempted (%s); started again", reason)

    async def preempt(self, order: TrainingOrder, kind: Kind) -> None:
        """Signal the run's process, or the trainer where there is no run; both if they are to vanish at once."""
        trainer = find_trainer(order)
        if trainer is None:
            raise PreflowError("no trainer holds the lease on this machine: the work pool's worker must run here, too")
        processes = [trainer]
        if self.is_deployed:
            processes.insert(0, int(str((await order.runs())[-1].infrastructure_pid).rpartition(":")[2]))
        if kind is Kind.NOTICE:
            _signal(processes[:1], signal.SIGTERM)
            await _gone(processes, self.grace_seconds)
        _signal(processes, signal.SIGKILL)
        await _gone(processes)


@dataclass(frozen=True)
class PodTarget:
    """A training as a pod on Kubernetes, evicted as a spot node's pods are, or killed; its Job starts another one."""

    grace_seconds: float
    namespace: str

    async def train(self, order: TrainingOrder) -> AdapterRef:
        """Train as the pipeline does; the Job brings a new pod by itself."""
        return await obtain_adapter(order)

    async def preempt(self, order: TrainingOrder, kind: Kind) -> None:
        """Evict the run's pod with its grace, or kill all processes in its container; wait until it is over."""
        run = (await order.runs())[-1]
        async with self._cluster(kubernetes.ApiClient) as connection:
            api = kubernetes.CoreV1Api(connection)
            pod = await self._running_pod(api, f"prefect.io/flow-run-id={run.id}")
            if kind is Kind.NOTICE:
                eviction = kubernetes.V1Eviction(
                    metadata=kubernetes.V1ObjectMeta(name=pod, namespace=self.namespace),
                    delete_options=kubernetes.V1DeleteOptions(grace_period_seconds=int(self.grace_seconds)),
                )
                await api.create_namespaced_pod_eviction(pod, self.namespace, eviction)
            else:
                await self._kill(pod)
            while await self._is_there(api, pod):  # noqa: ASYNC110  a pod sets no event
                await asyncio.sleep(POD_SECONDS)

    async def _kill(self, pod: str) -> None:
        async with self._cluster(WsApiClient) as connection:
            # The annotation knows one word; the websocket client takes a list and the API wants one.
            await kubernetes.CoreV1Api(connection).connect_get_namespaced_pod_exec(
                pod, self.namespace, command=cast(str, KILL_ALL), stderr=True, stdin=False, stdout=True, tty=False,
            )  # fmt: skip

    @asynccontextmanager
    async def _cluster(self, kind: type[C]) -> AsyncIterator[C]:
        """Yield a connection to the cluster; what it refuses becomes a message."""
        try:
            async with kind(await cluster_settings()) as connection:
                yield connection
        except (ClientError, kubernetes.ApiException, OSError) as error:
            status = getattr(error, "status", None)
            said = f"{status} {getattr(error, 'reason', None) or getattr(error, 'message', '')}" if status else error
            raise PreflowError(
                f"the cluster does not do what the drill asks in namespace {self.namespace}: {said}. It "
                "lists and reads pods, and creates pods/eviction and pods/exec: see `kubectl auth can-i` and KUBECONFIG"
            ) from error

    async def _running_pod(self, api: kubernetes.CoreV1Api, selector: str) -> str:
        pods = await api.list_namespaced_pod(self.namespace, label_selector=selector)
        for pod in pods.items:
            if pod.status.phase == "Running" and not pod.metadata.deletion_timestamp:
                return str(pod.metadata.name)
        raise PreflowError(
            f"no running pod with {selector} in namespace {self.namespace}: is that the work pool's namespace?"
        )

    async def _is_there(self, api: kubernetes.CoreV1Api, pod: str) -> bool:
        try:
            return (await api.read_namespaced_pod(pod, self.namespace)).status.phase not in OVER
        except kubernetes.ApiException as error:
            if error.status == 404:
                return False
            raise


Target: TypeAlias = ProcessTarget | PodTarget


def find_trainer(order: TrainingOrder) -> int | None:
    """Return the pid of the process that holds the training's lease, if it lives on this machine."""
    store = Workspace(order.workspace)
    lease = TrainingPaths.of(store.root, order.key).lease
    holder: dict[str, Any] = store.read_json(lease) if store.exists(lease) else {}
    process = str(holder.get("process", ""))
    if holder.get("released", True) or process.count("/") != 3 or is_dead(process):
        return None
    return int(process.split("/")[2])


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(processes: list[int] | list[int | None], number: int) -> None:
    """Signal the process groups of these processes."""
    for pid in processes:
        with suppress(ProcessLookupError):
            if pid is not None:
                os.killpg(os.getpgid(pid), number)


async def _gone(processes: list[int], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while any(map(_lives, processes)) and time.monotonic() < deadline:  # noqa: ASYNC110  nor does another process
        await asyncio.sleep(POLL_SECONDS)
