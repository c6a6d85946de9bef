"""The automations on a real server: who is told of a crashed or silent run, and what is started again, how often."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
import yaml
from aiohttp import web
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.events.schemas.events import Event
from prefect.states import Crashed, Pending, Running, Suspended

from tests.deployed import Worker, until
from tests.fakes.http import served
from tests.fakes.process import ROOT, FakeOpenAI

FILE = ROOT / "deployments" / "automations.yaml"
ALWAYS = {"preflow-restart-crashed", "preflow-crash-unstarted"}
UNSTARTED = ("Pending", "Submitting")
NOTIFYING = {"preflow-notify-crashed", "preflow-notify-silent"}

# Silence is waited for, on a server of its own. test_deployments shows what is registered, and what is on.
pytestmark = pytest.mark.long


class Receiver:
    """A webhook's target on this machine that keeps what it is sent."""

    def __init__(self) -> None:
        self.messages: list[dict[str, str]] = []

    async def take(self, request: web.Request) -> web.Response:
        self.messages.append(await request.json())
        return web.Response()

    def about(self, subject: str) -> list[dict[str, str]]:
        return [message for message in self.messages if subject in message["subject"]]


def register(file: Path = FILE, block: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run deployments/automations.py as register.sh does."""
    environment = {**os.environ, **({"PREFLOW_NOTIFY_BLOCK": block} if block else {})}
    return subprocess.run(
        [sys.executable, "deployments/automations.py", str(file)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def client(empty_prefect_server: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        for name in ("local", "elsewhere"):
            client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        yield client


@pytest.fixture(scope="module")
def receiver(client: SyncPrefectClient) -> Iterator[Receiver]:
    """A receiver, with every notification of the automations going there."""
    receiver, application = Receiver(), web.Application()
    application.router.add_post("/", receiver.take)
    with served(application) as url:
        block = CustomWebhookNotificationBlock(
            name="receiver", url=f"{url}/", json_data={"subject": "{{subject}}", "body": "{{body}}"}
        )
        block.save("receiver")
        done = register(block="custom-webhook/receiver")
        assert done.returncode == 0, done.stderr
        yield receiver


def register_sooner(folder: Path, seconds: int, block: str | None = None) -> None:
    """Register them with 15 seconds for the time that silence, or a start, may take."""
    soon = folder / "automations.yaml"
    soon.write_text(FILE.read_text().replace(f"within: {seconds}", "within: 15"))
    assert register(soon, block).returncode == 0


def crash(client: SyncPrefectClient, run: FlowRun) -> None:
    """Have a run begin, and crash."""
    for state in (Running(), Crashed(message="killed")):
        client.set_flow_run_state(run.id, state, force=True)


def automations(client: SyncPrefectClient) -> dict[str, Any]:
    names = [item["name"] for item in yaml.safe_load(FILE.read_text())["automations"]]
    return {name: automation for name in names for automation in client.read_automations_by_name(name)}


def switch(client: SyncPrefectClient, name: str, on: bool) -> None:
    """Turn an automation on or off, as the switch in the UI does."""
    id = automations(client)[name].id
    client._client.patch(f"/automations/{id}", json={"enabled": on}).raise_for_status()


def make_run(
    client: SyncPrefectClient,
    pool: str,
    parameters: dict[str, Any] | None = None,
    flow: str = "generate-completions",
    tags: Sequence[str] = ("restarted",),
    limit: int | None = None,
) -> FlowRun:
    """Make a run of a deployment; no worker is there to start it."""
    deployment = client.create_deployment(
        flow_id=client.create_flow_from_name(flow), name=f"on-{pool}", work_pool_name=pool, tags=list(tags),
        entrypoint="flows/generate.py:generate_completions",
        pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}],
        concurrency_limit=limit,
    )  # fmt: skip
    return client.create_flow_run_from_deployment(deployment, parameters=parameters or {})


def state_of(client: SyncPrefectClient, run: UUID) -> str:
    state = client.read_flow_run(run).state
    assert state is not None
    return str(state.name)


def test_without_a_block_nobody_is_told_and_it_says_what_to_do(client: SyncPrefectClient) -> None:
    done = register()
    assert done.returncode == 0, done.stderr
    found = automations(client)
    assert {name for name, automation in found.items() if automation.enabled} == ALWAYS
    for name in NOTIFYING:
        assert found[name].actions[0].type == "do-nothing"
        assert "PREFLOW_NOTIFY_BLOCK" in found[name].description


def test_a_block_that_does_not_exist_is_named(client: SyncPrefectClient) -> None:
    done = register(block="slack-webhook/nobody")
    assert done.returncode == 1
    assert "slack-webhook/nobody: no such block" in done.stderr


def test_with_a_block_they_are_on_and_one_turned_off_stays_off(client: SyncPrefectClient, receiver: Receiver) -> None:
    found = automations(client)
    assert {name for name, automation in found.items() if automation.enabled} == {*NOTIFYING, *ALWAYS}
    switch(client, "preflow-notify-silent", on=False)
    assert register(block="custom-webhook/receiver").returncode == 0
    assert not automations(client)["preflow-notify-silent"].enabled
    assert len(automations(client)) == 5


def test_a_crashed_run_is_told_of_and_started_again_three_times(client: SyncPrefectClient, receiver: Receiver) -> None:
    run = make_run(client, "local")
    for attempt in (1, 2, 3, 4):
        crash(client, run)
        until(lambda attempt=attempt: len(receiver.about(run.name)) == attempt)
        if attempt < 4:
            until(lambda: state_of(client, run.id) == "AwaitingRetry")
    time.sleep(3)
    assert state_of(client, run.id) == "Crashed", "started a fourth time"
    message = receiver.about(run.name)[0]
    assert message["subject"] == f"preflow: {run.name} crashed"
    assert "killed" in message["body"]
    assert str(run.id) in message["body"]


@pytest.mark.parametrize(("pool", "flow"), [("elsewhere", "generate-completions"), ("local", "train-dpo")])
def test_what_something_else_starts_again_is_told_of_and_left_to_it(
    client: SyncPrefectClient, receiver: Receiver, pool: str, flow: str
) -> None:
    run = make_run(client, pool, flow=flow, tags=())
    crash(client, run)
    until(lambda: receiver.about(run.name))
    time.sleep(3)
    assert state_of(client, run.id) == "Crashed"


def test_a_process_that_goes_without_a_word_is_told_of(
    client: SyncPrefectClient, receiver: Receiver, tmp_path: Path
) -> None:
    switch(client, "preflow-notify-silent", on=True)
    register_sooner(tmp_path, 900, block="custom-webhook/receiver")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": [{"role": "user", "content": "Scene"}]}) + "\n")
    with FakeOpenAI({"latency_ms": 600_000}) as sampler:
        parameters = {"prompts": str(prompts), "workspace": str(tmp_path), "generation": {"endpoint": sampler.url}}
        run = make_run(client, "local", parameters)
        with (tmp_path / "engine.log").open("w") as log:
            engine = subprocess.Popen(
                [sys.executable, "-m", "prefect.engine", str(run.id)], cwd=ROOT, stdout=log, stderr=log
            )
        try:
            until(lambda: sampler.requests() or engine.poll() is not None)
            assert engine.poll() is None, (tmp_path / "engine.log").read_text()
            name = client.read_flow_run(run.id).name
            time.sleep(2)  # for its first heartbeat to arrive
        finally:
            engine.send_signal(signal.SIGKILL)
            engine.wait()
        until(lambda: receiver.about(f"nothing is heard of {name}"))
    assert state_of(client, run.id) == "Running", "only told of, not touched"


def test_a_silent_run_is_taken_for_crashed_if_so_wished_and_a_suspended_one_never(
    client: SyncPrefectClient, tmp_path: Path
) -> None:
    register_sooner(tmp_path, 900)
    switch(client, "preflow-crash-silent", on=True)
    silent, suspended = (make_run(client, "elsewhere", flow="audit-judge", tags=()) for _ in range(2))
    for run in (silent, suspended):
        client.set_flow_run_state(run.id, Running(), force=True)
        related = {
            "prefect.resource.id": f"prefect.deployment.{run.deployment_id}",
            "prefect.resource.role": "deployment",
        }
        resource = {"prefect.resource.id": f"prefect.flow-run.{run.id}"}
        beat = Event.model_validate({"event": "prefect.flow-run.heartbeat", "resource": resource, "related": [related]})
        client._client.post("/events", json=[beat.model_dump(mode="json")]).raise_for_status()
    time.sleep(2)  # for the heartbeats to arrive
    client.set_flow_run_state(suspended.id, Suspended(timeout_seconds=3600), force=True)
    until(lambda: state_of(client, silent.id) == "Crashed")
    time.sleep(3)
    assert state_of(client, suspended.id) == "Suspended", "it waits for somebody's answer, which may take days"
    switch(client, "preflow-crash-silent", on=False)


def test_a_run_whose_worker_dies_before_it_begins_is_started_again_and_frees_its_slot(
    client: SyncPrefectClient, tmp_path: Path
) -> None:
    register_sooner(tmp_path, 240)
    first = make_run(client, "local", flow="promote-adapter", limit=1)
    worker = Worker(tmp_path)
    until(lambda: state_of(client, first.id) in UNSTARTED)
    children = psutil.Process(worker.pid).children(recursive=True)
    worker.kill()
    for child in children:
        child.kill()
    assert state_of(client, first.id) in UNSTARTED, "too late: it has begun"
    third = make_run(client, "local", flow="promote-adapter", limit=1)
    client.set_flow_run_state(third.id, Pending())
    assert state_of(client, third.id) == "AwaitingConcurrencySlot"
    until(lambda: state_of(client, first.id) == "AwaitingRetry")
    client.set_flow_run_state(third.id, Pending())
    assert state_of(client, third.id) == "Pending"
