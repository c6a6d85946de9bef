"""Training as a Prefect task: cached by its key, resumed where it was, seen while it runs."""

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import httpx
from prefect import task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.exceptions import PrefectException

from tasks.batch.caching import cached, mark_used, open_results
from tasks.batch.progress import is_worth_retrying
from tasks.config import TrainingConfig
from tasks.report.render import render_markdown
from tasks.report.sections import live_section
from tasks.store.workspace import AdapterRef, PreferencesRef, Workspace
from tasks.train.launch import check_training_inputs, run_training, training_key
from tasks.train.spec import Progress

logger = logging.getLogger(__name__)
LIVE_KEY = "training-live"
REFRESH_SECONDS = 30.0
# The event loop of the flow waits for the task that calls these, so no call may be dispatched to it: `_sync`.
_create_bar: Any = create_progress_artifact
_move_bar: Any = update_progress_artifact
_create_page: Any = create_markdown_artifact


async def train_adapter(preferences: PreferencesRef, workspace: str, training: TrainingConfig) -> AdapterRef:
    """Train the SFT adapter on preference pairs; a finished training of the same key is not repeated."""
    check_training_inputs(training)
    mark_used(preferences, workspace)
    key = training_key(preferences, training)
    results = await open_results(workspace)
    # A synchronous task runs here, in the main thread: only there does Prefect's SIGTERM reach it.
    record = cached(dpo_training, key, results)(preferences, workspace, training, key)
    adapter = AdapterRef.model_validate(record)
    made = Workspace(workspace).read_manifest(adapter)
    named = {"eval_loss": "loss", "eval_rewards/accuracies": "accuracy", "eval_rewards/margins": "margin"}
    told = [f"{title} {made.figures[name]:.3f}" for name, title in named.items() if name in made.figures]
    steps = f"{made.counts['steps']} steps, first loss {made.figures['first_loss']:.4f}"
    logger.info("training: %s; on held-out pairs: %s", steps, ", ".join(told) or "there are none")
    return adapter


@task(name="train-adapter", retries=3, retry_delay_seconds=10, retry_condition_fn=is_worth_retrying)
def dpo_training(preferences: PreferencesRef, workspace: str, training: TrainingConfig, key: str) -> dict[str, object]:
    """Run the trainer in a child process until it has finished; a preempted one goes on from its last checkpoint."""
    view = TrainingView(Workspace(workspace).uri("training", key, "metrics.jsonl"))
    with _ctrl_c_at_once():
        adapter = run_training(preferences, workspace, training, key, view.show)
    view.finish()
    return adapter.model_dump()


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


class TrainingView:
    """What the UI shows of a training while it runs: a progress bar, and a page of the curves in `metrics.jsonl`."""

    def __init__(self, metrics: str) -> None:
        self._metrics = metrics
        self._store = Workspace.holding(metrics)
        self._bar: UUID = _create_bar(progress=0.0, description="train-adapter: optimizer steps", _sync=True)
        self._page: UUID | None = None
        self._drawn = self._complained = -math.inf

    def show(self, progress: Progress) -> None:
        """Move the bar; draw the page again if the last one is `REFRESH_SECONDS` old."""
        with self._may_fail():
            if progress.total:
                _move_bar(self._bar, progress=100.0 * progress.step / progress.total, _sync=True)
            if time.monotonic() - self._drawn >= REFRESH_SECONDS:
                self._draw(f"Running: {progress.text()}.")

    def finish(self) -> None:
        """Show the finished training."""
        with self._may_fail():
            _move_bar(self._bar, progress=100.0, _sync=True)
            self._draw("Finished; the page on the training has its readings and the advice.")

    @contextmanager
    def _may_fail(self) -> Iterator[None]:
        """Let a training go on while server or workspace do not answer; say so at most once a refresh."""
        try:
            yield
        except (httpx.HTTPError, PrefectException, OSError) as error:
            if time.monotonic() - self._complained >= REFRESH_SECONDS:
                self._complained = time.monotonic()
                logger.warning("the training's progress cannot be shown in the UI (%s); training goes on", error)

    def _draw(self, summary: str) -> None:
        if not self._store.exists(self._metrics):
            return
        rows = [json.loads(line) for line in self._store.lines(self._metrics)]
        page = render_markdown(live_section(summary, rows))
        if self._page is None:
            description = "The training as it goes: curves and newest figures."
            self._page = _create_page(key=LIVE_KEY, markdown=page, description=description, _sync=True)
        else:  # in place: a version of 100 kB every half minute would fill the server's database
            with get_client(sync_client=True) as client:
                client.update_artifact(self._page, ArtifactUpdate(data=page))
        self._drawn = time.monotonic()
