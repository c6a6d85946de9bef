"""The preemption drill: a training in peace, the same one preempted again and again, and whether they are equal."""

import asyncio
import json
import logging
import posixpath
import random
import re
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect.artifacts import acreate_markdown_artifact
from pydantic import BaseModel, ConfigDict

from tasks.config import DrillConfig, TrainingConfig
from tasks.demo.tiny import make_tiny_materials
from tasks.drill.preemption import Kind, Target
from tasks.errors import PreflowError
from tasks.report.page import Cell, ReportSection, Table
from tasks.report.render import render_markdown, render_text_table
from tasks.store.workspace import COMMITTED, AdapterRef, PreferencesRef, Workspace, digest
from tasks.train.deployment import check_deployment
from tasks.train.spec import TrainingPaths
from tasks.train.work_pool import TrainingOrder

logger = logging.getLogger(__name__)

COLUMNS = ("preemption", "kind", "at step", "resumed from", "steps lost", "seconds lost", "US$", "same result")
WATCH_SECONDS, WATCH_BUCKET_SECONDS = 0.1, 1.0


class Preemption(BaseModel):
    """One preemption: at which optimizer step, from which one it went on, and what that took."""

    model_config = ConfigDict(frozen=True)

    kind: Kind
    at_step: int
    resumed_from: int
    seconds_lost: float

    @property
    def steps_lost(self) -> int:
        """Optimizer steps that were done twice."""
        return max(0, self.at_step - self.resumed_from)

    def text(self) -> str:
        """Return one line for the log."""
        where = f"at step {self.at_step}, resumed from {self.resumed_from}"
        return f"preempted by {self.kind.value} {where}; {self.seconds_lost:.1f} s until it was back there"


class DrillResult(BaseModel):
    """What came out: the digests of adapter and metrics undisturbed and under preemption; prices in US$ an hour."""

    model_config = ConfigDict(frozen=True)

    preemptions: tuple[Preemption, ...]
    calm: dict[str, str]
    stormy: dict[str, str]
    price_per_hour: float

    @property
    def is_exact(self) -> bool:
        """Whether every digest is the same."""
        return self.calm == self.stormy

    def table(self) -> Table:
        """Return a row for each preemption, and their sum."""
        rows: list[tuple[Cell, ...]] = [
            (number, lost.kind.value, lost.at_step, lost.resumed_from, *self._loss(lost.steps_lost, lost.seconds_lost))
            for number, lost in enumerate(self.preemptions, 1)
        ]
        total = sum(lost.steps_lost for lost in self.preemptions), sum(lost.seconds_lost for lost in self.preemptions)
        return Table(
            caption="A training preempted, and what each preemption cost",
            columns=COLUMNS,
            rows=(*rows, ("all", None, None, None, *self._loss(*total))),
        )

    def _loss(self, steps: int, seconds: float) -> tuple[Cell, ...]:
        return steps, round(seconds, 1), round(seconds / 3600 * self.price_per_hour, 6), self.is_exact

    def verdict(self) -> str:
        """Return one sentence on whether the preemptions changed anything."""
        names = ", ".join(sorted(self.calm))
        times = f"{len(self.preemptions)} preemptions"
        if self.is_exact:
            return f"After {times} the results are those of the undisturbed training, byte for byte: {names}."
        different = sorted(name for name in self.calm if self.calm[name] != self.stormy.get(name))
        return f"After {times} the results DIFFER from those of the undisturbed training: {', '.join(different)}."


async def make_order(workspace: str, drill: DrillConfig) -> TrainingOrder:
    """Return the drill's training, in the folder of the undisturbed one; what it needs is made where it is not given.

    Raises:
        PreflowError: the tiny model cannot be put where the training would find it, or the deployment is not fit.
    """
    store = Workspace(workspace)
    store.check_writable()
    settings: dict[str, Any] = {"base_model": drill.base_model, "sft_adapter": drill.sft_adapter}
    pairs = drill.pairs
    if pairs is None:
        if not store.is_local:
            raise PreflowError(
                f"workspace {workspace}: the drill's own tiny model needs a folder (on a pod: below /workspace). Give "
                "base_model (a name on the hub), sft_adapter and pairs of your own for a bucket."
            )
        materials = make_tiny_materials(Path(store.root, "drill", "materials"))
        settings, pairs = materials.settings(), str(materials.pairs)
    training = TrainingConfig(
        **settings, max_steps=drill.max_steps, save_steps=drill.save_steps, eval_steps=drill.max_steps,
        logging_steps=1, warmup_steps=2, lease_seconds=10,
    )  # fmt: skip
    if drill.deployment is not None:
        await check_deployment(drill.deployment, workspace, training)
    where = {"image": drill.image, "namespace": drill.namespace} if drill.image else {}
    return TrainingOrder(
        deployment=drill.deployment or "this machine", preferences=read_pairs(pairs),
        workspace=store.uri("drill", f"calm-{digest([drill.deployment, where])[:8]}"), training=training,
        max_restarts=2 * drill.preemptions, job_variables=where,
    )  # fmt: skip


