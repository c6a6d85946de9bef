"""Judging through a batch API that answers late, in another order, in part, or not at all."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import arun_deployment

from flows.judge import judge_preferences
from tasks.batch.leaving import STATE
from tasks.config import JudgingConfig
from tasks.errors import PreflowError
from tasks.judge.elsewhere import import_completions
from tasks.llm import batches, retries
from tasks.store.workspace import PreferencesRef, Workspace
from tests.fakes.batches import FakeBatches
from tests.fakes.models import sample
from tests.fakes.process import ROOT

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.timeout(300)]
ROWS, ORDERS = 60, 2
PRICES = {"prompt_price": 1.0, "completion_price": 10.0}


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the waits."""
    monkeypatch.setattr(retries, "FIRST_BACKOFF_SECONDS", 0.02)
    monkeypatch.setattr(retries, "LONGEST_BACKOFF_SECONDS", 0.2)
    monkeypatch.setattr(batches, "QUIET_SECONDS", 0.5)
    monkeypatch.setattr(batches, "FIRST_POLL_SECONDS", 0.1)


@pytest.fixture(scope="module")
def completions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completions") / "completions.jsonl"
    scenes = {
        f"Scene {number}.": [sample(f"scene {number}", seed, None) for seed in range(3)] for number in range(ROWS)
    }
    rows = [{"prompt": [{"role": "user", "content": text}], "completions": found} for text, found in scenes.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(url: str, batch: bool = True) -> JudgingConfig:
    return JudgingConfig(
        endpoint=url, model="judge-hash", api_key=None, rubric="demo", orders=ORDERS, batch=batch, **PRICES
    )


async def judge(completions: Path, workspace: Path, fake: FakeBatches, batch: bool = True) -> PreferencesRef:
    source = import_completions(str(completions), str(workspace))
    return await judge_preferences(source, str(workspace), settings(fake.url, batch))


def verdicts(workspace: Path) -> tuple[bytes, dict[str, float]]:
    (folder,) = (workspace / "verdicts").iterdir()
    cost = Workspace(str(workspace)).read_manifest(f"{folder}/manifest.json").cost
    return (folder / "verdicts.jsonl").read_bytes(), cost.model_dump()


async def test_the_verdicts_are_those_of_the_normal_way_at_half_the_price(completions: Path, tmp_path: Path) -> None:
    with FakeBatches() as fake:
        await judge(completions, tmp_path / "normal", fake, batch=False)
        assert fake.direct == ROWS * ORDERS
        fake.direct = 0
        await judge(completions, tmp_path / "batch", fake)
        # The first question goes the normal way, and finds out what the endpoint takes.
        assert (fake.direct, len(fake.asked), len(fake.batches)) == (1, ROWS * ORDERS - 1, 1)
        normal, full = verdicts(tmp_path / "normal")
        batched, half = verdicts(tmp_path / "batch")
        assert batched == normal
        one = full["usd"] / (ROWS * ORDERS)
        assert half["usd"] == pytest.approx((full["usd"] + one) / 2, rel=0.01)
        await judge(completions, tmp_path / "batch", fake)
        assert (fake.direct, len(fake.batches)) == (1, 1)


async def test_what_a_batch_does_not_answer_is_asked_the_normal_way(completions: Path, tmp_path: Path) -> None:
    with FakeBatches(lost=0.2, failed=0.1) as fake:
        await judge(completions, tmp_path / "batch", fake)
        assert len(fake.asked) == len(set(fake.asked)) == ROWS * ORDERS - 1
        assert 20 < fake.direct < 60
        await judge(completions, tmp_path / "normal", fake, batch=False)
        assert verdicts(tmp_path / "batch")[0] == verdicts(tmp_path / "normal")[0]


async def test_a_lost_answer_to_the_creation_makes_no_second_batch(completions: Path, tmp_path: Path) -> None:
    with FakeBatches(swallow=1) as fake:
        await judge(completions, tmp_path, fake)
        assert (len(fake.batches), len(fake.asked)) == (1, ROWS * ORDERS - 1)


def killed_once_handed_in(completions: Path, workspace: Path, fake: FakeBatches) -> Path:
    """Judge in a process that dies as soon as its batch is written down; return where."""
    code = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom types import SimpleNamespace\n"
        "from tests.integration.test_batches import judge\n"
        "asyncio.run(judge(Path(sys.argv[1]), Path(sys.argv[2]), SimpleNamespace(url=sys.argv[3])))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(completions), str(workspace), fake.url], cwd=ROOT, start_new_session=True
    )
    try:
        while True:
            for path in workspace.glob("batches/*/*.json"):
                if json.loads(path.read_text())["batch"]:
                    return path
            assert child.poll() is None, "it ended by itself"
            time.sleep(0.1)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@pytest.mark.long  # a process that is killed, twice
