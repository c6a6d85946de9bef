"""The Prefect UI as a person uses it: start, watch, read, approve, and go on after a crash.

Pictures of every page are kept in tests/output (or where PREFLOW_TEST_PICTURES says).
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from tasks.demo.up import Up
from tests.browser import PrefectUi, faults, open_browser
from tests.deployed import process_worker, rest_client
from tests.fakes.process import ROOT, FakeOpenAI
from tests.fakes.tiny_training import build_adapter, build_base

KEY = "a-key-for-the-judge"
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

pytestmark = pytest.mark.timeout(1500)


@dataclass
class World:
    """A server with the deployments, a worker, endpoints, a tiny model, and a browser that looks at it all."""

    folder: Path
    api: httpx.Client
    ui: PrefectUi
    sampler: FakeOpenAI
    judge: FakeOpenAI

    def get(self, path: str) -> Any:
        return self._ask("GET", path)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        return self.api.request(method, path, json=body).raise_for_status().json()

    def deployment(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/deployments/name/{name}/local")
        return found

    def runs(self, name: str) -> list[dict[str, Any]]:
        """Return the runs of a deployment, the newest first."""
        chosen = {"deployments": {"id": {"any_": [self.deployment(name)["id"]]}}, "sort": "EXPECTED_START_TIME_DESC"}
        found: list[dict[str, Any]] = self.post("/flow_runs/filter", chosen)
        return found

    def start(self, name: str, parameters: dict[str, Any]) -> str:
        path = f"/deployments/{self.deployment(name)['id']}/create_flow_run"
        return str(self.post(path, {"parameters": parameters})["id"])

    def wait(self, run: str, *states: str) -> dict[str, Any]:
        """Wait until a run is in a state of one of these types, and return it."""

        def there() -> dict[str, Any] | None:
            found: dict[str, Any] = self.get(f"/flow_runs/{run}")
            # For a moment a run that was not approved has failed, until a hook of the flow says what became of it.
            refused = found["state_type"] == "FAILED" and "NotApproved" in found["state"]["message"]
            if found["state_type"] in ENDED and found["state_type"] not in states and not refused:
                raise AssertionError(f"{found['state_type']}: {found['state']['message']}")
            return found if found["state_type"] in states else None

        return until(there)


def until(look: Callable[[], Any], seconds: float = 600) -> Any:
    """Return the first true answer of `look`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.25)
    raise AssertionError(f"{look.__qualname__}: not within {seconds} s")


