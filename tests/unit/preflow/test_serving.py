"""What `preflow up` serves: every flow that this machine can run, with defaults that its form takes."""

from pathlib import Path

import yaml
from prefect.utilities.schema_tools.validation import validate

from flows.demo import BETAS
from preflow.serving import FLOWS, LEFT_ALONE, deployments
from tasks.demo.local import demo_config
from tasks.demo.materials import Materials
from tasks.demo.up import Places
from tests.fakes.process import ROOT

NOT_SERVED = {"publish_adapter", "audit_preferences"}


def test_the_defaults_of_every_deployment_pass_the_check_of_its_form(tmp_path: Path) -> None:
    config = demo_config(
        Places(tmp_path), Materials.of(tmp_path), "http://127.0.0.1:8000/v1", "http://127.0.0.1:8001/v1"
    )
    made = deployments("demo", config, BETAS.model_dump(mode="json", exclude_defaults=True))
    assert {item.name for item in made} == {"demo"} | {f"demo-{verb}" for verb, _ in FLOWS.values() if verb}
    for flow, item in zip(FLOWS, made, strict=True):
        schema = flow.parameters.model_dump()
        assert validate(item.parameters, schema, ignore_required=True) == [], item.name
        left = set(schema["required"]) - set(item.parameters)
        assert left <= {"completions", "preferences", "adapter", "evaluation"}, f"{item.name}: {left} must be typed"
        verb = FLOWS[flow][0]
        assert ("restarted" in item.tags) == (verb not in LEFT_ALONE)
        assert item.work_pool_name is None


def test_it_serves_what_is_deployed_elsewhere() -> None:
    file = ROOT / "deployments" / "prefect.yaml"
    deployed = {item["entrypoint"].split(":")[1] for item in yaml.safe_load(file.read_text())["deployments"]}
    assert {flow.fn.__name__ for flow in FLOWS} == deployed - NOT_SERVED
