"""A flow that only waits for a training on a work pool, as the pipeline does; to be deployed, killed and cancelled."""

from prefect import flow

from tasks.config import PipelineConfig
from tasks.remote import train_on_pool
from tasks.storage import AdapterRef, PreferencesRef


@flow(name="pool-parent")
async def pool_parent(preferences: PreferencesRef, config: PipelineConfig) -> AdapterRef:
    """Train on the pool."""
    return await train_on_pool(preferences, config)
