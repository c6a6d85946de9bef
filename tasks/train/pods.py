"""What a training on Kubernetes waits for, in words: read from its Job, its pods and their events, never acted upon."""

import asyncio
import logging
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeAlias
from uuid import UUID

from aiohttp import ClientError
from kubernetes_asyncio import client as kubernetes
from kubernetes_asyncio.config import load_config
from prefect.client.schemas.objects import WorkPool
from prefect_kubernetes.diagnostics import diagnose_k8s_pod

from tasks.errors import PreflowError

logger = logging.getLogger(__name__)
# A Job, a pod or an event, as the Kubernetes API writes it.
Item: TypeAlias = dict[str, Any]

QUIET_SECONDS, LOOK_SECONDS = 300.0, 60.0
# An API that a network policy or a wrong kubeconfig keeps away does not refuse: it is silent.
ANSWER_SECONDS = 20.0
# A pod that is told to go is gone after its grace, and a little for its volumes.
LATE_SECONDS = 60.0
OVER = ("Succeeded", "Failed")
# Scheduler, autoscaler, kubelet and controllers say the cause in an event's message, and say it in many ways.
REMEDIES = (
    (
        r"exceeded quota: ",
        "A ResourceQuota of the namespace is used up: raise it, or end what uses it (kubectl describe resourcequota).",
    ),
    (
        r"(?<!exceeded )quota",
        "The quota is used up: ask Google for more of it (IAM & Admin, Quotas), or end what uses it.",
    ),
    (
        r"stockout|resource_pool_exhausted|out.of.resources|does not have enough resources",
        "No such machine is free there now. It is asked for again and again; for another zone, or nodes on demand, see "
        "infra/README.md (GPU that is not there).",
    ),
    (r"untolerated taint", "The nodes carry a taint that the job template does not tolerate: add it there."),
    (
        r"node affinity|node selector",
        "No node is of the kind asked for: see gpu_type and avoid_nodes in the work pool's settings.",
    ),
    (r"insufficient nvidia.com/gpu", "All GPUs of these nodes are in use: it starts when one is free."),
    (r"podsecurity", "The namespace forbids such a pod: take a volume and settings that it allows."),
)
REPLACEMENT = "Kubernetes waits 10 s before the first replacement of a pod, and each time twice as long, 600 s at most."


