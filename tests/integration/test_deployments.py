"""The deployments on a real server: they deploy, their forms explain themselves, wrong values are refused."""

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import httpx
import pytest
import yaml

from tasks.config import PipelineConfig
from tests.deployed import register, rest_client
from tests.fakes.process import ROOT

PREFECT_FILE = "deployments/prefect.yaml"
TEMPLATE = "deployments/l4-spot.job-template.json"
NAMES = {
    "dpo-pipeline/local", "dpo-sweep/local", "generate-completions/local", "judge-preferences/local", "train-dpo/local",
    "train-dpo/l4-spot", "evaluate-adapter/local", "promote-adapter/local", "rollback-adapter/local",
    "audit-preferences/local", "dpo-rounds/local",
    "reconcile-served/local", "publish-adapter/local",
}  # fmt: skip
IMAGE = "registry.example/preflow/train@sha256:" + "0" * 64


class Api:
    """The server's REST API."""

    def __init__(self, url: str) -> None:
        self._client = rest_client(url)

    def get(self, path: str) -> Any:
        return self._ask("GET", path).json()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self._ask("POST", path, body).json()

    def patch(self, path: str, body: dict[str, Any]) -> None:
        self._ask("PATCH", path, body)

    def send(self, events: list[dict[str, Any]]) -> None:
        self._ask("POST", "/events", events)

    def _ask(self, method: str, path: str, body: object = None) -> httpx.Response:
        answer = self._client.request(method, path, json=body)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer

    def deployment(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/deployments/name/{name}")
        return found

    def automation(self, name: str) -> dict[str, Any]:
        found = [item for item in self.post("/automations/filter", {}) if item["name"] == name]
        assert len(found) == 1, name
        return dict(found[0])

    def refused(self, name: str, parameters: dict[str, Any]) -> httpx.Response:
        """Ask for a run of a deployment and return the answer, whatever it is."""
        path = f"/deployments/{self.deployment(name)['id']}/create_flow_run"
        return self._client.post(path, json={"parameters": parameters})

    def runs(self, name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.post(
            "/flow_runs/filter", {"deployments": {"id": {"any_": [self.deployment(name)["id"]]}}}
        )
        return found


@pytest.fixture(scope="module")
def api(empty_prefect_server: str) -> Api:
    """The server with both pools and all deployments, made by the commands that the documentation gives."""
    register(PREFLOW_TRAIN_IMAGE=IMAGE, PREFLOW_COMPUTE_CLASS="preflow-l4")
    return Api(empty_prefect_server)


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
    template["variables"]["properties"]["compute_class"]["default"] = "preflow-l4"
    assert api.get("/work_pools/l4-spot")["base_job_template"] == template


@pytest.mark.long  # registers twice
def test_registering_again_leaves_the_settings_of_a_pool_alone(api: Api) -> None:
    before = api.get("/work_pools/l4-spot")
    register("pools", PREFLOW_TRAIN_IMAGE="registry.example/another:1")
    assert api.get("/work_pools/l4-spot") == before


def config_fields(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every field of every configuration model in a deployment's parameter schema."""
    for model, definition in schema.get("definitions", {}).items():
        if model.endswith("Config"):
            for field, spec in definition["properties"].items():
                yield f"{model}.{field}", spec


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


def test_choices_are_drop_downs(api: Api) -> None:
    schema = api.deployment("dpo-pipeline/local")["parameter_openapi_schema"]
    chosen = {name: spec["enum"] for name, spec in config_fields(schema) if "enum" in spec}
    assert chosen["TrainingConfig.loss_type"][0] == "sigmoid"
    assert chosen["JudgingConfig.pair_policy"] == ["unanimous", "majority", "borda"]
    assert {"TrainingConfig.lr_scheduler_type", "TrainingConfig.report_to"} <= set(chosen)


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
    answer = api.refused(name, given)
    assert answer.status_code in (409, 422), answer.text
    assert said in answer.text
    assert len(api.runs(name)) == before


def test_the_defaults_alone_are_a_valid_start(api: Api) -> None:
    """What the form opens with passes the server's check, for the flows that need no other stage's result."""
    for name in ("dpo-pipeline/local", "dpo-sweep/local", "generate-completions/local"):
        answer = api.refused(name, {})
        assert answer.status_code == 201, answer.text
        run = answer.json()
        api.post(f"/flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLED"}, "force": True})


def test_the_trigger_starts_the_pipeline_on_the_prompts_of_the_event(api: Api) -> None:
    """The server takes a while to see that a trigger was turned on, and runs of other tests may be there too."""
    automation, arrived = api.automation("preflow-new-prompts"), {"prompts": "/new/prompts.jsonl"}
    wanted = {"config": {**arrived, "judging": {"rubric": "neutral"}}}
    api.patch(f"/automations/{automation['id']}", {"enabled": True})
    deadline, started = time.monotonic() + 90, list[Any]()
    try:
        while wanted not in started and time.monotonic() < deadline:
            event = {
                "id": str(uuid4()), "occurred": datetime.now(UTC).isoformat(), "event": "preflow.prompts.arrived",
                "resource": {"prefect.resource.id": "preflow.prompts.scenes"}, "payload": arrived,
            }  # fmt: skip
            api.send([event])
            time.sleep(2)
            started = [run["parameters"] for run in api.runs("dpo-pipeline/local")]
    finally:
        api.patch(f"/automations/{automation['id']}", {"enabled": False})
    assert wanted in started


def test_the_file_names_every_flow() -> None:
    """A flow that is added to the package needs a deployment, or a reason not to have one."""
    flows = {path.stem for path in (ROOT / "flows").glob("*.py")} - {"__init__", "demo"}
    deployed = {
        item["entrypoint"].split(":")[0] for item in yaml.safe_load((ROOT / PREFECT_FILE).read_text())["deployments"]
    }
    assert deployed == {f"flows/{name}.py" for name in flows}


def test_every_deployment_of_the_process_pool_has_a_run_among_the_tests() -> None:
    text = (ROOT / "tests" / "integration" / "test_end_to_end.py").read_text()
    assert not [name for name in NAMES if name.endswith("/local") and f'"{name}"' not in text]
