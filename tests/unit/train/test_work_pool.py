"""A training on a work pool, without one: outages, runs that nobody reports, pools that start nothing."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock
from uuid import UUID

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun, State, WorkPool
from prefect.states import Crashed, Pending, Running, Scheduled

from tasks.config import TrainingConfig
from tasks.errors import PreflowError
from tasks.store.refs import PreferencesRef
from tasks.train import deployment, task
from tasks.train import work_pool as remote
from tasks.train.deployment import check_deployment
from tasks.train.spec import Progress
from tasks.train.task import TrainingView


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "OUTAGE_SECONDS", 0.01)


def status(code: int) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError("no", request=httpx.Request("GET", "http://x"), response=httpx.Response(code))


async def ask(answers: list[Exception | int]) -> Exception | int:
    answer = answers.pop(0)
    if isinstance(answer, Exception):
        raise answer
    return answer


async def test_an_outage_is_waited_out_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tasks.train.work_pool")
    outage = [httpx.ConnectError("refused"), status(503), RuntimeError("Failed to reach API at http://x"), 200]
    assert await remote.retry_while_api_is_down(ask, outage) == 200
    # Prefect's settings of the logs can show a record to two handlers.
    records = {id(record): record for record in caplog.records if record.name == "tasks.train.work_pool"}
    first, last = (record.message for record in records.values())
    assert first.startswith("the Prefect server does not answer (refused)")
    assert last.startswith("the Prefect server answers again after")


@pytest.mark.parametrize("refusal", [status(403), RuntimeError("of another kind"), ValueError("no outage")])
async def test_a_refusal_is_not_waited_for(refusal: Exception) -> None:
    answers: list[Exception | int] = [status(503), refusal, 200]
    with pytest.raises(type(refusal)) as raised:
        await remote.retry_while_api_is_down(ask, answers)
    assert raised.value is refusal
    assert answers == [200]


POOL = WorkPool(name="local", type="process", base_job_template={"variables": {}, "job_configuration": {}})


@pytest.mark.parametrize(("state", "polls"), [(Pending(), 1), (Running(), 1), (Scheduled(), 3)])
async def test_a_run_whose_machine_is_gone_is_marked_as_crashed_also_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: State[Any], polls: int
) -> None:
    seen = [state] * polls

    async def read(run_id: UUID) -> FlowRun:
        return FlowRun(id=run_id, flow_id=run_id, state=seen.pop(0) if seen else Crashed())

    marked = AsyncMock(side_effect=lambda run: seen.clear())
    for name, value in {"_read": read, "_read_pool": AsyncMock(return_value=(POOL, {})), "_mark_crashed": marked,
                        "SILENT_SECONDS": 0.0, "SILENT_LEASES": 0, "POLL_SECONDS": 0.01}.items():  # fmt: skip
        monkeypatch.setattr(remote, name, value)
    monkeypatch.setattr(remote, "url_for", lambda _: None)
    monkeypatch.setattr(remote.TrainingOrder, "key", "k")
    pairs = PreferencesRef(uri="/p", sha256="0", size=0, rows=0)
    order = remote.TrainingOrder("train-dpo/local", pairs, str(tmp_path), TrainingConfig(), 1)
    await remote._follow(FlowRun(flow_id=UUID(int=1)), order)
    assert marked.await_count == (0 if state.is_scheduled() else 1)


@pytest.mark.parametrize(
    ("pool", "queue", "training", "said"),
    [
        ({"is_paused": True}, {}, {}, "work pool local is paused"),
        ({"concurrency_limit": 0}, {}, {}, "work pool local allows 0 runs at once"),
        ({}, {"is_paused": True}, {}, "work queue default of the work pool local is paused"),
        ({}, {"concurrency_limit": 0}, {}, "work queue default of the work pool local allows 0 runs"),
        ({"type": "kubernetes"}, {}, {"workspace": "/data/workspace"},
         r"workspace /data/workspace: a pod of the work pool local cannot.*gs://"),
        ({"type": "kubernetes"}, {}, {"sft_adapter": "sft"}, r"training\.sft_adapter /.*/sft: a pod"),
        ({"type": "kubernetes"}, {}, {"base_model": "/models/base"}, r"base_model /models/base: a pod.*on the hub"),
        ({"type": "kubernetes"}, {}, {"base_model": "./base"}, r"training\.base_model /.*/base: a pod.*on the hub"),
        ({}, {}, {}, None),
    ],
)  # fmt: skip
async def test_a_pool_that_starts_nothing_or_cannot_see_a_folder_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, pool: dict[str, Any], queue: dict[str, Any],
    training: dict[str, str], said: str | None,
) -> None:  # fmt: skip
    @asynccontextmanager
    async def client() -> AsyncIterator[SimpleNamespace]:
        answers = {
            "read_deployment_by_name": SimpleNamespace(work_pool_name="local", work_queue_name=None, paused=False),
            "read_work_pool": POOL.model_copy(update=pool), "read_workers_for_work_pool": [],
            "read_work_queue_by_name": SimpleNamespace(**{"name": "default", "is_paused": False,
                                                          "concurrency_limit": None} | queue),
        }  # fmt: skip
        yield SimpleNamespace(**{name: AsyncMock(return_value=answer) for name, answer in answers.items()})

    monkeypatch.setattr(deployment, "get_client", client)
    given = {"sft_adapter": "gs://bucket/sft", "base_model": "org/base"} | training
    workspace = given.pop("workspace", "/workspace")
    with pytest.raises(PreflowError, match=said) if said else nullcontext():
        await check_deployment("train-dpo/local", workspace, TrainingConfig.model_validate(given))
    assert said or "no worker of the work pool local is online" in caplog.text


def test_a_workspace_that_does_not_answer_costs_a_drawing_and_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> bool:
        raise OSError("the bucket did not do it")

    for name in ("_create_bar", "_move_bar"):
        monkeypatch.setattr(task, name, lambda *_, **__: UUID(int=1))
    monkeypatch.setattr("tasks.store.workspace.Workspace.exists", fail)
    view = TrainingView(str(tmp_path / "metrics.jsonl"))
    for step in (1, 2):
        view.show(Progress("training", step=step, total=2))
    assert caplog.text.count("cannot be shown in the UI (the bucket did not do it)") == 1
