"""Taking a machine away from a training: from a child of this process, or from a pod of a Kubernetes pool."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias, TypeVar, cast

from aiohttp import ClientError
from kubernetes_asyncio import client as kubernetes
from kubernetes_asyncio.stream import WsApiClient

from tasks.errors import PreflowError
from tasks.store.refs import AdapterRef
from tasks.store.workspace import Workspace
from tasks.train.launch import Preempted, run_training
from tasks.train.pods import ANSWER_SECONDS, OVER, cluster_settings
from tasks.train.work_pool import TrainingOrder, obtain_adapter
from tasks.trainer.lease import is_dead

logger = logging.getLogger(__name__)
T = TypeVar("T")

POLL_SECONDS, POD_SECONDS = 0.05, 1.0
# Verb and subresource of all that a drill asks of pods; over a websocket to execute is to get.
RIGHTS = (("list", ""), ("create", "eviction"), ("get", "exec"), ("create", "exec"))
# Everything in the container but its first process, which no signal from inside kills, and which ends with its child.
KILL_ALL = ["sh", "-c", "kill -KILL -1"]


class Kind(StrEnum):
    """How a training is interrupted."""

    NOTICE = "SIGTERM"
    AT_ONCE = "SIGKILL"


@dataclass(frozen=True)
class ChildTarget:
    """A training in a child of this process."""

    grace_seconds: float

    async def train(self, order: TrainingOrder) -> AdapterRef:
        """Train as the pipeline does, and start the child again after every preemption."""
        training = order.preferences, order.workspace, order.training, order.key
        while True:
            try:
                return await asyncio.to_thread(run_training, *training)
            except Preempted as reason:
                logger.info("preempted (%s); started again", reason)
            except asyncio.CancelledError:
                if trainer := _find_trainer(order):
                    _signal(trainer, signal.SIGTERM)
                raise

    async def preempt(self, order: TrainingOrder, kind: Kind) -> None:
        """Signal the trainer, and kill it when its grace is over."""
        trainer = _find_trainer(order)
        if trainer is None:
            raise PreflowError("no trainer holds the lease on this machine")
        notice = [(signal.SIGTERM, self.grace_seconds)] if kind is Kind.NOTICE else []
        for number, seconds in (*notice, (signal.SIGKILL, 60.0)):
            _signal(trainer, number)
            deadline = time.monotonic() + seconds
            while not is_dead(trainer) and time.monotonic() < deadline:  # noqa: ASYNC110  another process sets no event
                await asyncio.sleep(POLL_SECONDS)


def _find_trainer(order: TrainingOrder) -> str | None:
    """Return the process that holds the training's lease, as the lease names it, if it lives on this machine."""
    store = Workspace(order.workspace)
    lease = store.uri("training", order.key, "lease.json")
    holder = store.read_json(lease) if store.exists(lease) else {"released": True}
    process = str(holder.get("process", ""))
    return None if holder.get("released") or process.count("/") != 3 or is_dead(process) else process


def _signal(process: str, number: int) -> None:
    """Signal the group of a process that a lease names."""
    with suppress(ProcessLookupError):
        os.killpg(os.getpgid(int(process.split("/")[2])), number)


@dataclass(frozen=True)
class PodTarget:
    """A training as a pod on Kubernetes, evicted as a spot node's pods are, or killed; its Job starts another one."""

    grace_seconds: float
    namespace: str

    async def check(self) -> None:
        """See that the cluster lets this account take pods away.

        Raises:
            PreflowError: it does not, or cannot be asked.
        """
        async with kubernetes.ApiClient(await cluster_settings()) as connection:
            api = kubernetes.AuthorizationV1Api(connection)
            for verb, part in RIGHTS:
                right = kubernetes.V1ResourceAttributes(
                    namespace=self.namespace, verb=verb, resource="pods", subresource=part
                )
                spec = kubernetes.V1SelfSubjectAccessReviewSpec(resource_attributes=right)
                review = kubernetes.V1SelfSubjectAccessReview(spec=spec)
                answer = await self._answer(api.create_self_subject_access_review(review))
                if not answer.status.allowed:
                    raise PreflowError(
                        f"this account may not {f'{verb} pods {part}'.strip()} in namespace {self.namespace}, which "
                        "the drill needs, and the flow worker's never may: set KUBECONFIG to an administrator's"
                    )

    async def train(self, order: TrainingOrder) -> AdapterRef:
        """Train as the pipeline does; the Job brings a new pod by itself."""
        return await obtain_adapter(order)

    async def preempt(self, order: TrainingOrder, kind: Kind) -> None:
        """Evict the run's pod with its grace, or kill all processes in its container; wait until it is over."""
        selector = f"prefect.io/flow-run-id={(await order.runs())[-1].id}"
        settings = await cluster_settings()
        async with kubernetes.ApiClient(settings) as connection, WsApiClient(settings) as stream:
            api = kubernetes.CoreV1Api(connection)
            running = await self._pods(api, selector, leaving=False)
            if not running:
                raise PreflowError(
                    f"no running pod with {selector} in namespace {self.namespace}: is that the work pool's namespace?"
                )
            pod = running[0]
            if kind is Kind.NOTICE:
                grace = kubernetes.V1DeleteOptions(grace_period_seconds=int(self.grace_seconds))
                about = kubernetes.V1ObjectMeta(name=pod, namespace=self.namespace)
                eviction = kubernetes.V1Eviction(metadata=about, delete_options=grace)
                await self._answer(api.create_namespaced_pod_eviction(pod, self.namespace, eviction))
            else:
                # The annotation knows one word; the websocket client takes a list and the API wants one.
                kill = kubernetes.CoreV1Api(stream).connect_get_namespaced_pod_exec(
                    pod, self.namespace, command=cast(str, KILL_ALL), stderr=True, stdin=False, stdout=True, tty=False,
                )  # fmt: skip
                await self._answer(kill)
            while pod in await self._pods(api, selector, leaving=True):  # noqa: ASYNC110  nor does a pod
                await asyncio.sleep(POD_SECONDS)

    async def _pods(self, api: kubernetes.CoreV1Api, selector: str, leaving: bool) -> list[str]:
        """Return the pods of a run that are not over, and, if not `leaving`, run and are not told to go either."""
        found = await self._answer(api.list_namespaced_pod(self.namespace, label_selector=selector))
        return [
            str(pod.metadata.name) for pod in found.items
            if (pod.status.phase not in OVER if leaving
                else pod.status.phase == "Running" and not pod.metadata.deletion_timestamp)
        ]  # fmt: skip

    async def _answer(self, question: Awaitable[T]) -> T:
        """Wait for one answer of the cluster; what it refuses, or does not say in time, becomes a message."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await question
        except (ClientError, kubernetes.ApiException, OSError) as error:
            status = getattr(error, "status", None)
            said = str(error) or "it does not answer"
            if status:
                said = f"{status} {getattr(error, 'reason', None) or getattr(error, 'message', '')}"
            raise PreflowError(
                f"the cluster does not do what the drill asks in namespace {self.namespace}: {said}. See `kubectl auth "
                "can-i` and KUBECONFIG"
            ) from error


Target: TypeAlias = ChildTarget | PodTarget
