"""Checks of a deployment that trains, before anything is spent."""

import logging
import posixpath
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import WorkerStatus, WorkPool, WorkQueue
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

from tasks.config import TrainingConfig
from tasks.errors import PreflowError
from tasks.train.quota import check_quotas

logger = logging.getLogger(__name__)

FLOW = "train-dpo"
# Where the pools of type kubernetes mount a volume, and the only local folder that means anything there.
MOUNT = "/workspace"


async def check_deployment(name: str, workspace: str, training: TrainingConfig) -> None:
    """See that the deployment that is to train exists, takes runs and can reach what it needs."""
    deployment = await read_deployment(name)
    if deployment.paused:
        raise PreflowError(f"deployment {name} is paused: resume it in the Prefect UI")
    if deployment.work_pool_name is not None:
        async with get_client() as client:
            pool = await client.read_work_pool(deployment.work_pool_name)
            queue = await client.read_work_queue_by_name(deployment.work_queue_name or "default", pool.name)
            workers = await client.read_workers_for_work_pool(pool.name)
        _check_starts(f"work pool {pool.name}", pool)
        _check_starts(f"work queue {queue.name} of the work pool {pool.name}", queue)
        is_online = any(worker.status == WorkerStatus.ONLINE for worker in workers)
        if not (is_online or pool.is_push_pool or pool.is_managed_pool):
            logger.warning(
                "no worker of the work pool %s is online: the training will wait for one (prefect worker start --pool "
                "%s)", pool.name, pool.name,
            )  # fmt: skip
        if pool.type == "kubernetes":
            _check_reach(workspace, training, pool)
            await check_quotas(pool, deployment)


async def read_deployment(name: str) -> DeploymentResponse:
    """Return a deployment of the training; where there is none of this name, the error says which there are."""
    async with get_client() as client:
        try:
            return await client.read_deployment_by_name(name)
        except (ObjectNotFound, ValueError) as error:  # ValueError: a name without a slash
            found = await client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW])))
            names = ", ".join(sorted(f"{FLOW}/{deployment.name}" for deployment in found)) or "none"
            raise PreflowError(
                f"deployment {name}: there is no such deployment on {PREFECT_API_URL.value()} (found: {names}). "
                "Make all of them with deployments/register.sh, or name none, to train here."
            ) from error


def _check_starts(name: str, found: WorkPool | WorkQueue) -> None:
    """Refuse a work pool or queue that hands out no run."""
    if found.is_paused:
        raise PreflowError(f"{name} is paused, so nothing would train: resume it in the Prefect UI")
    if found.concurrency_limit == 0:
        raise PreflowError(f"{name} allows 0 runs at once, so nothing would train: raise its limit in the Prefect UI")


def _check_reach(workspace: str, training: TrainingConfig, pool: WorkPool) -> None:
    """Refuse paths that mean nothing in a pod."""
    paths = {
        "workspace": workspace,
        "training.sft_adapter": training.sft_adapter,
        "training.base_model": training.base_model,
        "generation.chat_template": training.chat_template or "",
    }
    for name, path in paths.items():
        # The configuration writes every folder's path whole; all else is an address, or a name on the hub.
        if posixpath.isabs(path) and not Path(path).is_relative_to(MOUNT):
            raise PreflowError(
                f"{name} {path}: a pod of the work pool {pool.name} cannot see it. Give a gs:// address, or a path "
                f"below {MOUNT} if the pool mounts a volume there (workspace_volume, see infra/README.md)"
                + (", or a model's name on the hub." if name == "training.base_model" else ".")
            )