@dataclass(frozen=True)
class Sight:
    """What the Kubernetes API shows of a flow run, as the API writes it."""

    jobs: Sequence[Item]
    pods: Sequence[Item]
    events: Sequence[Item]

    def explain(self, now: datetime) -> list[str]:
        """Return what a training that is not heard of waits for."""
        if not self.jobs:
            return ["There is no Job of this run: the worker has not made one, or somebody deleted it."]
        pods = sorted(self.pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp")))
        alive = [pod for pod in pods if pod["status"].get("phase") not in OVER]
        said = [text for pod in alive for text in self._explain(pod, now)]
        if not alive:
            said += [*self._events_of(self.jobs[-1]), *map(_end_of, pods[-1:]), REPLACEMENT]
        return said + [remedy for pattern, remedy in REMEDIES if re.search(pattern, " ".join(said), re.IGNORECASE)]

    def _explain(self, pod: Item, now: datetime) -> Iterator[str]:
        name, node = pod["metadata"]["name"], pod["spec"].get("nodeName")
        leaving = pod["metadata"].get("deletionTimestamp")
        if leaving is not None and (now - datetime.fromisoformat(leaving)).total_seconds() > LATE_SECONDS:
            yield (
                f"Pod {name} has been Terminating since {leaving}: its node {node} does not answer. Kubernetes starts "
                "no other pod until that node is given up; deleting the pod does not help, not even by force. If the "
                f"machine is really gone: kubectl delete node {node}; or, else: kubectl taint nodes {node} "
                "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute. The training then goes on."
            )
        elif pod["status"].get("phase") == "Pending":
            diagnosis = diagnose_k8s_pod(pod["status"])
            yield f"Pod {name} waits" + (f". {diagnosis.detail}" if diagnosis else f" on {node or 'no node yet'}.")
            yield from self._events_of(pod)
        elif leaving is None:
            yield (
                f"Pod {name} runs on {node}, but its trainer has written nothing: it may still be loading, or hang, or "
                f"the node may be lost, which Kubernetes notices after about five minutes. See kubectl logs {name}."
            )

    def _events_of(self, item: Item) -> Iterator[str]:
        """Yield the newest message of each reason that is no good news."""
        newest: dict[str, str] = {}
        for event in sorted(self.events, key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime"))):
            reason, about = str(event.get("reason")), event.get("involvedObject", {}).get("uid")
            is_news = event.get("type") == "Warning" or reason in ("NotTriggerScaleUp", "TriggeredScaleUp")
            if about == item["metadata"]["uid"] and is_news:
                newest[reason] = str(event.get("message", ""))
        yield from (f"{reason}: {message}" for reason, message in newest.items())


def _end_of(pod: Item) -> str:
    """Say how a pod ended: by its own fault, for lack of memory, or because its machine was taken away."""
    status, name = pod["status"], pod["metadata"]["name"]
    states = [item["state"] for item in status.get("containerStatuses", [])]
    ends = [state["terminated"] for state in states if "terminated" in state]
    lost = [item for item in status.get("conditions", []) if item["type"] == "DisruptionTarget"]
    if any(end.get("reason") == "OOMKilled" for end in ends):
        return (
            f"Pod {name} ran out of memory (OOMKilled), which is no preemption and uses up a retry. Raise memory in "
            "the work pool's settings, or lower training.per_device_train_batch_size."
        )
    if lost:
        return f"Pod {name} was preempted ({lost[0].get('reason')}); that uses up no retry."
    if not ends:
        why = ": ".join(filter(None, (status.get("reason"), status.get("message")))) or "no reason is given"
        return f"Pod {name} was evicted, or refused by its node, before it started ({why})."
    return f"Pod {name} ended with exit code {ends[0].get('exitCode')}; its log is the run's."


async def cluster_settings() -> kubernetes.Configuration:
    """Return how to reach the cluster: as the kubeconfig says, or the account of the pod that this runs in."""
    settings = kubernetes.Configuration()
    try:
        with warnings.catch_warnings(action="ignore"):  # about there being no kubeconfig, which is so in every pod
            await load_config(client_configuration=settings)
    except Exception as error:  # it checks little of the file: what it raises says only where it stumbled
        raise PreflowError(f"no way to a Kubernetes cluster ({error}): set KUBECONFIG to your kubeconfig") from error
    return settings


async def look(run_id: UUID, namespace: str) -> Sight:
    """Return what the cluster shows of a flow run."""
    async with asyncio.timeout(ANSWER_SECONDS), kubernetes.ApiClient(await cluster_settings()) as connection:
        core, labels = kubernetes.CoreV1Api(connection), f"prefect.io/flow-run-id={run_id}"
        found = (
            await kubernetes.BatchV1Api(connection).list_namespaced_job(namespace, label_selector=labels),
            await core.list_namespaced_pod(namespace, label_selector=labels),
            await core.list_namespaced_event(namespace),
        )
        return Sight(*(connection.sanitize_for_serialization(answer)["items"] for answer in found))


def namespace_of(pool: WorkPool, job_variables: Mapping[str, Any]) -> str:
    """Return the namespace of a pool's Jobs, for runs with these job variables."""
    settings = pool.base_job_template.get("variables", {}).get("properties", {})
    return str(job_variables.get("namespace") or settings.get("namespace", {}).get("default") or "default")


@dataclass
class PodWatch:
    """Logs what the pods of a flow run wait for, once nothing was heard of it for five minutes."""

    run_id: UUID
    namespace: str
    _said: str = ""
    _looked: float = field(default=float("-inf"))

    @classmethod
    def of(cls, run_id: UUID, pool: WorkPool | None, job_variables: Mapping[str, Any]) -> "PodWatch | None":
        """Return the watch of a run on a pool of type kubernetes; None on another one."""
        if pool is None or pool.type != "kubernetes":
            return None
        return cls(run_id, namespace_of(pool, job_variables))

    async def say(self, quiet_seconds: float) -> None:
        """Log what it waits for if that is new; the cluster is asked once a minute."""
        if quiet_seconds < QUIET_SECONDS or time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        try:
            text = " ".join((await look(self.run_id, self.namespace)).explain(datetime.now(UTC)))
        except (PreflowError, ClientError, kubernetes.ApiException, OSError) as error:
            text = (
                f"What it waits for cannot be read from here ({type(error).__name__}); ask the cluster: kubectl -n "
                f"{self.namespace} describe pods -l prefect.io/flow-run-id={self.run_id}"
            )
        if text and text != self._said:
            self._said = text
            logger.warning("nothing was heard of the training for %.0f minutes. %s", quiet_seconds / 60, text)
