"""Whether the quotas of a namespace have room for a training's pod: asked before anything is spent."""

import asyncio
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal

from kubernetes_asyncio import client as kubernetes
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from tasks.errors import PreflowError
from tasks.train.pods import ANSWER_SECONDS, Item, cluster_settings, namespace_of

logger = logging.getLogger(__name__)

# A quota's short names for what pods request.
SHORT = {"cpu": "requests.cpu", "memory": "requests.memory", "ephemeral-storage": "requests.ephemeral-storage"}
UNITS: dict[str, Decimal | int] = {
    "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"),
    "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60,
}  # fmt: skip


async def check_quotas(pool: WorkPool, deployment: DeploymentResponse) -> None:
    """Compare the ResourceQuotas of the pool's namespace with a training's pod; where they cannot be read, say so.

    One that is used up is only warned of: what uses it may end, and a run that has trained already needs no pod.

    Raises:
        PreflowError: a quota is smaller than the pod.
    """
    namespace = namespace_of(pool, deployment.job_variables)
    try:
        async with asyncio.timeout(ANSWER_SECONDS), kubernetes.ApiClient(await cluster_settings()) as connection:
            answer = await kubernetes.CoreV1Api(connection).list_namespaced_resource_quota(namespace)
            quotas = connection.sanitize_for_serialization(answer)["items"]
            limits = list(_limits(quotas, await _charges(pool, deployment))) if quotas else []
            where = f"work pool {pool.name}, namespace {namespace} of {connection.configuration.host}"
    except Exception as error:  # noqa: BLE001  advice: no kubeconfig, role, job variable or block may end a run here
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("the quotas of namespace %s are not compared with a training's pod (%s)", namespace, said)
        return
    for name, resource, ask, hard, used in limits:
        told = f"{where}: quota {name} has {resource} {hard}, {used} of it used, and a training wants {ask}"
        if ask > hard:
            raise PreflowError(
                f"{told}, so none would ever start. Raise the quota (kubectl edit resourcequota {name}), ask for less "
                "in the work pool's settings, or set KUBECONFIG if that is another cluster than the pool's."
            )
        if used + ask > hard:
            logger.warning("%s: it starts when something there has ended; a vLLM does not end by itself", told)


async def _charges(pool: WorkPool, deployment: DeploymentResponse) -> dict[str, Decimal]:
    """Return what the pod of a run, as the pool's worker makes it, counts towards a quota, by the quota's names."""
    async with get_client() as client:
        job = await KubernetesWorkerJobConfiguration.from_template_and_values(
            pool.base_job_template, deployment.job_variables, client=client
        )
    found = defaultdict(Decimal, {"pods": Decimal(1), "count/pods": Decimal(1)})
    for container in job.job_manifest["spec"]["template"]["spec"]["containers"]:
        limits = container.get("resources", {}).get("limits", {})
        requests = limits | container.get("resources", {}).get("requests", {})  # what is only limited is requested too
        for kind, sizes in (("requests", requests), ("limits", limits)):
            for name, quantity in sizes.items():
                found[f"{kind}.{name}"] += amount(quantity)
    return found


def amount(quantity: object) -> Decimal:
    """Return a quantity of Kubernetes, such as 500m or 24Gi, as a number."""
    number, unit = re.fullmatch(rf"(.*?)({'|'.join(UNITS)})?", str(quantity)).groups()  # type: ignore[union-attr]
    return Decimal(number) * UNITS.get(unit or "", 1)


def _limits(
    quotas: Sequence[Item], wanted: Mapping[str, Decimal]
) -> Iterator[tuple[str, str, Decimal, Decimal, Decimal]]:
    """Yield name, resource, wish, limit and use of the quotas without scopes, which count every pod."""
    for quota in quotas:
        if quota["spec"].get("scopes") or quota["spec"].get("scopeSelector"):
            continue
        used = quota.get("status", {}).get("used", {})
        for resource, hard in quota["spec"].get("hard", {}).items():
            if ask := wanted.get(SHORT.get(resource, resource)):
                yield quota["metadata"]["name"], resource, ask, amount(hard), amount(used.get(resource, 0))