def read_pairs(uri: str) -> PreferencesRef:
    """Return the reference of a train.jsonl, with the val.jsonl beside it where there is one."""
    store = Workspace.holding(uri)
    if not store.exists(uri):
        raise PreflowError(f"pairs {uri}: no such file; give the train.jsonl of a preferences folder")
    val = posixpath.join(posixpath.dirname(uri), "val.jsonl")
    held_out = sum(1 for _ in store.lines(val)) if store.exists(val) else 0
    rows = sum(1 for _ in store.lines(uri))
    return PreferencesRef(uri=uri, sha256=store.sha256(uri), size=store.size(uri), rows=rows, val_rows=held_out)


def plan_preemptions(drill: DrillConfig) -> list[tuple[int, Kind]]:
    """Return the steps to preempt at, in ascending order and none too near the end, and how: by turns."""
    steps = random.Random(drill.seed).sample(range(1, max(2, int(0.9 * drill.max_steps))), drill.preemptions)
    kinds = list(Kind)
    return [(step, kinds[number % len(kinds)]) for number, step in enumerate(sorted(steps))]


async def train_in_peace(order: TrainingOrder, target: Target) -> dict[str, str]:
    """Train once without any disturbance, and return the digests of what came out."""
    logger.info("training %s steps undisturbed, on %s", order.training.max_steps, order.deployment)
    await target.train(order)
    return read_digests(order)


async def train_in_the_storm(
    calm: TrainingOrder, target: Target, drill: DrillConfig
) -> tuple[list[Preemption], dict[str, str]]:
    """Train the same in a new folder, preempted as planned, and return what each preemption cost, and the digests."""
    folder = posixpath.join(posixpath.dirname(calm.workspace), f"storm-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}")
    order = replace(calm, workspace=folder)
    training = asyncio.create_task(target.train(order))
    watch, done = TrainingWatch(order, training), []
    try:
        for step, kind in plan_preemptions(drill):
            await watch.until(step)
            done.append(await preempt(target, order, watch, kind))
            logger.info("%s", done[-1].text())
        await training
    finally:
        training.cancel()
        await asyncio.gather(training, return_exceptions=True)
    return done, read_digests(order)


async def preempt(target: Target, order: TrainingOrder, watch: "TrainingWatch", kind: Kind) -> Preemption:
    """Preempt a training once, and wait until it is back where it was."""
    started = time.monotonic()
    await target.preempt(order, kind)
    at_step, resumed_from = watch.step(), watch.saved_step()
    await watch.until(at_step, anew=True)
    seconds = time.monotonic() - started
    return Preemption(kind=kind, at_step=at_step, resumed_from=resumed_from, seconds_lost=seconds)


class TrainingWatch:
    """How far a training is, seen from outside by what it writes into the workspace."""

    def __init__(self, order: TrainingOrder, training: "asyncio.Task[AdapterRef]") -> None:
        self._training = training
        self._store = Workspace(order.workspace)
        self._paths = TrainingPaths.of(self._store.root, order.key)

    def step(self) -> int:
        """Return the last optimizer step that was logged."""
        return max((row["step"] for row in map(json.loads, self._metrics().splitlines())), default=0)

    def saved_step(self) -> int:
        """Return the step of the newest whole checkpoint, from which a training goes on; 0 if there is none."""
        names = self._store.folders(self._paths.checkpoints)
        whole = [name for name in names if self._store.exists(posixpath.join(self._paths.checkpoints, name, COMMITTED))]
        return max((int(name.removeprefix("step-")) for name in whole if re.fullmatch(r"step-\d+", name)), default=0)

    async def until(self, step: int, anew: bool = False) -> None:
        """Wait until a step is logged; `anew`: by a training that has written since.

        Raises:
            PreflowError: the training ended before.
        """
        before = self._metrics() if anew else None
        while self.step() < step or self._metrics() == before:
            if self._training.done():
                await self._training
                raise PreflowError(f"the training ended before step {step} was preempted: raise max_steps")
            await asyncio.sleep(WATCH_SECONDS if self._store.is_local else WATCH_BUCKET_SECONDS)

    def _metrics(self) -> bytes:
        uri = self._paths.file("metrics.jsonl")
        return self._store.read_bytes(uri) if self._store.exists(uri) else b""


def read_digests(order: TrainingOrder) -> dict[str, str]:
    """Return the digests of the finished adapter's files and of the metrics."""
    store = Workspace(order.workspace)
    paths = TrainingPaths.of(store.root, order.key)
    files = store.verify_folder(paths.adapter)["files"]
    return {name: facts["sha256"] for name, facts in files.items()} | {
        "metrics.jsonl": store.sha256(paths.file("metrics.jsonl"))
    }


async def report_drill(result: DrillResult) -> None:
    """Print the table, and publish it as an artifact of this flow run."""
    table = result.table()
    print("\n" + render_text_table([table.columns, *table.rows]) + "\n" + result.verdict(), flush=True)
    section = ReportSection(title="Preemption drill", summary=result.verdict(), tables=(table,))
    await acreate_markdown_artifact(
        key="preemption-drill", markdown=render_markdown(section), description=result.verdict()
    )
