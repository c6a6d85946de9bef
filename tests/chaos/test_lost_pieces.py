"""`make up`, and its pieces lost one after the other in the middle of a run that was started with no parameter."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    pieces = machine.run.state()["pieces"]
    assert {name: piece["ready"] for name, piece in pieces.items()} == dict.fromkeys(pieces, True)
    names = {item["name"] for item in machine.ask("POST", "/deployments/filter", {})}
    assert names == {"local", "demo", "l4-spot"}
    supervisor = machine.run.supervisor()
    said = machine.do("up")
    assert "it runs already" in said
    assert f"export PREFECT_API_URL=http://127.0.0.1:{machine.ports['UI_PORT']}/api" in said
    assert machine.run.supervisor() == supervisor


def test_what_the_form_of_the_demo_opens_with_is_a_valid_start(machine: Machine) -> None:
    run = start(machine, "dpo-pipeline/demo", scheduled="2099-01-01T00:00:00Z")
    config = run["parameters"]["config"]
    assert config["generation"]["endpoint"] == f"http://127.0.0.1:{machine.ports['VLLM_PORT']}/v1"
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
    run = start(machine, "generate-completions/demo")

    def state() -> dict[str, Any]:
        found: dict[str, Any] = machine.ask("GET", f"/flow_runs/{run['id']}")
        return found

    machine.wait("the run samples", lambda: len(machine.requests()) >= CONCURRENCY)
    machine.kill("worker")
    machine.wait("the run is started again", lambda: state()["run_count"] == 2)
    machine.wait("it samples again", lambda: len(machine.requests()) >= 2 * CONCURRENCY)
    machine.kill("vLLM")
    machine.wait("vLLM is back", lambda: is_back(machine, "vLLM"))
    lose_the_server(machine)
    machine.wait("the run ends", lambda: state()["state_type"] in ("COMPLETED", "FAILED", "CRASHED"))
    assert state()["state_type"] == "COMPLETED", state()["state"]["message"]
    assert state()["run_count"] == 2, "neither vLLM nor the Prefect server takes the run with it"
    check_rows(machine)


def is_back(machine: Machine, name: str) -> bool:
    piece = machine.piece(name)
    return piece["restarts"] == 1 and piece["ready"]


def lose_the_server(machine: Machine) -> None:
    """kill -9 the Prefect server, with nobody there to start it again for a while."""
    supervisor = machine.run.supervisor()
    assert supervisor is not None
    os.kill(supervisor, signal.SIGSTOP)
    machine.kill("Prefect")
    time.sleep(OUTAGE)
    os.kill(supervisor, signal.SIGCONT)
    machine.wait(
        "Prefect is back", lambda: machine.piece("Prefect")["restarts"] == 1 and machine.piece("Prefect")["ready"]
    )


def check_rows(machine: Machine) -> None:
    """Every prompt has its completions once, and only what was in flight at a loss was asked for again."""
    (path,) = (machine.folder / ".demo" / "workspace" / "completions").glob("*/completions.jsonl")
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == PROMPTS
    asked = machine.requests()
    repeated = len(asked) - len({row["sha"] for row in asked})
    print(f"{len(asked)} requests, {repeated} repeated")
    assert repeated <= 2 * CONCURRENCY, "vLLM and the worker were lost, nothing else has to be repeated"


def test_what_a_killed_supervisor_leaves_is_gone_and_down_finds_nothing_of_others(machine: Machine) -> None:
    supervisor = machine.run.supervisor()
    assert supervisor is not None
    os.kill(supervisor, signal.SIGKILL)
    machine.wait("all ends with it", lambda: not machine.run.leftovers(), 60)
    assert machine.run.supervisor() is None
    assert machine.run.api() is None
    assert "nothing runs" in machine.do("down")
