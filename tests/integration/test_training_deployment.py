"""Training on a work pool: a real server, a real process worker, the real deployment, real signals."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow
from prefect.states import AwaitingRetry, Cancelling

from tasks.config import GenerationConfig, JudgingConfig, PipelineConfig
from tasks.errors import PreflowError
from tasks.run.preflight import prepare_run
from tasks.store.workspace import AdapterRef
from tasks.train import work_pool as remote
from tasks.train.deployment import check_deployment
from tasks.train.launch import run_training
from tasks.train.work_pool import TrainingOrder
from tests.deployed import Worker, ask, process_worker
from tests.fakes.pool_parent import RESTART_SECONDS, pool_parent
from tests.fakes.process import ROOT
from tests.fakes.tiny_training import TinyWorld

DEPLOYMENT = "train-dpo/local"
WAIT_SECONDS = 180.0
# Slow enough to be met in the middle, with a checkpoint to go on from.
LONG = {"max_steps": 150, "save_steps": 10, "eval_steps": 150, "logging_steps": 5}

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]  # the end-to-end run trains through a deployment


@pytest.fixture(scope="module", autouse=True)
def deployed(empty_prefect_server: str) -> None:
    """The work pool and the deployment of the training, as deployments/register.sh makes them."""
    prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
    deploy = ["deploy", "--prefect-file", "deployments/prefect.yaml", "--name", DEPLOYMENT]
    for command in (["work-pool", "create", "local", "--type", "process"], deploy):
        done = subprocess.run([*prefect, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def worker(deployed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with process_worker(tmp_path_factory.mktemp("worker")) as worker:
        yield worker


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.5)
    monkeypatch.setattr(remote, "OUTAGE_SECONDS", 0.5)
    monkeypatch.setattr(remote, "FIRST_RESTART_SECONDS", RESTART_SECONDS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployed_parent(worker: Worker) -> AsyncIterator[str]:
    """The waiting flow as a deployment on the same pool."""
    source: Flow[..., Any] = await Flow.afrom_source(str(ROOT), "tests/fakes/pool_parent.py:impatient_parent")
    await source.adeploy("test", work_pool_name="local", print_next_steps=False)
    yield "impatient-parent/test"


def settings(world: TinyWorld, workspace: Path, max_restarts: int = 5, **training: Any) -> PipelineConfig:
    return PipelineConfig(
        workspace=str(workspace), training_deployment=DEPLOYMENT, max_restarts=max_restarts,
        generation=GenerationConfig(max_tokens=64), judging=JudgingConfig(rubric="neutral"),
        training=world.config(**training),
    )  # fmt: skip


async def children(world: TinyWorld, config: PipelineConfig) -> list[FlowRun]:
    """Return the training runs that were ever started for this configuration, the first one first."""
    return await TrainingOrder.of(world.preferences, config).runs()


async def wait_for(condition: Callable[[], Awaitable[Any]], what: str) -> Any:
    deadline = time.monotonic() + WAIT_SECONDS
    while not (value := await condition()):
        assert time.monotonic() < deadline, f"in {WAIT_SECONDS:.0f} s there was no {what}"
        await asyncio.sleep(0.2)
    return value


async def newest_step(workspace: Path) -> int:
    """Return the step of the newest checkpoint, 0 if there is none."""
    found = workspace.glob("training/*/checkpoints/step-*/COMMITTED.json")
    return max((int(marker.parent.name.removeprefix("step-")) for marker in found), default=0)


async def ended(run_id: UUID) -> FlowRun:
    async def check() -> FlowRun | None:
        async with get_client() as client:
            run = await client.read_flow_run(run_id)
        return run if run.state is not None and run.state.is_final() else None

    run: FlowRun = await wait_for(check, f"end of run {run_id}")
    return run


async def set_state(run_id: UUID, state: State[Any]) -> None:
    async with get_client() as client:
        await client.set_flow_run_state(run_id, state)


def finished(world: TinyWorld, config: PipelineConfig) -> AdapterRef:
    adapter = TrainingOrder.of(world.preferences, config).find_adapter()
    assert adapter is not None
    return adapter


def artifacts(kind: str, run_id: UUID | None = None) -> list[dict[str, Any]]:
    """Return the artifacts of a type, of one run or of all."""
    wanted: dict[str, Any] = {"artifacts": {"type": {"any_": [kind]}}}
    if run_id is not None:
        wanted["flow_runs"] = {"id": {"any_": [str(run_id)]}}
    found: list[dict[str, Any]] = ask(os.environ["PREFECT_API_URL"], "POST", "/artifacts/filter", wanted)
    return found


def lease_token(workspace: Path) -> int:
    (lease,) = workspace.glob("training/*/lease.json")
    return int(json.loads(lease.read_text())["token"])


def kill_group(run: FlowRun) -> None:
    """End everything that executes a flow run on the process worker, at once."""
    assert run.infrastructure_pid is not None
    pid = int(run.infrastructure_pid.rsplit(":", 1)[-1])
    os.killpg(os.getpgid(pid), signal.SIGKILL)


@pytest.fixture(scope="module")
def uninterrupted(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> AdapterRef:
    """What an uninterrupted training on this machine gives, without any deployment."""
    workspace = tmp_path_factory.mktemp("uninterrupted")
    order = TrainingOrder.of(world.preferences, settings(world, workspace, **LONG))
    return run_training(world.preferences, order.workspace, order.training, order.key)


async def test_two_who_ask_at_once_get_the_same_training(world: TinyWorld, worker: Worker, tmp_path: Path) -> None:
    config = settings(world, tmp_path)
    first, second = await asyncio.gather(pool_parent(world.preferences, config), pool_parent(world.preferences, config))
    assert first == second
    here = run_training(
        world.preferences, str(tmp_path / "here"), config.training, TrainingOrder.of(world.preferences, config).key
    )
    assert first.sha256 == here.sha256
    (run,) = await children(world, config)
    assert (run.run_count, lease_token(tmp_path)) == (1, 1)
    links = [link["data"] for link in artifacts("markdown") if DEPLOYMENT in link["description"]]
    assert len(links) == 2, "each of the two links to the training's run"
    assert await pool_parent(world.preferences, config) == first, "a finished training starts nothing"
    assert len(await children(world, config)) == 1


async def start(parent: str, world: TinyWorld, config: PipelineConfig) -> UUID:
    """Start the waiting flow in a process of its own, as the worker does it."""
    parameters = {
        "preferences": world.preferences.model_dump(mode="json"),
        "config": config.model_dump(mode="json"),
    }
    async with get_client() as client:
        deployment = await client.read_deployment_by_name(parent)
        run = await client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
    return run.id


async def test_a_parent_that_is_killed_comes_back_to_the_same_training(
    world: TinyWorld, deployed_parent: str, uninterrupted: AdapterRef, tmp_path: Path
) -> None:
    config = settings(world, tmp_path, **LONG)
    parent = await start(deployed_parent, world, config)
    before = await wait_for(partial(newest_step, tmp_path), "checkpoint")
    async with get_client() as client:
        kill_group(await client.read_flow_run(parent))

    async def went_on() -> bool:
        return await newest_step(tmp_path) > before

    await wait_for(went_on, "checkpoint without the parent")
    run = await ended(parent)
    assert run.state is not None
    assert run.state.is_crashed(), run.state
    await set_state(parent, AwaitingRetry())

    async def completed() -> FlowRun | None:  # the worker may report the killed process once more on the way
        run = await ended(parent)
        return run if run.state is not None and run.state.is_completed() else None

    run = await wait_for(completed, "end of the parent that was executed again")
    (training,) = await children(world, config)
    assert (training.run_count, lease_token(tmp_path)) == (1, 1)
    assert run.run_count >= 2
    assert finished(world, config).sha256 == uninterrupted.sha256
    assert any(str(training.id) in link["data"] for link in artifacts("markdown", parent))


async def test_a_training_that_crashes_too_often_is_reported_and_can_be_started_again(
    world: TinyWorld, worker: Worker, tmp_path: Path
) -> None:
    config = settings(world, tmp_path, max_restarts=0, **LONG)
    asked = asyncio.create_task(pool_parent(world.preferences, config))
    await wait_for(partial(newest_step, tmp_path), "checkpoint")
    kill_group((await children(world, config))[0])
    with pytest.raises(PreflowError, match=r"crashed 1 times, over max_restarts \(0\).*exited with status code: -9"):
        await asked
    again = asyncio.create_task(pool_parent(world.preferences, config))

    async def second() -> FlowRun | None:
        return next(iter((await children(world, config))[1:]), None)

    training = await wait_for(second, "second run")

    async def trains() -> bool:
        return lease_token(tmp_path) == 2

    # Prefect takes five minutes to cancel a run whose process is about to start.
    await wait_for(trains, "trainer of the second run")
    await set_state(training.id, Cancelling())
    with pytest.raises(PreflowError, match=r"was cancelled .*run again"):
        await again


async def test_a_failed_training_says_why_and_starts_again_once_that_is_fixed(worker: Worker, tmp_path: Path) -> None:
    world = TinyWorld.build(tmp_path / "world")  # one that may be broken
    config = settings(world, tmp_path / "workspace")
    template, aside = world.base / "chat_template.jinja", tmp_path / "aside"
    template.rename(aside)
    try:
        with pytest.raises(
            PreflowError, match=r"failed: no chat template in [\s\S]*Its run is http.*run again"
        ) as caught:
            await pool_parent(world.preferences, config)
        (failed,) = await children(world, config)
    finally:
        aside.rename(template)
    assert str(failed.id) in str(caught.value)
    assert Path((await pool_parent(world.preferences, config)).uri).is_dir()
    (again,) = await children(world, config)  # the template is part of the key
    assert again.state is not None
    assert again.state.is_completed()


async def test_a_cancelled_parent_cancels_its_training(world: TinyWorld, deployed_parent: str, tmp_path: Path) -> None:
    config = settings(world, tmp_path, max_steps=100_000, save_steps=10, eval_steps=100_000)
    parent = await start(deployed_parent, world, config)
    await wait_for(partial(newest_step, tmp_path), "checkpoint")
    await set_state(parent, Cancelling())
    (training,) = await children(world, config)
    for cancelled in (parent, training.id):
        run = await ended(cancelled)
        assert run.state is not None
        assert run.state.is_cancelled(), run.state


async def test_a_run_whose_whole_machine_is_gone_is_seen_as_crashed_by_its_silence(
    world: TinyWorld, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "SILENT_SECONDS", 2.0)
    config = settings(world, tmp_path, max_steps=60, save_steps=10, eval_steps=60, lease_seconds=1)
    asked = asyncio.create_task(pool_parent(world.preferences, config))
    await wait_for(partial(newest_step, tmp_path), "checkpoint")
    worker.kill()
    kill_group((await children(world, config))[0])

    async def second() -> FlowRun | None:
        return next(iter((await children(world, config))[1:]), None)

    await wait_for(second, "second run")
    worker.start()
    assert Path((await asked).uri).is_dir()
    assert [run.state_name for run in await children(world, config)] == ["Crashed", "Completed"]


async def test_a_deployment_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path, world: TinyWorld) -> None:
    with pytest.raises(PreflowError, match=r"no such deployment on http.*found: .*train-dpo/local.*register\.sh"):
        await check_deployment("train-dpo/l40-spot", str(tmp_path), world.config())


async def test_the_pipeline_checks_its_deployment_before_it_asks_anybody(world: TinyWorld, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": [{"role": "user", "content": "w1"}]}) + "\n")
    config = settings(world, tmp_path / "workspace")
    config = config.model_copy(update={"prompts": str(prompts), "training_deployment": "train-dpo/nowhere"})
    with pytest.raises(PreflowError, match="there is no such deployment"):
        await prepare_run(config)
