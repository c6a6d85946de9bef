"""`preflow up`, and its pieces lost one after the other in the middle of a run that was started with no parameter."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fakes.machine import Machine

PROMPTS = 240
# How long the Prefect server is away, in seconds; PREFLOW_OUTAGE changes it.
OUTAGE = float(os.environ.get("PREFLOW_OUTAGE", "60"))
CONCURRENCY = 64  # of the demo's sampling

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]  # every piece dies in turn


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    machine = Machine(tmp_path_factory.mktemp("machine"))
    machine.prepare({"latency_ms": 8000, "latency_sigma": 0.2}, PROMPTS)
    try:
        machine.do("up")
        yield machine
    finally:
        machine.do("down")


def test_up_has_registered_everything_and_can_be_said_twice(machine: Machine) -> None:
    before = machine.pids()
    assert before.keys() == {"Prefect", "judge", "vLLM", "deployments"}
    assert all(before.values())
    names = {item["name"] for item in machine.ask("POST", "/deployments/filter", {})}
    verbs = ("sweep", "rounds", "generate", "judge", "train", "evaluate", "promote", "rollback", "reconcile")
    assert names == {"demo", *(f"demo-{verb}" for verb in verbs)}
    assert machine.ask("POST", "/work_pools/filter", {}) == [], "a pool that nothing here works on"
    said = machine.do("up")
    assert "it runs already" in said
    assert f"export PREFECT_API_URL=http://127.0.0.1:{machine.ports['UI_PORT']}/api" in said
    assert machine.pids() == before


def test_what_the_form_of_the_demo_opens_with_is_a_valid_start(machine: Machine) -> None:
    run = start(machine, "dpo-pipeline/demo", scheduled="2099-01-01T00:00:00Z")
    config = run["parameters"]["config"]
    assert config["generation"]["endpoint"] == f"http://127.0.0.1:{machine.ports['VLLM_PORT']}/v1"
    schema = machine.ask("GET", "/deployments/name/dpo-pipeline/demo")["parameter_openapi_schema"]
    assert not schema.get("required"), "Quick run opens the whole form"
    machine.ask("POST", f"/flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLED"}, "force": True})


def start(machine: Machine, deployment: str, scheduled: str | None = None) -> dict[str, Any]:
    """Press Run, with nothing typed."""
    found = machine.ask("GET", f"/deployments/name/{deployment}")
    details = {"state_details": {"scheduled_time": scheduled}} if scheduled else {}
    run: dict[str, Any] = machine.ask(
        "POST", f"/deployments/{found['id']}/create_flow_run", {"state": {"type": "SCHEDULED", **details}}
    )
    return run


def test_a_run_survives_the_loss_of_every_piece(machine: Machine) -> None:
    run = start(machine, "generate-completions/demo-generate")

    def state() -> dict[str, Any]:
        found: dict[str, Any] = machine.ask("GET", f"/flow_runs/{run['id']}")
        return found

    machine.wait("the run samples", lambda: len(machine.requests()) >= CONCURRENCY)
    machine.kill("deployments")
    machine.wait("the run is started again", lambda: state()["run_count"] == 2)
    machine.wait("it samples again", lambda: len(machine.requests()) >= 2 * CONCURRENCY)
    lost = machine.pids()["vLLM"]
    machine.kill("vLLM")
    machine.wait("vLLM is back", lambda: machine.pids()["vLLM"] not in (0, lost))
    lose_the_server(machine)
    machine.wait("the run ends", lambda: state()["state_type"] in ("COMPLETED", "FAILED", "CRASHED"))
    assert state()["state_type"] == "COMPLETED", state()["state"]["message"]
    assert state()["run_count"] == 2, "neither vLLM nor the Prefect server takes the run with it"
    check_rows(machine)


def lose_the_server(machine: Machine) -> None:
    """kill -9 the Prefect server, with nobody there to start it again for a while."""
    (supervisord,) = machine.up.leftovers(naming="supervisor.supervisord")
    server = machine.pids()["Prefect"]
    supervisord.suspend()
    for process in [*psutil.Process(server).children(recursive=True), psutil.Process(server)]:
        process.kill()
    time.sleep(OUTAGE)
    supervisord.resume()
    machine.wait("Prefect is back", lambda: bool(machine.ask("GET", "/health")))


def check_rows(machine: Machine) -> None:
    """Every prompt has its completions once, and only what was in flight at a loss was asked for again."""
    (path,) = (machine.folder / ".demo" / "workspace" / "completions").glob("*/completions.jsonl")
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == PROMPTS
    asked = machine.requests()
    repeated = len(asked) - len({row["sha"] for row in asked})
    print(f"{len(asked)} requests, {repeated} repeated")
    assert repeated <= 2 * CONCURRENCY, "vLLM and the worker were lost, nothing else has to be repeated"


def test_down_ends_what_a_killed_supervisord_has_left_and_nothing_of_others(machine: Machine) -> None:
    (supervisord,) = machine.up.leftovers(naming="supervisor.supervisord")
    supervisord.kill()
    supervisord.wait()
    assert machine.up.api() is None
    assert machine.up.leftovers(), "its children have no parent any more"
    assert "ended" in machine.do("down")
    assert not machine.up.leftovers()
    assert "nothing runs" in machine.do("down")