def write_prompts(path: Path, name: str, count: int) -> str:
    rows = [{"prompt": [{"role": "user", "content": f"INT. {name} - SCENE {number}"}]} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def world(registered_prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("browser")
    build_adapter(folder / "sft", build_base(folder / "base"))
    with (
        pytest.MonkeyPatch.context() as environment,
        FakeOpenAI({"oracle_every": 3, "base": str(folder / "base")}, folder / "sampler") as sampler,
        FakeOpenAI({"key": KEY}, folder / "judge") as judge,
    ):
        environment.setenv("BROWSER_JUDGE_KEY", KEY)
        environment.setenv("PREFECT_LOGGING_TO_API_ENABLED", "true")
        with process_worker(folder), open_browser() as page:
            ui = PrefectUi(page, registered_prefect_server.removesuffix("/api"))
            found = World(folder, rest_client(registered_prefect_server), ui, sampler, judge)
            turn_off(found, "preflow-restart-crashed")  # here a person presses Retry
            yield found


def turn_off(world: World, name: str) -> None:
    """Turn an automation off, as the switch in the UI does."""
    (automation,) = (found for found in world.post("/automations/filter", {}) if found["name"] == name)
    world.api.patch(f"/automations/{automation['id']}", json={"enabled": False}).raise_for_status()


def pipeline_config(world: World) -> dict[str, Any]:
    """Return a whole run of a tiny model that asks before it judges and before it promotes."""
    return {
        "prompts": write_prompts(world.folder / "prompts.jsonl", "COFFEE SHOP", 24),
        "eval_prompts": write_prompts(world.folder / "held-out.jsonl", "KITCHEN", 8),
        "workspace": str(world.folder / "workspace"),
        "generation": {"endpoint": world.sampler.url, "model": "sft", "max_tokens": 64},
        "judging": {
            "endpoint": world.judge.url, "model": "judge-oracle", "api_key": "env:BROWSER_JUDGE_KEY",
            "rubric": "neutral", "prompt_price": 0.3, "completion_price": 2.5,
        },
        "training": {
            "base_model": str(world.folder / "base"), "sft_adapter": str(world.folder / "sft"), "load_in_4bit": False,
            "bf16": False, "gradient_checkpointing": False, "learning_rate": 1e-3, "max_steps": 4, "warmup_steps": 1,
            "max_length": 256, "logging_steps": 1, "eval_steps": 2, "gradient_accumulation_steps": 2,
        },
        "evaluation": {"num_samples": 2, "null_test": False},
        "promotion": {"name": "better", "endpoint": None, "min_win_rate": 0.0},
        "approve_before": ["judging", "promotion"],
    }  # fmt: skip


def open_form(world: World, name: str) -> None:
    world.ui.open(f"/deployments/deployment/{world.deployment(name)['id']}/run")
    expect(world.ui.page.get_by_role("button", name="Submit")).to_be_visible()


def test_wrong_values_are_refused_in_the_form(world: World) -> None:
    """A number out of bounds by the browser, a text of the wrong form by the server; both before there is a run."""
    open_form(world, "generate-completions")
    titles = form_titles(world)
    submit = world.ui.page.get_by_role("button", name="Submit")
    temperature = world.ui.field(titles["temperature"])
    temperature.fill("5")
    submit.click()
    assert "less than or equal to 2" in temperature.evaluate("field => field.validationMessage")
    temperature.fill("0.9")
    world.ui.field(titles["endpoint"]).fill("vllm:8000")
    submit.click()
    expect(world.ui.page.get_by_text("'vllm:8000' does not match").first).to_be_visible()
    world.ui.picture("form-wrong-value")
    assert world.runs("generate-completions") == []


def form_titles(world: World) -> dict[str, str]:
    """Return the title that the form gives each field of the sampling stage."""
    schema = world.deployment("generate-completions")["parameter_openapi_schema"]
    fields = {**schema["properties"], **schema["definitions"]["GenerationConfig"]["properties"]}
    return {name: field.get("title", name) for name, field in fields.items()}


@pytest.mark.long  # a run; Quick run is started next to it
def test_a_run_is_started_from_the_form_and_unchanged_fields_keep_their_defaults(world: World) -> None:
    prompts = write_prompts(world.folder / "form.jsonl", "STREET", 6)
    open_form(world, "generate-completions")
    titles, ui = form_titles(world), world.ui
    ui.field(titles["prompts"]).fill(prompts)
    ui.field(titles["workspace"]).fill(str(world.folder / "form-workspace"))
    ui.field(titles["endpoint"]).fill(world.sampler.url)
    last = ui.field(titles["num_completions"])
    last.fill("4")
    ui.field("Run Name").fill("my first run")
    ui.picture("form-filled")
    ui.press(ui.page.get_by_role("button", name="Submit"), last)
    (run,) = until(lambda: world.runs("generate-completions"))
    ui.open(f"/runs/flow-run/{run['id']}")
    ui.wait_for_state("Completed")
    ui.picture("run-of-a-stage")
    assert world.get(f"/flow_runs/{run['id']}")["name"] == "my first run"
    given = run["parameters"]["generation"]
    assert (given["num_completions"], given["temperature"], given["max_tokens"]) == (4, 0.9, 256)
    (file,) = (world.folder / "form-workspace" / "completions").glob("*/completions.jsonl")
    assert [len(json.loads(line)["completions"]) for line in file.read_text().splitlines()] == [4] * 6


@pytest.mark.long  # a run; another test runs the pipeline
def test_quick_run_starts_with_two_clicks(world: World) -> None:
    """As `preflow up` serves it: nothing is typed, no form opens."""
    up = Up(world.folder / "served")
    up.run.mkdir(parents=True)
    config = {**pipeline_config(world), "workspace": str(world.folder / "quick-workspace"), "approve_before": []}
    (up.run / "serving.json").write_text(json.dumps({"name": "quick", "config": config, "sweep": {}}))
    serving = subprocess.Popen([sys.executable, "-m", "preflow.serving", str(up.root)], cwd=ROOT)
    try:
        until(up.served.exists)
        deployment = world.get("/deployments/name/generate-completions/quick-generate")
        world.ui.open(f"/deployments/deployment/{deployment['id']}")
        world.ui.page.get_by_role("button", name="Run", exact=True).click()
        world.ui.page.get_by_role("menuitem", name="Quick run").click()
        chosen = {"deployments": {"id": {"any_": [deployment["id"]]}}}
        (run,) = until(lambda: world.post("/flow_runs/filter", chosen))
        expect(world.ui.page.get_by_role("dialog")).to_have_count(0)
        world.ui.picture("quick-run")
        assert world.wait(run["id"], "COMPLETED")["name"] == "sample sft"
    finally:
        serving.terminate()
        serving.wait(60)


def test_a_key_typed_into_the_form_is_refused_and_stored_nowhere(world: World) -> None:
    key = "sk-abcdefghijklmnopqrstuvwxyz123456"
    open_form(world, "publish-adapter")
    definitions = world.deployment("publish-adapter")["parameter_openapi_schema"]["definitions"]
    world.ui.field(definitions["PublishingConfig"]["properties"]["token"]["title"]).fill(key)
    world.ui.page.get_by_role("button", name="Submit").click()
    expect(world.ui.page.get_by_text("does not match").first).to_be_visible()
    assert world.runs("publish-adapter") == []
    home = Path(os.environ["PREFECT_HOME"])
    files = [file for file in (*home.parent.rglob("*"), *world.folder.rglob("*")) if file.is_file()]
    assert any(file.name == "prefect.db" for file in files)
    assert [str(file) for file in files if key.encode() in file.read_bytes()] == []


@pytest.fixture(scope="module")
def waiting(world: World) -> str:
    """A run of the whole pipeline that waits for a yes before its judge is paid."""
    run = world.start("dpo-pipeline", {"config": pipeline_config(world)})
    world.wait(run, "PAUSED")
    return run


@pytest.mark.long  # a second run
def test_a_no_ends_the_run_as_cancelled_with_the_reason(world: World, waiting: str) -> None:
    """While another run waits: it holds neither the worker nor the one place that the deployment has."""
    config = pipeline_config(world)
    config["judging"] |= {"seed": 7, "orders": 3}
    run = world.start("dpo-pipeline", {"config": config})
    world.wait(run, "PAUSED")
    assert world.get(f"/flow_runs/{waiting}")["state_type"] == "PAUSED"
    approve(world, run, "approval-refused", "72 questions", False, "too dear for now")
    ended = world.wait(run, "CANCELLED")
    assert "too dear for now" in ended["state"]["message"]
    assert judged(world) == []


def test_a_run_waits_for_a_yes_and_its_pages_can_be_read(world: World, waiting: str) -> None:
    ui = world.ui
    assert judged(world) == [], "the judge was paid before anybody approved"
    approve(world, waiting, "approval-of-judging", "48 questions", True, "cheap enough")
    until(lambda: judged(world))
    world.wait(waiting, "PAUSED")
    asked = len(judged(world))
    approve(world, waiting, "approval-of-promotion", "The new adapter wins", True, "reads well")
    ui.wait_for_state("Completed")
    world.wait(waiting, "COMPLETED")
    assert len(judged(world)) == asked, "a resumed run asked the judge again"
    assert (world.folder / "workspace" / "adapters" / "better" / "CURRENT.json").exists()
    (answers,) = (world.folder / "workspace" / "runs").glob("*/approvals/promotion.json")
    assert [(a["approve"], a["note"]) for a in json.loads(answers.read_text())["answers"]] == [(True, "reads well")]
    ui.open(f"/runs/flow-run/{waiting}?tab=Artifacts")
    ui.picture("run-of-the-pipeline")
    ui.page.get_by_text("report", exact=True).first.click()
    # Its history; each version is named by the first digits of its id.
    ui.page.get_by_role("link", name=re.compile("^[0-9a-f]{8}$")).first.click()
    expect(ui.page.get_by_role("heading", name="At a glance")).to_be_visible()
    read_artifacts(world)


def judged(world: World) -> list[dict[str, Any]]:
    """Return what the judge was asked, but for the question on trial that every execution of a run begins with."""
    asked = world.judge.requests()
    return [request for request in asked if request["prompt"] != asked[0]["prompt"]]


def approve(world: World, run: str, picture: str, shown: str, yes: bool, note: str) -> None:
    """Resume a waiting run from its page, after a look at the form."""
    ui = world.ui
    ui.open(f"/runs/flow-run/{run}")
    ui.wait_for_state("Suspended")
    ui.choose("Resume")
    dialog = ui.page.get_by_role("dialog")
    expect(dialog.get_by_text(shown)).to_be_visible()
    expect(dialog.get_by_role("link", name="Read the page first")).to_be_visible()
    if yes:
        dialog.get_by_role("switch").click()
    dialog.locator("textarea").fill(note)
    ui.picture(picture, whole=False)
    ui.press(dialog.get_by_role("button", name="Resume"), dialog)


def read_artifacts(world: World) -> None:
    """Open every page that a run has left, and see that its pictures are there."""
    latest = world.post("/artifacts/latest/filter", {})
    pages = {item["key"]: item["latest_id"] for item in latest if item["type"] == "markdown"}
    assert set(pages) >= {"report", "preferences", "example-pairs", "training", "evaluation", "cost", "lineage"}
    pictures = {"report": 9, "preferences": 2, "training": 6, "training-live": 6}
    for key, artifact in pages.items():
        world.ui.open(f"/artifacts/artifact/{artifact}")
        expect(world.ui.page.get_by_role("tabpanel").get_by_role("heading").first).to_be_visible()
        widths = until(
            lambda key=key: len(found := world.ui.pictures_shown()) >= pictures.get(key, 0) and (found or [1])
        )
        assert all(width > 0 for width in widths), f"{key}: a picture is broken: {widths}"
        world.ui.picture(f"artifact-{key}")


def test_the_report_opens_from_the_disk(world: World) -> None:
    (report,) = (world.folder / "workspace" / "runs").glob("*/report.html")
    page = world.ui.page
    page.goto(report.as_uri())
    expect(page.get_by_role("heading", name="At a glance")).to_be_visible()
    assert len(world.ui.pictures_shown()) == 9  # win rates, two of the judge, six of the training
    assert all(width > 0 for width in world.ui.pictures_shown())
    world.ui.picture("report")
    page.set_viewport_size({"width": 390, "height": 844})
    assert faults(page) == []
    world.ui.picture("report-phone", whole=False)
    page.set_viewport_size({"width": 1400, "height": 1000})


@pytest.mark.long  # a second run, killed
def test_a_crashed_run_goes_on_from_the_retry_button(world: World) -> None:
    prompts = write_prompts(world.folder / "crash.jsonl", "SUBWAY", 40)
    workspace, ui = world.folder / "crash-workspace", world.ui
    with FakeOpenAI({"latency_ms": 400}, world.folder / "slow") as slow:
        generation = {"endpoint": slow.url, "max_concurrency": 2, "num_completions": 2}
        run = world.start(
            "generate-completions", {"prompts": prompts, "workspace": str(workspace), "generation": generation}
        )
        until(lambda: len(kept_rows(workspace)) >= 5)
        for pid in until(lambda: processes_of(run)):
            os.kill(pid, signal.SIGKILL)
        world.wait(run, "CRASHED")
        kept = kept_rows(workspace)
        assert 0 < len(kept) < 40
        ui.open(f"/runs/flow-run/{run}")
        ui.wait_for_state("Crashed")
        ui.picture("run-crashed")
        ui.choose("Retry")
        dialog = ui.page.get_by_role("alertdialog").or_(ui.page.get_by_role("dialog"))
        ui.press(dialog.get_by_role("button", name="Retry"), dialog)
        # The worker may report the first process's end once more: the page takes that for the last word.
        until(lambda: world.get(f"/flow_runs/{run}")["state_type"] == "COMPLETED")
        ui.open(f"/runs/flow-run/{run}")
        ui.wait_for_state("Completed")
        ui.picture("run-retried")
        asked = Counter(request["prompt"] for request in slow.requests())
    assert len(asked) == 40
    # Only what was under way when the process died may be asked again: two requests, and one in the client's hands.
    assert sum(count > 1 for count in asked.values()) <= 3
    assert world.get(f"/flow_runs/{run}")["run_count"] >= 2


def kept_rows(workspace: Path) -> list[str]:
    """Return the lines of the rows that are kept."""
    files = (workspace / "rows").rglob("*.jsonl")
    return [line for file in files for line in file.read_text().splitlines()]


def processes_of(run: str) -> list[int]:
    """Return the processes that execute a flow run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:  # it has ended, or is another user's
            continue
        if b"prefect.engine" in command and run.encode() in environment:
            found.append(int(folder.name))
    return found
