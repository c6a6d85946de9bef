"""The deployments on a real server: they deploy, their forms explain themselves, wrong values are refused."""

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from tasks.config import PipelineConfig
from tests.deployed import COMPUTE_CLASS, IMAGE, Api, register
from tests.fakes.process import ROOT

PREFECT_FILE = "deployments/prefect.yaml"
TEMPLATE = "deployments/l4-spot.job-template.json"
NAMES = {
    "dpo-pipeline/local", "dpo-sweep/local", "generate-completions/local", "judge-preferences/local", "train-dpo/local",
    "train-dpo/l4-spot", "evaluate-adapter/local", "promote-adapter/local", "rollback-adapter/local",
    "audit-preferences/local", "dpo-rounds/local",
    "reconcile-served/local", "publish-adapter/local",
}  # fmt: skip


@pytest.fixture(scope="module")
def api(registered_prefect_server: str) -> Api:
    """The server with both pools and all deployments, made by the commands that the documentation gives."""
    return Api(registered_prefect_server)


def test_every_deployment_is_there_and_nothing_starts_by_itself(api: Api) -> None:
    deployments = {f"{api.get('/flows/' + item['flow_id'])['name']}/{item['name']}": item
                   for item in api.post("/deployments/filter", {})}  # fmt: skip
    assert set(deployments) == NAMES
    for name, item in deployments.items():
        assert len(item["description"]) > 100, name
        assert "preflow" in item["tags"], name
        assert item["enforce_parameter_schema"], name
        assert item["work_pool_name"] == name.split("/")[1]
        for schedule in item["schedules"]:
            assert not schedule["active"], name
    enabled = {automation["name"] for automation in api.post("/automations/filter", {}) if automation["enabled"]}
    assert enabled == {"preflow-restart-crashed", "preflow-crash-unstarted"}, "only what was started may start again"


def test_runs_that_would_harm_each_other_wait(api: Api) -> None:
    alone = {
        "dpo-pipeline/local", "dpo-sweep/local", "train-dpo/local", "promote-adapter/local", "rollback-adapter/local",
        "dpo-rounds/local", "reconcile-served/local", "publish-adapter/local",
    }  # fmt: skip
    limited = {name: item for name in NAMES if (item := api.deployment(name))["global_concurrency_limit"]}
    assert set(limited) == alone
    assert {item["global_concurrency_limit"]["limit"] for item in limited.values()} == {1}
    assert {item["concurrency_options"]["collision_strategy"] for item in limited.values()} == {"ENQUEUE"}


def test_the_pipeline_has_a_nightly_schedule_and_a_trigger_to_turn_on(api: Api) -> None:
    deployment = api.deployment("dpo-pipeline/local")
    (nightly,) = deployment["schedules"]
    assert (nightly["slug"], nightly["schedule"]["cron"]) == ("nightly", "0 2 * * *")
    assert PipelineConfig.model_validate(nightly["parameters"]["config"]).judging.rubric, "else it fails every night"
    automation = api.automation("preflow-new-prompts")
    assert automation["trigger"]["expect"] == ["preflow.prompts.arrived"]
    assert automation["actions"][0]["deployment_id"] == deployment["id"]
    assert automation["actions"][0]["parameters"]["config"]["prompts"]["__prefect_kind"] == "jinja"


def test_code_comes_from_the_checkout_and_on_the_pool_from_the_image(api: Api) -> None:
    (step,) = api.deployment("train-dpo/local")["pull_steps"]
    assert step == {"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}
    (step,) = api.deployment("train-dpo/l4-spot")["pull_steps"]
    assert step == {"prefect.deployments.steps.set_working_directory": {"directory": "/opt/preflow"}}


def test_the_pool_has_the_template_with_the_image_that_was_named(api: Api) -> None:
    template = json.loads((ROOT / TEMPLATE).read_text())
    template["variables"]["properties"]["image"]["default"] = IMAGE
    template["variables"]["properties"]["compute_class"]["default"] = COMPUTE_CLASS
    assert api.get("/work_pools/l4-spot")["base_job_template"] == template


@pytest.mark.long  # registers twice
def test_registering_again_leaves_the_settings_of_a_pool_alone(api: Api) -> None:
    before = api.get("/work_pools/l4-spot")
    register("pools", PREFLOW_TRAIN_IMAGE="registry.example/another:1")
    assert api.get("/work_pools/l4-spot") == before


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_form_explains_itself(api: Api, name: str) -> None:
    schema = api.deployment(name)["parameter_openapi_schema"]
    models = [model for model in schema.get("definitions", {}).values() if "properties" in model]
    for model in models:
        is_reference = "kind" in model["properties"]
        assert is_reference or not model.get("required"), f"{model['title']}: a changed field would lose its neighbours"
    for model in [schema, *models]:
        for field, spec in model["properties"].items():
            assert len(spec.get("description", "")) >= 4, f"{model['title']}.{field} has no description"
            assert spec.get("title"), f"{model['title']}.{field} has no title"


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("generate-completions/local", {"generation": {"temperature": 5}}, "temperature"),
        ("generate-completions/local", {"generation": {"no_such_setting": 1}}, "no_such_setting"),
        ("dpo-pipeline/local", {"config": {"training": {"loss_type": "hing"}}}, "hing"),
        ("dpo-sweep/local", {"sweep": {"presets": ["bta"]}}, "bta"),
        ("dpo-sweep/local", {"sweep": {"grid": {"training.beta": 0.1}}}, "0.1"),
        ("dpo-sweep/local", {"sweep": {"grid": {"judging.api_key": "env:ONE"}}}, "env:ONE"),
        ("dpo-sweep/local", {"sweep": {"changes": ["training.beta"]}}, "training.beta"),
        ("judge-preferences/local", {}, "completions"),
        ("train-dpo/l4-spot", {}, "preferences"),
    ],
)
def test_a_wrong_parameter_is_refused_before_the_run(
    api: Api, name: str, parameters: dict[str, Any], said: str
) -> None:
    before = len(api.runs(name))
    given = api.deployment(name)["parameters"] | parameters
    answer = api.create_run(name, given)
    assert answer.status_code in (409, 422), answer.text
    assert said in answer.text
    assert len(api.runs(name)) == before


