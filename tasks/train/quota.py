"""Whether the quotas of a namespace leave room for a training's pod: asked before anything is spent."""

import asyncio
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal

from aiohttp import ClientError
from kubernetes_asyncio import client as kubernetes
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from tasks.errors import PreflowError
from tasks.train.pods import ANSWER_SECONDS, OVER, Item, cluster_settings, namespace_of

logger = logging.getLogger(__name__)

TRAINING = "preflow.dev/component=training"
# A quota's short names for what pods request.
SHORT = {"cpu": "requests.cpu", "memory": "requests.memory", "ephemeral-storage": "requests.ephemeral-storage"}
UNITS: dict[str, Decimal | int] = {
    "m": Decimal("0.001"), "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
}  # fmt: skip


async def check_quotas(pool: WorkPool, deployment: DeploymentResponse) -> None:
    """See that the ResourceQuotas of the pool's namespace let a training start; where they cannot be read, say so.

    A quota that other trainings use up is only warned of, for they end.

    Raises:
        PreflowError: a quota is too small, or used up by what does not end by itself.
    """
    namespace = str(deployment.job_variables.get("namespace") or namespace_of(pool))
    try:
        async with asyncio.timeout(ANSWER_SECONDS), kubernetes.ApiClient(await cluster_settings()) as connection:
            core = kubernetes.CoreV1Api(connection)
            found = (
                await core.list_namespaced_resource_quota(namespace),
                await core.list_namespaced_pod(namespace, label_selector=TRAINING),
            )
            quotas, pods = (connection.sanitize_for_serialization(answer)["items"] for answer in found)
    except (PreflowError, ClientError, kubernetes.ApiException, OSError) as error:
        logger.info("the quotas of namespace %s cannot be read from here (%s)", namespace, type(error).__name__)
        return
    if quotas:
        wanted = charges(await _pod_of(pool, deployment))
        trainings = [charges(pod["spec"]) for pod in pods if pod["status"].get("phase") not in OVER]
        check_room(quotas, wanted, trainings, f"work pool {pool.name}, namespace {namespace}")


async def _pod_of(pool: WorkPool, deployment: DeploymentResponse) -> Item:
    """Return the pod of a run of the deployment, as the pool's worker makes it."""
    async with get_client() as client:
        job = await KubernetesWorkerJobConfiguration.from_template_and_values(
            pool.base_job_template, deployment.job_variables, client=client
        )
    pod: Item = job.job_manifest["spec"]["template"]["spec"]
    return pod


def charges(pod: Item) -> dict[str, Decimal]:
    """Return what a pod counts towards a quota, by the quota's names."""
    found = defaultdict(Decimal, {"pods": Decimal(1), "count/pods": Decimal(1)})
    for container in pod["containers"]:
        for kind in ("requests", "limits"):
            for name, quantity in container.get("resources", {}).get(kind, {}).items():
                found[f"{kind}.{name}"] += amount(quantity)
    return found


def amount(quantity: object) -> Decimal:
    """Return a quantity of Kubernetes, such as 500m or 24Gi, as a number."""
    number, unit = re.fullmatch(r"(.*?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?", str(quantity)).groups()  # type: ignore[union-attr]
    return Decimal(number) * UNITS.get(unit or "", 1)


def check_room(
    quotas: Sequence[Item], wanted: Mapping[str, Decimal], trainings: Sequence[Mapping[str, Decimal]], where: str
) -> None:
    """Compare what a training wants with what the quotas have left; see `check_quotas`."""
    for name, resource, hard, used in _limits(quotas):
        key = SHORT.get(resource, resource)
        passing = sum((training.get(key, Decimal(0)) for training in trainings), Decimal(0))
        if (ask := wanted.get(key, Decimal(0))) == 0 or used + ask <= hard:
            continue
        told = f"{where}: quota {name} has {resource} {hard}, {used} of it used, and a training wants {ask}"
        if used - passing + ask <= hard:
            logger.warning("%s: it starts when another training has ended", told)
            continue
        raise PreflowError(
            f"{told}, so none would start. Raise the quota (kubectl edit resourcequota {name}), end what uses it "
            "(kubectl describe resourcequota; a vLLM counts, too), or ask for less in the work pool's settings."
        )


def _limits(quotas: Sequence[Item]) -> Iterator[tuple[str, str, Decimal, Decimal]]:
    """Yield name, resource, limit and use of the quotas that count every pod; those with scopes count only some."""
    for quota in quotas:
        if quota["spec"].get("scopes") or quota["spec"].get("scopeSelector"):
            continue
        used = quota.get("status", {}).get("used", {})
        for resource, hard in quota["spec"].get("hard", {}).items():
            yield quota["metadata"]["name"], resource, amount(hard), amount(used.get(resource, 0))