@pytest.mark.parametrize("moment", ["created", "unrecorded"])
async def test_a_killed_process_leaves_its_batch_to_the_next(completions: Path, tmp_path: Path, moment: str) -> None:
    with FakeBatches(late=3600) as fake:
        record = killed_once_handed_in(completions, tmp_path, fake)
        if moment == "unrecorded":  # killed before it had read the batch's id
            record.write_text(json.dumps({**json.loads(record.read_text()), "batch": None}))
        fake.batches["batch-0"]["due"] = 0.0
        fake.direct = 0
        await judge(completions, tmp_path, fake)
        # What the killed process has asked, the normal way or in its batch, is not asked again.
        assert (len(fake.batches), len(fake.asked), fake.direct) == (1, ROWS * ORDERS - 1, 0)


async def test_a_batch_that_is_refused_or_cannot_be_handed_in_says_why_and_leaves_no_trace(
    completions: Path, tmp_path: Path
) -> None:
    with FakeBatches(has_batches=False) as fake, pytest.raises(PreflowError, match=r"judging\.batch to false where"):
        await judge(completions, tmp_path / "none", fake)
    with FakeBatches(refused="Enqueued token limit reached") as fake:
        with pytest.raises(PreflowError, match=r"Enqueued token limit reached.*judging\.batch to false"):
            await judge(completions, tmp_path, fake)
        fake.refused = ""
        await judge(completions, tmp_path, fake)
        # Each of the two starts has asked one question the normal way.
        assert (len(fake.asked), fake.direct) == (ROWS * ORDERS - 2, 2)


@contextmanager
def serving(folder: Path) -> Iterator[psutil.Process]:
    """Have a process serve the flow while the block runs; its children are the runs."""
    environment = {**os.environ, "PREFECT_RUNNER_POLL_FREQUENCY": "1", "PYTHONUNBUFFERED": "1"}
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.served_judge"], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
    try:
        while "is being served" not in (folder / "serve.log").read_text():
            assert server.poll() is None, (folder / "serve.log").read_text()
            time.sleep(0.2)
        yield psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait(60)


async def reach(client: PrefectClient, run: UUID, state: str, attempts: int = 1) -> FlowRun:
    """Return a run as soon as it is in a state, at its nth attempt."""
    async with asyncio.timeout(120):
        while True:
            now = await client.read_flow_run(run)
            assert now.state is not None
            assert now.state.name not in ("Failed", "Crashed"), now.state.message
            if now.state.name == state and now.run_count >= attempts:
                return now
            await asyncio.sleep(0.2)


@pytest.mark.long  # a process that serves, and three starts of a run
async def test_a_served_run_leaves_its_process_and_comes_back_until_the_batch_is_answered(
    completions: Path, tmp_path: Path
) -> None:
    given = {"completions": str(completions), "workspace": str(tmp_path)}
    with FakeBatches(late=3600) as fake, serving(tmp_path) as server:
        async with get_client() as client:
            judging = settings(fake.url).model_dump(mode="json", exclude_unset=True)
            run = await arun_deployment(
                "judge-in-batches/served", parameters={**given, "judging": judging}, timeout=0, as_subflow=False
            )
            away = await reach(client, run.id, "AwaitingBatch")
            assert away.state is not None
            assert away.state.message is not None
            assert away.state.message.startswith("batch batch-0: 0 of 119 questions are answered; looked at again at ")
            psutil.wait_procs(server.children(), timeout=30)
            again = await reach(client, run.id, "AwaitingBatch", attempts=2)
            parts = await client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id={"any_": [run.id]}))
            assert [(part.state_name, again.state_name) for part in parts] == [("AwaitingBatch", "AwaitingBatch")]
            assert all(STATE in gone.tags for gone in (again, *parts)), "so that the models are not tried again"
            fake.batches["batch-0"]["due"] = 0.0
            await reach(client, run.id, "Completed", attempts=3)
            (part,) = await client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id={"any_": [run.id]}))
            assert (part.id, part.state_name) == (parts[0].id, "Completed")
        assert (fake.direct, len(fake.asked), len(fake.batches)) == (1, ROWS * ORDERS - 1, 1)
        assert set(Counter(fake.asked).values()) == {1}
    assert "cache record" not in (tmp_path / "serve.log").read_text()
