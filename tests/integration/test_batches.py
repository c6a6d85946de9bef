"""Judging through a batch API that answers late, in another order, in part, or not at all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.judge import judge_preferences
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
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Scene {number}."}],
            "completions": [sample(f"scene {number}", seed, None) for seed in range(3)],
        }
        for number in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


async def judge(completions: Path, workspace: Path, fake: FakeBatches, batch: bool = True) -> PreferencesRef:
    judging = JudgingConfig(
        endpoint=fake.url, model="judge-hash", api_key=None, rubric="demo", orders=ORDERS, batch=batch, **PRICES
    )
    return await judge_preferences(import_completions(str(completions), str(workspace)), str(workspace), judging)


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
        # The first question goes the normal way, unless the killed process has it.
        assert (len(fake.batches), len(fake.asked)) == (1, ROWS * ORDERS - 1)
        assert fake.direct <= 1


async def test_a_batch_that_is_refused_says_why_and_leaves_no_trace(completions: Path, tmp_path: Path) -> None:
    with FakeBatches(refused="Enqueued token limit reached") as fake:
        with pytest.raises(PreflowError, match=r"Enqueued token limit reached.*judging\.batch to false"):
            await judge(completions, tmp_path, fake)
        fake.refused = ""
        await judge(completions, tmp_path, fake)
        # Each of the two starts has asked one question the normal way.
        assert (len(fake.asked), fake.direct) == (ROWS * ORDERS - 2, 2)


async def test_an_endpoint_without_batches_is_named(completions: Path, tmp_path: Path) -> None:
    with FakeBatches(has_batches=False) as fake, pytest.raises(PreflowError, match=r"judging\.batch to false where"):
        await judge(completions, tmp_path, fake)
