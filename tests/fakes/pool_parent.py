"""A flow that only waits for a training on a work pool, as the pipeline does; to be deployed, killed and cancelled."""

from prefect import flow

from tasks.config import PipelineConfig
from tasks.store.workspace import AdapterRef, PreferencesRef
from tasks.train import work_pool as remote
from tasks.train.work_pool import train_on_pool

RESTART_SECONDS = 0.5


@flow(name="pool-parent")
async def pool_parent(preferences: PreferencesRef, config: PipelineConfig) -> AdapterRef:
    """Train on the pool."""
    return await train_on_pool(preferences, config)


@flow(name="impatient-parent")
async def impatient_parent(preferences: PreferencesRef, config: PipelineConfig) -> AdapterRef:
    """As `pool_parent`, in a process of its own, whose waits can be shortened."""
    remote.POLL_SECONDS, remote.FIRST_RESTART_SECONDS = 0.5, RESTART_SECONDS
    return await train_on_pool(preferences, config)
