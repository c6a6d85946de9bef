"""Training as a Prefect task: cached by its key, resumed where it was, seen while it runs."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from tasks.caching import cached, open_results
from tasks.config import TrainingConfig
from tasks.stages import is_worth_retrying
from tasks.storage import AdapterRef, PreferencesRef
from tasks.training.launch import check_training_inputs, run_training, training_key
from tasks.training.spec import Progress


async def train_adapter(preferences: PreferencesRef, workspace: str, training: TrainingConfig) -> AdapterRef:
    """Train the SFT adapter on preference pairs; a finished training of the same key is not repeated.

    Raises:
        PreflowError: an input is wrong, or an invariant of DPO does not hold.
    """
    check_training_inputs(training)
    key = training_key(preferences, training)
    results = await open_results(workspace)
    # A synchronous task runs here, in the main thread: only there does Prefect's SIGTERM reach it.
    record = cached(dpo_training, key, results)(preferences, workspace, training, key)
    return AdapterRef.model_validate(record)


@task(name="train-adapter", retries=3, retry_delay_seconds=10, retry_condition_fn=is_worth_retrying)
def dpo_training(
    preferences: PreferencesRef, workspace: str, training: TrainingConfig, key: str
) -> dict[str, Any]:
    """Run the trainer in a child process until it has finished; a preempted one goes on from its last checkpoint."""
    with _ctrl_c_at_once():
        return run_training(preferences, workspace, training, key, _progress_artifact()).model_dump()


@contextmanager
def _ctrl_c_at_once() -> Iterator[None]:
    """Let Ctrl-C interrupt the block: `asyncio.run` would leave it to the event loop, which waits for this task."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _progress_artifact() -> Callable[[Progress], None]:
    # The event loop of the flow waits for this very task, so the calls must not be dispatched to it.
    create: Any = create_progress_artifact
    update: Any = update_progress_artifact
    artifact = create(progress=0.0, description="train-adapter: optimizer steps", _sync=True)

    def show(progress: Progress) -> None:
        if progress.total:
            update(artifact, progress=100.0 * progress.step / progress.total, _sync=True)

    return show
