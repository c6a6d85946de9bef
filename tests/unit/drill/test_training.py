"""The drill's plan, what it sees of a training from outside, and its verdict."""

import asyncio
import json
from pathlib import Path

import pytest

from tasks.config import DrillConfig, TrainingConfig
from tasks.demo.tiny import pair_rows
from tasks.drill.preemption import Kind
from tasks.drill.training import DrillResult, Preemption, TrainingWatch, plan_preemptions, read_pairs
from tasks.errors import PreflowError
from tasks.store.workspace import AdapterRef, PreferencesRef
from tasks.train.work_pool import TrainingOrder

ADAPTER = AdapterRef(uri="/a", sha256="0", size=0, rows=0)


def test_the_plan_is_that_of_its_seed_and_alternates() -> None:
    plan = plan_preemptions(DrillConfig(preemptions=5, max_steps=40))
    assert plan == plan_preemptions(DrillConfig(preemptions=5, max_steps=40))
    assert plan != plan_preemptions(DrillConfig(preemptions=5, max_steps=40, seed=1))
    steps = [step for step, _ in plan]
    assert steps == sorted(set(steps))
    assert steps[0] >= 1
    assert steps[-1] < 36, "not so near the end that the training is over first"
    assert [kind for _, kind in plan] == [Kind.NOTICE, Kind.AT_ONCE, Kind.NOTICE, Kind.AT_ONCE, Kind.NOTICE]


@pytest.mark.parametrize("steps", [4, 5, 7, 100])
def test_as_many_preemptions_as_are_allowed_can_be_planned(steps: int) -> None:
    drill = DrillConfig(preemptions=steps // 2 if steps < 100 else 50, max_steps=steps)
    assert len(plan_preemptions(drill)) == drill.preemptions


def result(stormy: dict[str, str]) -> DrillResult:
    lost = (
        Preemption(kind=Kind.NOTICE, at_step=7, resumed_from=8, seconds_lost=9.04),
        Preemption(kind=Kind.AT_ONCE, at_step=19, resumed_from=10, seconds_lost=27.0),
    )
    return DrillResult(preemptions=lost, calm={"adapter": "a", "metrics": "m"}, stormy=stormy, price_per_hour=0.36)


def test_the_table_says_what_each_preemption_cost() -> None:
    table = result({"adapter": "a", "metrics": "m"}).table()
    assert table.rows == (
        (1, "SIGTERM", 7, 8, 0, 9.0, 0.000904, True),
        (2, "SIGKILL", 19, 10, 9, 27.0, 0.0027, True),
        ("all", None, None, None, 9, 36.0, 0.003604, True),
    )


def test_the_verdict_names_what_differs() -> None:
    same, other = result({"adapter": "a", "metrics": "m"}), result({"adapter": "a", "metrics": "n"})
    assert same.is_exact
    assert "byte for byte: adapter, metrics" in same.verdict()
    assert not other.is_exact
    assert other.verdict().endswith("DIFFER from those of the undisturbed training: metrics.")
    assert not result({"adapter": "a"}).is_exact


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


async def test_being_back_means_having_written_anew(order: TrainingOrder, tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 1, 2)
    training = asyncio.create_task(asyncio.sleep(60, ADAPTER))
    back = asyncio.create_task(TrainingWatch(order, training).until(2, anew=True))
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

    with pytest.raises(PreflowError, match="ended before step 5 was preempted: raise max_steps"):
        await TrainingWatch(order, asyncio.create_task(asyncio.sleep(0, ADAPTER))).until(5)
    with pytest.raises(PreflowError, match="out of memory"):
        await TrainingWatch(order, asyncio.create_task(fail())).until(5)


def test_pairs_of_ones_own_are_found_with_those_held_out(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n{}\n")
    assert (read_pairs(str(tmp_path / "train.jsonl")).rows, read_pairs(str(tmp_path / "train.jsonl")).val_rows) == (
        2,
        0,
    )
    (tmp_path / "val.jsonl").write_text("{}\n")
    assert read_pairs(str(tmp_path / "train.jsonl")).val_rows == 1
    with pytest.raises(PreflowError, match="no such file"):
        read_pairs(str(tmp_path / "nothing.jsonl"))


def test_the_drills_own_pairs_are_the_same_every_time_and_their_sides_differ() -> None:
    rows = pair_rows(5, held_out=False)
    assert rows == pair_rows(5, held_out=False)
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert not {str(row["prompt"]) for row in rows} & {str(row["prompt"]) for row in pair_rows(5, held_out=True)}
