"""The preemption drill: a training left alone, the same one preempted again and again, and whether they are equal."""

import asyncio
import json
import logging
import posixpath
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from pydantic import ValidationError

from tasks.config import TrainingConfig
from tasks.demo.materials import make_tiny_materials
from tasks.drill.preemption import ChildTarget, Kind, PodTarget, Target
from tasks.errors import PreflowError
from tasks.report.render import render_text_table
from tasks.store.refs import AdapterRef, PreferencesRef, digest
from tasks.store.workspace import COMMITTED, Workspace
from tasks.train.deployment import check_deployment, read_deployment
from tasks.train.pods import namespace_of
from tasks.train.work_pool import TrainingOrder

logger = logging.getLogger(__name__)

WATCH_SECONDS, WATCH_BUCKET_SECONDS = 0.1, 1.0


@dataclass(frozen=True)
class Drill:
    """What is trained where, and how often it is preempted; `training` changes the drill's own settings."""

    workspace: str
    deployment: str | None = None
    preemptions: int = 4
    steps: int = 40
    seed: int = 42
    grace_seconds: float = 15.0
    pairs: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def plan(self) -> list[tuple[int, Kind]]:
        """Return the steps to preempt at, in ascending order and none too near the end, and how: by turns.

        Raises:
            PreflowError: so many preemptions do not fit so few steps.
        """
        if not 1 <= self.preemptions <= self.steps // 2:
            raise PreflowError(f"--preemptions {self.preemptions} do not fit --steps {self.steps}: take more steps")
        steps = random.Random(self.seed).sample(range(1, max(2, int(0.9 * self.steps))), self.preemptions)
        return [(step, list(Kind)[number % len(Kind)]) for number, step in enumerate(sorted(steps))]


@dataclass(frozen=True)
class Preemption:
    """One preemption: at which optimizer step, from which one it went on, and what that took."""

    kind: Kind
    at_step: int
    resumed_from: int
    seconds_lost: float

    def row(self) -> tuple[str | int | float, ...]:
        """Return its row of the table; the steps that were done twice are lost."""
        lost = max(0, self.at_step - self.resumed_from)
        return self.kind.value, self.at_step, self.resumed_from, lost, round(self.seconds_lost, 1)


@dataclass(frozen=True)
class DrillResult:
    """What came out: the digests of adapter and metrics, of the preempted training and of the one left alone."""

    preemptions: list[Preemption]
    preempted: dict[str, str]
    baseline: dict[str, str]

    @property
    def is_exact(self) -> bool:
        """Whether every digest is the same."""
        return self.baseline == self.preempted

    def text(self) -> str:
        """Return a table with a row for each preemption, and one sentence on whether they changed anything."""
        columns = ("preemption", "kind", "at step", "resumed from", "steps lost", "seconds lost")
        table = render_text_table([columns, *((n, *one.row()) for n, one in enumerate(self.preemptions, 1))])
        differ = [name for name in self.baseline if self.baseline[name] != self.preempted.get(name)]
        verdict = "are those of the uninterrupted training, byte for byte"
        if not self.is_exact:
            verdict = "DIFFER from those of the uninterrupted training"
        names = ", ".join(sorted(self.baseline if self.is_exact else differ))
        return f"{table}\nAfter {len(self.preemptions)} preemptions the results {verdict}: {names}."


async def run_drill(drill: Drill) -> DrillResult:
    """Train once uninterrupted and once with preemptions, and compare.

    Raises:
        PreflowError: what is given cannot work, or a training failed.
    """
    drill.plan()
    target, variables = await choose_target(drill)
    order = make_order(drill, variables)
    if drill.deployment is not None:
        await check_deployment(drill.deployment, drill.workspace, order.training)
    logger.info("training %s steps uninterrupted, on %s", order.training.max_steps, order.deployment)
    await target.train(order)
    return DrillResult(*await train_with_preemptions(order, target, drill), baseline=read_digests(order))


async def choose_target(drill: Drill) -> tuple[Target, dict[str, int]]:
    """Return where the drill trains, by the type of the deployment's work pool, and the variables its runs need.

    Raises:
        PreflowError: runs of such a pool cannot be preempted from here, or this account may not.
    """
    if drill.deployment is None:
        return ChildTarget(drill.grace_seconds), {}
    deployment = await read_deployment(drill.deployment)
    async with get_client() as client:
        pool = await client.read_work_pool(deployment.work_pool_name) if deployment.work_pool_name else None
    if pool is None or pool.type != "kubernetes":
        kind = f"a pool of type {pool.type}" if pool else "no work pool"
        raise PreflowError(
            f"deployment {drill.deployment} runs on {kind}: the drill preempts pods of a pool of type kubernetes, and "
            "without --deployment a training on this machine"
        )
    target = PodTarget(drill.grace_seconds, namespace_of(pool, deployment.job_variables))
    await target.check()
    # A container that is killed counts as a failed pod, unlike an evicted one.
    return target, {"backoff_limit": 6 + drill.preemptions}


