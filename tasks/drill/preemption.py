"""Taking a machine away from a training: from a child of this process, or from a pod of a Kubernetes pool."""

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias, cast

from aiohttp import ClientError
from kubernetes_asyncio import client as kubernetes
from kubernetes_asyncio.stream import WsApiClient

from tasks.errors import PreflowError
from tasks.store.workspace import AdapterRef, Workspace
from tasks.train.launch import Preempted, run_training
from tasks.train.pods import ANSWER_SECONDS, OVER, cluster_settings
from tasks.train.work_pool import TrainingOrder, obtain_adapter
from tasks.trainer.lease import is_dead

logger = logging.getLogger(__name__)

POLL_SECONDS, POD_SECONDS = 0.05, 1.0
# Verb, resource and subresource of all that a drill asks of the cluster; over a websocket to execute is to get.
RIGHTS = (
    ("list", "pods", ""), ("get", "pods", ""), ("create", "pods", "eviction"), ("get", "pods", "exec"),
    ("create", "pods", "exec"),
)  # fmt: skip
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
    _over: threading.Event = field(default_factory=threading.Event)

    async def train(self, order: TrainingOrder) -> AdapterRef:
        """Train as the pipeline does, in a thread that starts the child again after every preemption."""
        try:
            return await asyncio.to_thread(self._train, order)
        except asyncio.CancelledError:
            self._over.set()
            signal_trainer(find_trainer(order), signal.SIGTERM)
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
        """Signal the trainer, and kill it when its grace is over."""
        trainer = find_trainer(order)
        if trainer is None:
            raise PreflowError("no trainer holds the lease on this machine")
        if kind is Kind.NOTICE:
            signal_trainer(trainer, signal.SIGTERM)
            await self._wait_for_end(trainer, self.grace_seconds)
        signal_trainer(trainer, signal.SIGKILL)
        await self._wait_for_end(trainer, 60.0)

    async def _wait_for_end(self, trainer: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not is_dead(trainer) and time.monotonic() < deadline:  # noqa: ASYNC110  another process sets no event
            await asyncio.sleep(POLL_SECONDS)


def find_trainer(order: TrainingOrder) -> str | None:
    """Return the process that holds the training's lease, as the lease names it, if it lives on this machine."""
    store = Workspace(order.workspace)
    lease = store.uri("training", order.key, "lease.json")
    holder = store.read_json(lease) if store.exists(lease) else {"released": True}
    process = str(holder.get("process", ""))
    return None if holder.get("released") or process.count("/") != 3 or is_dead(process) else process


def signal_trainer(process: str | None, number: int) -> None:
    """Signal the group of a process that a lease names."""
    with suppress(ProcessLookupError):
        if process is not None:
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
        with self._explained():
            async with asyncio.timeout(ANSWER_SECONDS), kubernetes.ApiClient(await cluster_settings()) as connection:
                api = kubernetes.AuthorizationV1Api(connection)
                for right in RIGHTS:
                    answer = await api.create_self_subject_access_review(self._question(*right))
                    if not answer.status.allowed:
                        raise PreflowError(
                            f"this account may not {' '.join(right).strip()} in namespace {self.namespace}, which the "
                            "drill needs, and the flow worker's never may: set KUBECONFIG to an administrator's"
                        )

    def _question(self, verb: str, resource: str, subresource: str) -> kubernetes.V1SelfSubjectAccessReview:
        right = kubernetes.V1ResourceAttributes(
            namespace=self.namespace, verb=verb, resource=resource, subresource=subresource
        )
        spec = kubernetes.V1SelfSubjectAccessReviewSpec(resource_attributes=right)
        return kubernetes.V1SelfSubjectAccessReview(spec=spec)

    async def train(self, order: TrainingOrder) -> AdapterRef:
        """Train as the pipeline does; the Job brings a new pod by itself."""
        return await obtain_adapter(order)

    async def preempt(self, order: TrainingOrder, kind: Kind) -> None:
        """Evict the run's pod with its grace, or kill all processes in its container; wait until it is over."""
        run = (await order.runs())[-1]
        with self._explained():
            async with kubernetes.ApiClient(await cluster_settings()) as connection:
                api = kubernetes.CoreV1Api(connection)
                pod = await self._running_pod(api, f"prefect.io/flow-run-id={run.id}")
                await (self._evict(api, pod) if kind is Kind.NOTICE else self._kill(pod))
                while await self._is_there(api, pod):  # noqa: ASYNC110  nor does a pod
                    await asyncio.sleep(POD_SECONDS)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the cluster refuses into a message."""
        try:
            yield
        except (ClientError, kubernetes.ApiException, OSError) as error:
            status = getattr(error, "status", None)
            said = str(error) or "it does not answer"
            if status:
                said = f"{status} {getattr(error, 'reason', None) or getattr(error, 'message', '')}"
            raise PreflowError(
                f"the cluster does not do what the drill asks in namespace {self.namespace}: {said}. See `kubectl auth "
                "can-i` and KUBECONFIG"
            ) from error

    async def _running_pod(self, api: kubernetes.CoreV1Api, selector: str) -> str:
        pods = await api.list_namespaced_pod(self.namespace, label_selector=selector)
        for pod in pods.items:
            if pod.status.phase == "Running" and not pod.metadata.deletion_timestamp:
                return str(pod.metadata.name)
        raise PreflowError(
            f"no running pod with {selector} in namespace {self.namespace}: is that the work pool's namespace?"
        )

    async def _evict(self, api: kubernetes.CoreV1Api, pod: str) -> None:
        eviction = kubernetes.V1Eviction(
            metadata=kubernetes.V1ObjectMeta(name=pod, namespace=self.namespace),
            delete_options=kubernetes.V1DeleteOptions(grace_period_seconds=int(self.grace_seconds)),
        )
        await api.create_namespaced_pod_eviction(pod, self.namespace, eviction)

    async def _kill(self, pod: str) -> None:
        async with WsApiClient(await cluster_settings()) as connection:
            # The annotation knows one word; the websocket client takes a list and the API wants one.
            await kubernetes.CoreV1Api(connection).connect_get_namespaced_pod_exec(
                pod, self.namespace, command=cast(str, KILL_ALL), stderr=True, stdin=False, stdout=True, tty=False,
            )  # fmt: skip

    async def _is_there(self, api: kubernetes.CoreV1Api, pod: str) -> bool:
        try:
            return (await api.read_namespaced_pod(pod, self.namespace)).status.phase not in OVER
        except kubernetes.ApiException as error:
            if error.status == 404:
                return False
            raise


Target: TypeAlias = ChildTarget | PodTarget