def test_the_defaults_alone_are_a_valid_start(api: Api) -> None:
    """What the form opens with passes the server's check, for the flows that need no other stage's result."""
    for name in ("dpo-pipeline/local", "dpo-sweep/local", "generate-completions/local"):
        answer = api.create_run(name, {})
        assert answer.status_code == 201, answer.text
        run = answer.json()
        api.post(f"/flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLED"}, "force": True})


def test_the_trigger_starts_the_pipeline_on_the_prompts_of_the_event(api: Api) -> None:
    """The server takes a while to see that a trigger was turned on, and runs of other tests may be there too."""
    arrived = {"prompts": "/new/prompts.jsonl"}
    wanted = {"config": {**arrived, "judging": {"rubric": "neutral"}}}
    api.switch("preflow-new-prompts", on=True)
    deadline, started = time.monotonic() + 90, list[Any]()
    try:
        while wanted not in started and time.monotonic() < deadline:
            event = {
                "id": str(uuid4()), "occurred": datetime.now(UTC).isoformat(), "event": "preflow.prompts.arrived",
                "resource": {"prefect.resource.id": "preflow.prompts.scenes"}, "payload": arrived,
            }  # fmt: skip
            api.post("/events", [event])
            time.sleep(2)
            started = [run["parameters"] for run in api.runs("dpo-pipeline/local")]
    finally:
        api.switch("preflow-new-prompts", on=False)
    assert wanted in started


# ---- keys

KEY = "sk-abcdefghijklmnopqrstuvwxyz123456"
PLACES = ["judging.api_key", "generation.api_key", "promotion.api_key", "judging.panel", "evaluation.judging.api_key"]


def plant(place: str) -> tuple[dict[str, Any], Any]:
    """Return a configuration with a key in it, and what has been put there."""
    *path, last = place.split(".")
    value = [{"model": "m", "api_key": KEY}] if last == "panel" else KEY
    config: dict[str, Any] = {last: value}
    for name in reversed(path):
        config = {name: config}
    return config, value


def refuse(api: Api, deployment: str, parameters: dict[str, Any], key: str = KEY) -> None:
    """See that a run is refused, and that what was typed is neither in the server's database nor in a log."""
    assert api.create_run(deployment, parameters).status_code in (409, 422)
    check_not_stored(key)


def check_not_stored(key: str = KEY) -> None:
    files = [file for file in Path(os.environ["PREFECT_HOME"]).parent.rglob("*") if file.is_file()]
    assert any(file.name == "prefect.db" for file in files)
    assert [str(file) for file in files if key.encode() in file.read_bytes()] == []


@pytest.mark.parametrize("place", PLACES)
def test_a_key_is_refused_before_there_is_a_run(api: Api, place: str) -> None:
    config, value = plant(place)
    refuse(api, "dpo-pipeline/local", {"config": config})
    for sweep in ({"grid": {place: [value]}}, {"changes": [{place: value}]}):
        refuse(api, "dpo-sweep/local", {"sweep": sweep})
    path = f"/deployments/{api.deployment('dpo-pipeline/local')['id']}"
    assert api.client.patch(path, json={"parameters": {"config": config}}).status_code == 409
    check_not_stored()


def test_prefect_s_own_command_is_refused_one_too(api: Api) -> None:
    given = json.dumps({"config": plant("judging.api_key")[0]})
    command = [sys.executable, "-m", "prefect", "deployment", "run", "dpo-pipeline/local", "--params", given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "api_key" in done.stdout + done.stderr, "refused for another reason"
    check_not_stored()


def test_nor_an_address_with_a_password_in_it(api: Api) -> None:
    for address in ("https://user:hunter2-is-secret@host/v1", "https://host/v1?key=hunter2-is-secret"):
        refuse(api, "generate-completions/local", {"generation": {"endpoint": address}}, "hunter2-is-secret")


def test_the_file_names_every_flow_and_says_which_are_started_again() -> None:
    """A flow that is added needs a deployment; a training is started again by whoever asked for it."""
    flows = {path.stem for path in (ROOT / "flows").glob("*.py")} - {"__init__", "demo"}
    deployments = yaml.safe_load((ROOT / PREFECT_FILE).read_text())["deployments"]
    assert {item["entrypoint"].split(":")[0] for item in deployments} == {f"flows/{name}.py" for name in flows}
    left_alone = {item["entrypoint"].split(":")[1] for item in deployments if "restarted" not in item["tags"]}
    assert left_alone == {"train_dpo", "rollback_adapter", "publish_adapter"}
