"""Taking a machine away from a training: a process here, a run of a process pool, a pod of a Kubernetes pool."""

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from typing import Protocol

from kubernetes_asyncio import client as kubernetes
from kubernetes_asyncio import config as kubernetes_config
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun

from tasks.config import DrillConfig
from tasks.errors import PreflowError
from tasks.store.workspace import AdapterRef, Workspace
from tasks.train.deployment import read_deployment
from tasks.train.launch import Preempted, run_training
from tasks.train.spec import TrainingPaths
from tasks.train.work_pool import TrainingOrder, obtain_adapter
from tasks.trainer.lease import is_dead

logger = logging.getLogger(__name__)

GONE_SECONDS = 0.05
POD_SECONDS = 1.0


class Kind(StrEnum):
    """How a machine is taken away."""

    NOTICE = "SIGTERM"
    AT_ONCE = "SIGKILL"


class Target(Protocol):
    """Where a training runs, and how it is preempted there."""

    async def train(self, order: TrainingOrder) -> AdapterRef:
        """Train to the end, going on after every preemption."""

    async def preempt(self, order: TrainingOrder, kind: Kind) -> None:
        """Take the machine away; returns when nothing of the training runs any more."""


async def choose_target(drill: DrillConfig) -> Target:
    """Return where the drill trains, by the type of the deployment's work pool.

    Raises:
        PreflowError: runs of such a pool cannot be preempted from here.
    """
    if drill.deployment is None:
        return LocalTarget(drill.grace_seconds)
    deployment = await read_deployment(drill.deployment)
    async with get_client() as client:
        pool = await client.read_work_pool(deployment.work_pool_name) if deployment.work_pool_name else None
    if pool is not None and pool.type == "process":
        return ProcessPoolTarget(drill.grace_seconds)
    if pool is not None and pool.type == "kubernetes":
        await kubernetes_config.load_config(config_file=drill.kubeconfig)
        return PodTarget(drill.namespace, drill.grace_seconds)
    kind = pool.type if pool else "no work pool"
    raise PreflowError(f"deployment {drill.deployment} runs on {kind}; the drill preempts process and kubernetes pools")


class LocalTarget:
    """A training in a child process of this one."""

    def __init__(self, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        self._over = threading.Event()

    async def train(self, order: TrainingOrder) -> AdapterRef:
        """Train in a thread, which starts the child again whenever it was preempted."""
        try:
            return await asyncio.to_thread(self._train, order)
        except asyncio.CancelledError:
            self._over.set()
            trainer = find_trainer(order)
            if trainer is not None:
                _signal_group(trainer, signal.SIGTERM)
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
        """Signal the trainer."""
        trainer = _trainer(order)
        if kind is Kind.NOTICE:
            _signal_group(trainer, signal.SIGTERM)
            await _gone(lambda: not _lives(trainer), self._grace_seconds)
        _signal_group(trainer, signal.SIGKILL)
        await _gone(lambda: not _lives(trainer))


class ProcessPoolTarget:
    """A training as a run of a process worker on this machine."""

    def __init__(self, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds

    async def train(self, order: TrainingOrder) -> AdapterRef:
        """Train as the pipeline does, which revives the run after every crash."""
        return await obtain_adapter(order)

    async def preempt(self, order: TrainingOrder, kind: Kind) -> None:
        """Signal the run's process, and its trainer if it is to vanish at once."""
        trainer = _trainer(order)
        engine = int(str((await _newest_run(order)).infrastructure_pid).rpartition(":")[2])
        if kind is Kind.NOTICE:
            _signal_group(engine, signal.SIGTERM)
            await _gone(lambda: not (_lives(engine) or _lives(trainer)), self._grace_seconds)
        for process in (engine, trainer):
            _signal_group(process, signal.SIGKILL)
        await _gone(lambda: not (_lives(engine) or _lives(trainer)))


class PodTarget:
    """A training as a pod on Kubernetes; it is evicted as a spot node's pods are, and its Job starts another one."""

    def __init__(self, namespace: str, grace_seconds: float) -> None:
        self._namespace = namespace
        self._grace_seconds = grace_seconds

    async def train(self, order: TrainingOrder) -> AdapterRef:
        """Train as the pipeline does; the Job brings a new pod by itself."""
        return await obtain_adapter(order)

    async def preempt(self, order: TrainingOrder, kind: Kind) -> None:
        """Evict the run's pod, with the grace or with none, and wait until it is gone."""
        run = await _newest_run(order)
        seconds = int(self._grace_seconds) if kind is Kind.NOTICE else 0
        async with kubernetes.ApiClient() as connection:
            api = kubernetes.CoreV1Api(connection)
            pod = await self._running_pod(api, run)
            name, uid = pod.metadata.name, pod.metadata.uid
            eviction = kubernetes.V1Eviction(
                metadata=kubernetes.V1ObjectMeta(name=name, namespace=self._namespace),
                delete_options=kubernetes.V1DeleteOptions(grace_period_seconds=seconds),
            )
            await api.create_namespaced_pod_eviction(name, self._namespace, eviction)
            logger.info("evicted pod %s with %d s of grace", name, seconds)
            while await self._is_there(api, name, uid):  # noqa: ASYNC110  a pod sets no event
                await asyncio.sleep(POD_SECONDS)

    async def _running_pod(self, api: kubernetes.CoreV1Api, run: FlowRun) -> kubernetes.V1Pod:
        selector = f"prefect.io/flow-run-id={run.id}"
        pods = await api.list_namespaced_pod(self._namespace, label_selector=selector)
        running = [pod for pod in pods.items if pod.status.phase == "Running" and not pod.metadata.deletion_timestamp]
        if not running:
            raise PreflowError(
                f"no running pod with {selector} in namespace {self._namespace}: is that the work pool's namespace, "
                "and may this user list pods there?"
            )
        return running[0]

    async def _is_there(self, api: kubernetes.CoreV1Api, name: str, uid: str) -> bool:
        try:
            pod = await api.read_namespaced_pod(name, self._namespace)
        except kubernetes.ApiException as error:
            if error.status != 404:
                raise
            return False
        return bool(pod.metadata.uid == uid and pod.status.phase not in ("Failed", "Succeeded"))


def find_trainer(order: TrainingOrder) -> int | None:
    """Return the pid of the process that holds the training's lease, if it lives on this machine."""
    store = Workspace(order.workspace)
    lease = TrainingPaths.of(store.root, order.key).lease
    holder = store.read_json(lease) if store.exists(lease) else {}
    process = str(holder.get("process", ""))
    if holder.get("released", True) or process.count("/") != 3 or is_dead(process):
        return None
    return int(process.split("/")[2])


def _trainer(order: TrainingOrder) -> int:
    trainer = find_trainer(order)
    if trainer is None:
        raise PreflowError("no trainer holds the lease on this machine: the work pool's worker must run here, too")
    return trainer


async def _newest_run(order: TrainingOrder) -> FlowRun:
    return (await order.runs())[-1]


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _signal_group(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(os.getpgid(pid), number)


async def _gone(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:  # noqa: ASYNC110  nor does another process
        await asyncio.sleep(GONE_SECONDS)
