"""A sweep with real parts: a Prefect server, trainings of a tiny model, endpoints that log what they are asked."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.client.schemas.objects import State
from prefect.flows import Flow

from flows.sweep import dpo_sweep
from tasks.config import PipelineConfig, SweepConfig
from tasks.errors import PreflowError
from tasks.generate import sampling
from tasks.judge import asking
from tasks.judge.prompt import build_messages, read_rubric
from tasks.promote.pointer import read_pointer
from tasks.run.estimate import plan_runs
from tasks.sweep.prepare import prepare_points
from tasks.sweep.ranking import SweepResult
from tasks.train import work_pool as remote
from tests.deployed import ask, process_worker
from tests.fakes import FakeOpenAI
from tests.fakes.openai_server import prompt_id
from tests.fakes.process import ROOT
from tests.fakes.tiny_training import WORDS, TinyWorld

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]  # the end-to-end run has a sweep of two

PROMPTS, HELD_OUT, CONCURRENCY = 14, 5, 4
BETAS, JUDGES = [0.05, 0.1, 0.2], ["judge-hash", "judge-length"]
GRID = {"training.beta": BETAS, "judging.model": JUDGES}
PLAN = {"latency_ms": 15, "oracle_every": 3}
TRIALS = {
    prompt_id(sampling.TRIAL["prompt"]), prompt_id(build_messages(read_rubric("demo"), asking.TRIAL, [0, 1])),
}  # fmt: skip
Row = dict[str, Any]


@dataclass
class Bench:
    """Models, prompts and an endpoint, with a workspace that tests fill one after another."""

    folder: Path
    fake: FakeOpenAI
    api: str
    world: TinyWorld

    @property
    def workspace(self) -> Path:
        return self.folder / "workspace"

    def config(self, **judging: Any) -> PipelineConfig:
        common = {"endpoint": self.fake.url, "max_concurrency": CONCURRENCY, "max_outage_seconds": 0.5}
        return PipelineConfig.model_validate(
            {
                "prompts": str(self.folder / "prompts.jsonl"),
                "eval_prompts": str(self.folder / "held-out.jsonl"),
                "workspace": str(self.workspace),
                "generation": {**common, "model": "sampler"},
                "judging": {**common, "model": "judge-hash", "api_key": None, "rubric": "demo", **judging},
                "training": {
                    "base_model": str(self.world.base), "sft_adapter": str(self.world.adapter),
                    "load_in_4bit": False, "bf16": False, "gradient_checkpointing": False, "learning_rate": 1e-2,
                    "max_steps": 3, "warmup_steps": 1, "gradient_accumulation_steps": 2, "max_length": 512,
                    "save_steps": 1, "logging_steps": 1,
                },
                "evaluation": {"num_samples": 2},
                "promotion": {"endpoint": None, "min_win_rate": 0.0},
            }
        )  # fmt: skip

    def asked(self, start: int = 0) -> list[Row]:
        """The chat requests that the endpoint answered, from the `start`-th on, without the questions on trial."""
        return [row for row in self.fake.requests()[start:] if row["status"] == 200 and row["prompt"] not in TRIALS]

    def trainings(self) -> list[Path]:
        return [marker.parents[1] for marker in self.workspace.glob("training/*/adapter/COMMITTED.json")]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, empty_prefect_server: str, world: TinyWorld) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("sweep")
    for name, first, count in (("prompts", 0, PROMPTS), ("held-out", 50, HELD_OUT)):
        rows = [
            {"prompt": [{"role": "user", "content": " ".join(WORDS[number : number + 6])}]}
            for number in range(first, first + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with FakeOpenAI({**PLAN, "base": str(world.base)}, folder / "fake") as fake:
        yield Bench(folder, fake, empty_prefect_server, world)


async def swept(bench: Bench, **sweep: Any) -> SweepResult:
    result = await dpo_sweep(bench.config(), SweepConfig.model_validate(sweep))
    assert isinstance(result, SweepResult)
    return result


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def result(bench: Bench) -> SweepResult:
    """Three betas with two judges, all of it new."""
    return await swept(bench, grid=GRID, gpu_price=0.35)


def test_every_stage_is_done_once_for_all_points_that_share_it(bench: Bench, result: SweepResult) -> None:
    assert [point.error for point in result.points] == [None] * 6
    asked = bench.asked()
    assert len({row["sha"] for row in asked}) == len(asked), "something was asked twice"
    # What a request is for is told by what it asks: 3 completions are the generation's, 2 the evaluation's.
    assert Counter((row["model"], row["n"]) for row in asked if row["model"] == "sampler") == {
        ("sampler", 3): PROMPTS,
        ("sampler", 2): 2 * HELD_OUT,  # SFT against which all are measured, and SFT again
    }
    judged, compared = PROMPTS * 2, HELD_OUT * 2 * 2
    count = Counter(row["model"] for row in asked)
    assert count["judge-length"] == judged
    assert count["judge-hash"] == judged + (len(result.points) + 1) * compared, "one null comparison for all"
    candidates = {name: number for name, number in count.items() if name.startswith("candidate-")}
    assert sorted(candidates.values()) == [HELD_OUT] * 6
    assert len(bench.trainings()) == 6
    assert len(list(bench.workspace.glob("training/*"))) == 6


def test_the_reference_is_computed_once_for_each_set_of_pairs(bench: Bench, result: SweepResult) -> None:
    logs = [(folder / "train.log").read_text() for folder in bench.trainings()]
    found = Counter(where for log in logs for where in re.findall(r"reference log-probs taken from (\S+)", log))
    assert sorted(found.values()) == [2, 2], "of three betas on one set of pairs the first computes it"
    assert sorted(found) == sorted(str(path) for path in bench.workspace.glob("reference-logprobs/*"))


def artifacts(bench: Bench, key: str) -> list[Row]:
    body = {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC"}
    found: list[Row] = ask(bench.api, "POST", "/artifacts/filter", body)
    return found


def test_the_plan_came_first_and_was_right(bench: Bench, result: SweepResult) -> None:
    (plan,) = artifacts(bench, "sweep-plan")
    asked = bench.asked()
    assert datetime.fromisoformat(plan["created"]).timestamp() < asked[0]["time"]
    text = plan["data"]
    assert f"Still to come: 6 trainings and {len(asked)} requests, about 0.0" in text
    assert re.search(rf"\| sample completions \(sampler\) \| 1-6 \| {PROMPTS} \| 0 \|.*no price set", text)
    assert re.search(rf"\| judge preferences \(judge-length\) \| 2, 4, 6 \| {PROMPTS * 2} \|", text)
    # 3 steps of 2 x 2 pairs at 1.14 pairs a second, at 0.35 US$ an hour.
    assert len(re.findall(r"\| train \(this machine\) \| \d \| – \| – \| – \| – \| – \| 11 s \| 0\.001 \|", text)) == 6
    assert re.search(rf"evaluate: compare SFT with itself \(judge-hash\) \| 1-6 \| {HELD_OUT * 4} \|", text)


def test_the_result_is_ranked_and_shown(bench: Bench, result: SweepResult) -> None:
    rates = [(point.rate, point.widened) for point in result.ranked() if point.rate and point.widened]
    assert len(rates) == 6
    assert rates == sorted(rates, key=lambda pair: pair[0].win_rate, reverse=True)
    for alone, widened in rates:
        assert widened.lower <= alone.lower <= alone.win_rate <= alone.upper <= widened.upper
    assert len({point.evaluation_fingerprint for point in result.points}) == 1
    assert len({(point.null.win_rate, point.null.lower) for point in result.points if point.null}) == 1
    (shown,) = artifacts(bench, "sweep")
    assert "data:image/png;base64," in shown["data"]
    folder = bench.workspace / "sweeps" / result.key
    names = [f"point-{number}.html" for number in range(1, 7)] + ["report.html", "result.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    best = result.best()
    page = (folder / "report.html").read_text()
    assert f"point {best.number} ({best.name})" in page
    assert "prefect deployment run dpo-pipeline/local" in page
    for name in names[:6]:
        assert "It is not served: a sweep promotes no point by itself." in (folder / name).read_text()
    assert not (bench.workspace / "adapters").exists(), "a sweep promotes nothing by itself"


async def test_a_second_start_asks_nobody_and_trains_nothing(bench: Bench, result: SweepResult) -> None:
    (kept,) = bench.workspace.glob("sweeps/*/result.json")
    before, asked = kept.read_bytes(), len(bench.fake.requests(path=None))
    marks = {path: path.stat().st_mtime_ns for path in bench.workspace.rglob("COMMITTED.json")}
    assert await swept(bench, grid=GRID) == result
    assert len(bench.fake.requests(path=None)) == asked
    assert {path: path.stat().st_mtime_ns for path in bench.workspace.rglob("COMMITTED.json")} == marks
    assert kept.read_bytes() == before


async def test_a_sweep_of_known_points_costs_nothing(bench: Bench, result: SweepResult) -> None:
    config, sweep = bench.config(), SweepConfig(grid={"training.beta": BETAS[:2]})
    plan = plan_runs([point.config for point in prepare_points(config, sweep).points], sweep)
    assert all(work.finished for work in plan.work)
    assert (plan.total().to_ask, plan.total().usd) == (0, 0)
    asked = len(bench.asked())
    smaller = await swept(bench, grid=sweep.grid)
    assert [p.rate for p in smaller.points] == [result.points[0].rate, result.points[2].rate]
    assert len(bench.asked()) == asked


async def test_a_point_that_fails_leaves_the_others(bench: Bench, result: SweepResult) -> None:
    known = {"training.beta": 0.1}
    with FakeOpenAI({"faults": {"error_500": 1.0}}) as broken:
        changes = [
            {**known, "judging.model": "judge-first", "judging.endpoint": broken.url},
            {**known, "judging.model": "judge-last", "judging.endpoint": "http://127.0.0.1:9/v1"},
            known,
        ]
        state = await dpo_sweep(bench.config(), SweepConfig(changes=changes), return_state=True)
        assert isinstance(state, State)
        assert (state.name, state.is_completed()) == ("Partial", True)
        assert "1 of 3 points finished" in str(state.message)
        found = await state.aresult()
        first, second, third = found.points
        assert broken.url in first.error
        assert "http://127.0.0.1:9/v1 is not usable" in second.error
        assert third.rate == result.points[2].rate
        assert found.ranking == (3,)
        shown = artifacts(bench, "sweep")[0]["data"]
        assert "Points that failed" in shown
        assert "Points 1-2 failed" in shown
        with pytest.raises(PreflowError, match=r"judge-first.* has given no answer"):  # before any point is begun
            await dpo_sweep(bench.config(), SweepConfig(changes=changes[:1]))


async def test_a_sweep_over_its_budget_asks_nobody(bench: Bench, result: SweepResult) -> None:
    asked = len(bench.fake.requests(path=None))
    config = bench.config(completion_price=1000.0)
    with pytest.raises(PreflowError, match=r"over sweep\.budget_usd \(0\.50\).*Nothing was spent"):
        await dpo_sweep(config, SweepConfig(grid={"judging.seed": [1, 2]}, budget_usd=0.5))
    assert len(bench.fake.requests(path=None)) == asked


async def test_the_best_is_promoted_where_that_is_asked_for(bench: Bench, result: SweepResult) -> None:
    best = result.best()
    promoted = await swept(bench, grid=GRID, promote_best=True)
    pointer = read_pointer(str(bench.workspace), "dpo")
    assert pointer.current.adapter_sha256 == best.made.adapter.sha256
    page = bench.workspace / "sweeps" / result.key / f"point-{best.number}.html"
    assert f"Adapter {pointer.current.adapter_sha256[:12]} is served as" in page.read_text()
    assert await swept(bench, grid=GRID, promote_best=True) == promoted


@pytest.fixture
def pool(bench: Bench) -> Iterator[str]:
    prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
    subprocess.run([*prefect, "work-pool", "create", "sweep", "--type", "process"], check=True, timeout=120)
    with process_worker(bench.folder, "sweep"):
        yield "sweep"


async def test_on_a_pool_points_train_at_once_and_nothing_is_asked_twice(
    bench: Bench, result: SweepResult, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.5)
    # Unlike the deployments of prefect.yaml, this one has no limit on its runs.
    source: Flow[..., Any] = await Flow.afrom_source(str(ROOT), "flows/train.py:train_dpo")
    await source.adeploy("sweep", work_pool_name=pool, print_next_steps=False)
    first = len(bench.fake.requests())
    config = bench.config(seed=9).model_copy(update={"training_deployment": "train-dpo/sweep"})
    sweep = SweepConfig(grid={"training.learning_rate": [1e-3, 2e-3]}, parallel=2)
    found = await dpo_sweep(config, sweep)
    assert isinstance(found, SweepResult)
    assert [point.error for point in found.points] == [None, None]
    asked = bench.asked(first)
    assert len({row["sha"] for row in asked}) == len(asked)
    async with get_client() as client:
        runs = await client.read_flow_runs(
            deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=["sweep"]))
        )
    (a, b) = ((run.start_time, run.end_time) for run in runs)
    assert None not in (*a, *b)
    assert max(a[0], b[0]) < min(a[1], b[1]), "the two trainings were not under way at once"


# ---- kill -9

SWEEP = """
import asyncio, json, sys
from flows.sweep import dpo_sweep
from tasks.config import PipelineConfig, SweepConfig
config, sweep = (json.loads(argument) for argument in sys.argv[1:])
asyncio.run(dpo_sweep(PipelineConfig.model_validate(config), SweepConfig.model_validate(sweep)))
"""


def start(bench: Bench, log: Path, script: str, settings: Row) -> subprocess.Popen[bytes]:
    """Start a flow as a process of its own, which finds its way to the server by the environment."""
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-c", script, bench.config().model_dump_json(), json.dumps(settings)],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip


def run_killed(
    bench: Bench, log: Path, script: str, settings: Row, moments: Sequence[Callable[[], bool]], repeated: int
) -> None:
    """Run a flow to its end, killed -9 at each of some moments; the trainer is a session of its own.

    Of all that is asked no more than `repeated` requests may be asked twice.
    """
    first = len(bench.fake.requests())
    for reached in moments:
        process = start(bench, log, script, settings)
        while not reached():
            assert process.poll() is None, f"it ended before it was to be killed:\n{log.read_text()[-3000:]}"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    process = start(bench, log, script, settings)
    assert process.wait(600) == 0, log.read_text()[-3000:]
    asked = bench.asked(first)
    twice = len(asked) - len({row["sha"] for row in asked})
    assert twice <= repeated, f"{twice} requests were repeated"


def test_killed_and_started_again_it_asks_nothing_twice_and_ends_the_same(bench: Bench, result: SweepResult) -> None:
    """Runs last: it starts over in the place where the others had their workspace, so that all paths are the same."""
    changes = [{"training.beta": beta} for beta in BETAS[:2]]
    results = {path: json.loads(path.read_text()) for path in bench.workspace.glob("sweeps/*/result.json")}
    (undisturbed,) = (path for path, kept in results.items() if [p["change"] for p in kept["points"]] == changes)
    name, expected = undisturbed.relative_to(bench.workspace), undisturbed.read_bytes()
    shutil.move(bench.workspace, bench.folder / "before")
    first, log = len(bench.fake.requests()), bench.folder / "sweep.log"

    def judging_begun() -> bool:
        return sum(row["model"] == "judge-hash" for row in bench.asked(first)) >= 5

    def second_training_begun() -> bool:
        return len({path.parent for path in bench.workspace.glob("training/*/checkpoints/step-*")}) == 2

    settings = {"grid": {"training.beta": BETAS[:2]}}
    run_killed(bench, log, SWEEP, settings, (judging_begun, second_training_begun), CONCURRENCY)
    assert (bench.workspace / name).read_bytes() == expected
    assert len(bench.trainings()) == len(list(bench.workspace.glob("training/*"))) == 2
