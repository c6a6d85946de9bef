"""The drill's plan, what it sees of a training from outside, and its verdict."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import AsyncMock
from uuid import UUID

import pytest
from prefect.client.schemas.objects import FlowRun, WorkPool
from prefect.client.schemas.responses import DeploymentResponse

import tasks.train.deployment
from tasks.config import TrainingConfig
from tasks.drill import drill
from tasks.drill.drill import Drill, DrillResult, Preemption, TrainingWatch, choose_target, make_order, read_pairs
from tasks.drill.preemption import Kind, PodTarget
from tasks.errors import PreflowError
from tasks.store.workspace import AdapterRef, PreferencesRef
from tasks.train import work_pool
from tasks.train.pods import PodWatch
from tasks.train.work_pool import TrainingOrder

RUN = UUID(int=1)
ADAPTER = AdapterRef(uri="/a", sha256="0", size=0, rows=0)


def test_the_plan_is_that_of_its_seed_and_alternates() -> None:
    plan = Drill("w", preemptions=5).plan()
    assert plan == Drill("w", preemptions=5).plan() != Drill("w", preemptions=5, seed=1).plan()
    steps = [step for step, _ in plan]
    assert steps[0] >= 1
    assert steps == sorted(set(steps))
    assert steps[-1] < 36, "not so near the end that the training is over first"
    assert [kind for _, kind in plan] == [Kind.NOTICE, Kind.AT_ONCE, Kind.NOTICE, Kind.AT_ONCE, Kind.NOTICE]
    assert len(Drill("w", preemptions=2, steps=5).plan()) == 2
    for preemptions in (0, 3):
        with pytest.raises(PreflowError, match="take more steps"):
            Drill("w", preemptions=preemptions, steps=5).plan()


def test_the_table_says_what_each_preemption_cost_and_the_verdict_what_differs() -> None:
    lost = [Preemption(Kind.NOTICE, 7, 8, 9.04), Preemption(Kind.AT_ONCE, 19, 10, 27.0)]
    baseline = {"adapter": "a", "metrics": "m"}
    same, other = DrillResult(lost, dict(baseline), baseline), DrillResult(lost, {"adapter": "a"}, baseline)
    rows = [line.split() for line in same.text().splitlines() if "SIG" in line]
    assert rows == [["1", "SIGTERM", "7", "8", "0", "9"], ["2", "SIGKILL", "19", "10", "9", "27"]]
    assert same.is_exact
    assert "byte for byte: adapter, metrics" in same.text()
    assert not other.is_exact
    assert other.text().endswith("DIFFER from those of the uninterrupted training: metrics.")


def test_without_torch_or_with_a_wrong_setting_it_is_said_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_torch(folder: Path) -> None:
        raise ModuleNotFoundError("No module named 'torch'")

    monkeypatch.setattr(drill, "make_tiny_materials", without_torch)
    with pytest.raises(PreflowError, match=r"torch, which is not installed here .*--pairs"):
        make_order(Drill(str(tmp_path)), {})
    (tmp_path / "train.jsonl").write_text("{}\n")
    given = Drill(str(tmp_path), pairs=str(tmp_path / "train.jsonl"), training={"beta": -1, "nonsense": 1})
    with pytest.raises(PreflowError, match=r"(?s)beta: .*nonsense: "):
        make_order(given, {})


async def test_pods_are_looked_for_where_the_deployment_puts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now, template = datetime(2026, 1, 1, tzinfo=UTC), {"variables": {}, "job_configuration": {}}
    pool = WorkPool(name="pods", type="kubernetes", base_job_template=template)
    deployment = DeploymentResponse(
        name="pods", flow_id=RUN, created=now, updated=now, work_pool_name="pods", job_variables={"namespace": "mine"}
    )

    @asynccontextmanager
    async def client() -> AsyncIterator[SimpleNamespace]:
        answers = {"read_work_pool": AsyncMock(return_value=pool)}
        yield SimpleNamespace(read_deployment_by_name=AsyncMock(return_value=deployment), **answers)

    for module in (drill, tasks.train.deployment, work_pool):
        monkeypatch.setattr(module, "get_client", client)
    monkeypatch.setattr(PodTarget, "check", AsyncMock())
    target, _ = await choose_target(Drill("w", "train-dpo/pods"))
    assert target == PodTarget(15.0, "mine")
    found = await work_pool._read_pool(FlowRun(flow_id=RUN, work_pool_name="pods"), "train-dpo/pods")
    assert PodWatch.of(RUN, *found) == PodWatch(RUN, "mine")


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingOrder:
    monkeypatch.setattr(TrainingOrder, "key", "k")
    pairs = PreferencesRef(uri="/p", sha256="0", size=0, rows=0)
    return TrainingOrder("this machine", pairs, str(tmp_path), TrainingConfig(), 1)


def write_steps(workspace: Path, *steps: int) -> None:
    file = workspace / "training" / "k" / "metrics.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in steps))


def write_checkpoint(workspace: Path, step: int, whole: bool = True) -> None:
    folder = workspace / "training" / "k" / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / ("COMMITTED.json" if whole else "policy.safetensors")).write_text("{}")


async def test_a_training_is_seen_by_its_metrics_and_whole_checkpoints(order: TrainingOrder, tmp_path: Path) -> None:
    watch = TrainingWatch(order, asyncio.create_task(asyncio.sleep(0, ADAPTER)))
    assert (watch.step(), watch.saved_step()) == (0, 0)
    write_steps(tmp_path, 0, 1, 2, 12)
    write_checkpoint(tmp_path, 9)
    write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 11, whole=False)
    assert (watch.step(), watch.saved_step()) == (12, 10)
    await watch.until(12)


async def test_being_back_means_having_written_since(order: TrainingOrder, tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 1, 2)
    training = asyncio.create_task(asyncio.sleep(60, ADAPTER))
    back = asyncio.create_task(TrainingWatch(order, training).until(2, again=True))
    await asyncio.sleep(0.3)
    assert not back.done(), "these are the rows of the trainer that was preempted"
    write_steps(tmp_path, 0, 1)
    await asyncio.sleep(0.3)
    assert not back.done()
    write_steps(tmp_path, 0, 1, 2, 3)
    await asyncio.wait_for(back, 30)
    training.cancel()


async def test_a_training_that_ends_too_early_or_fails_is_no_preemption(order: TrainingOrder, tmp_path: Path) -> None:
    async def fail() -> AdapterRef:
        raise PreflowError("out of memory")

    with pytest.raises(PreflowError, match="ended before step 5 was preempted: raise --steps"):
        await TrainingWatch(order, asyncio.create_task(asyncio.sleep(0, ADAPTER))).until(5)
    with pytest.raises(PreflowError, match="out of memory"):
        await TrainingWatch(order, asyncio.create_task(fail())).until(5)


def test_pairs_of_ones_own_are_found_with_those_held_out(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n{}\n")
    found = read_pairs(str(tmp_path / "train.jsonl"))
    assert (found.rows, found.val_rows) == (2, 0)
    (tmp_path / "val.jsonl").write_text("{}\n")
    assert read_pairs(str(tmp_path / "train.jsonl")).val_rows == 1
    with pytest.raises(PreflowError, match="no such file"):
        read_pairs(str(tmp_path / "nothing.jsonl"))