def make_order(drill: Drill, variables: Mapping[str, Any]) -> TrainingOrder:
    """Return the drill's training, in the folder of the uninterrupted one; what it needs is made where it is not given.

    Raises:
        PreflowError: the tiny model cannot be made, or put where the training would find it, or a setting is wrong.
    """
    store = Workspace(drill.workspace)
    store.check_writable()
    own = {"max_steps": drill.steps, "save_steps": max(1, drill.steps // 4), "eval_steps": drill.steps,
           "logging_steps": 1, "warmup_steps": 2, "lease_seconds": 10, "full_determinism": True}  # fmt: skip
    made, pairs = ({}, drill.pairs) if drill.pairs else _make_materials(store)
    try:
        training = TrainingConfig.model_validate(own | made | dict(drill.training))
    except ValidationError as error:
        raise PreflowError("\n".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())) from error
    return TrainingOrder(
        deployment=drill.deployment or "this machine", preferences=read_pairs(pairs), training=training,
        workspace=store.uri("drill", f"uninterrupted-{digest([drill.deployment])[:8]}"),
        max_restarts=2 * drill.preemptions, job_variables=variables,
    )  # fmt: skip


def _make_materials(store: Workspace) -> tuple[dict[str, Any], str]:
    """Make a tiny model and its pairs in the workspace; return the settings that suit them, and the train.jsonl."""
    if not store.is_local:
        raise PreflowError(
            f"workspace {store.root}: the drill's own tiny model needs a folder (on a pod: below /workspace). "
            "For a bucket give --pairs, and base_model (a name on the hub) and sft_adapter with --set."
        )
    try:
        return make_tiny_materials(Path(store.root, "drill", "materials"))
    except ImportError as error:
        raise PreflowError(
            f"the drill's own tiny model is made with torch, which is not installed here ({error}). Run the drill "
            "where preflow[train] is, or give --pairs, and base_model and sft_adapter with --set."
        ) from error


def read_pairs(uri: str) -> PreferencesRef:
    """Return the reference of a train.jsonl, with the val.jsonl next to it where there is one."""
    store, val = Workspace.holding(uri), posixpath.join(posixpath.dirname(uri), "val.jsonl")
    if not store.exists(uri):
        raise PreflowError(f"pairs {uri}: no such file; give the train.jsonl of a preferences folder")
    rows, held_out = (sum(1 for _ in store.lines(file)) if store.exists(file) else 0 for file in (uri, val))
    return PreferencesRef(uri=uri, sha256=store.sha256(uri), size=store.size(uri), rows=rows, val_rows=held_out)


async def train_with_preemptions(
    baseline: TrainingOrder, target: Target, drill: Drill
) -> tuple[list[Preemption], dict[str, str]]:
    """Train the same in a new folder, preempted as planned, and return what each preemption cost, and the digests."""
    folder = posixpath.join(posixpath.dirname(baseline.workspace), f"preempted-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}")
    order = replace(baseline, workspace=folder)
    training = asyncio.create_task(target.train(order))
    watch, done = TrainingWatch(order, training), list[Preemption]()
    try:
        for step, kind in drill.plan():
            await watch.until(step)
            started = time.monotonic()
            await target.preempt(order, kind)
            at_step, resumed_from = watch.step(), watch.saved_step()
            await watch.until(at_step, again=True)
            done.append(Preemption(kind, at_step, resumed_from, time.monotonic() - started))
            logger.info("preempted: %s", done[-1])
        await training
    finally:
        training.cancel()
        await asyncio.gather(training, return_exceptions=True)
    return done, read_digests(order)


class TrainingWatch:
    """How far a training is, seen from outside by what it writes into the workspace."""

    def __init__(self, order: TrainingOrder, training: "asyncio.Task[AdapterRef]") -> None:
        self._training = training
        self._store = Workspace(order.workspace)
        self._folder = self._store.uri("training", order.key)

    def step(self) -> int:
        """Return the last optimizer step that was logged."""
        return max((row["step"] for row in map(json.loads, self._metrics().splitlines())), default=0)

    def saved_step(self) -> int:
        """Return the step of the newest whole checkpoint, from which a training goes on; 0 if there is none."""
        folder = f"{self._folder}/checkpoints"
        names = [name for name in self._store.folders(folder) if re.fullmatch(r"step-\d+", name)]
        whole = [name for name in names if self._store.exists(posixpath.join(folder, name, COMMITTED))]
        return max((int(name.removeprefix("step-")) for name in whole), default=0)

    async def until(self, step: int, again: bool = False) -> None:
        """Wait until a step is logged; `again`: by a training that has written since.

        Raises:
            PreflowError: the training ended before.
        """
        before = self._metrics() if again else None
        while self.step() < step or self._metrics() == before:
            if self._training.done():
                await self._training
                raise PreflowError(f"the training ended before step {step} was preempted: raise --steps")
            await asyncio.sleep(WATCH_SECONDS if self._store.is_local else WATCH_BUCKET_SECONDS)

    def _metrics(self) -> bytes:
        uri = f"{self._folder}/metrics.jsonl"
        return self._store.read_bytes(uri) if self._store.exists(uri) else b""


def read_digests(order: TrainingOrder) -> dict[str, str]:
    """Return the digests of the finished adapter's files and of the metrics."""
    store = Workspace(order.workspace)
    files = store.verify_folder(store.uri("training", order.key, "adapter"))
    metrics = store.sha256(store.uri("training", order.key, "metrics.jsonl"))
    return {name: facts.sha256 for name, facts in files.items() if name != COMMITTED} | {"metrics.jsonl": metrics}
