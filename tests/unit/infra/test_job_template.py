"""The Job that the worker makes of the pool's template, rendered by the worker's own classes."""

import json
import re
from copy import deepcopy
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import jsonschema
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import Flow, FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from tests.fakes.kubernetes.jobs import pod_security_problems
from tests.fakes.process import ROOT

TEMPLATE = json.loads((ROOT / "deployments" / "l4-spot.job-template.json").read_text())
VARIABLES = TEMPLATE["variables"]["properties"]
RUN = FlowRun(id=UUID(int=1), flow_id=UUID(int=2), name="brave-fox")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
KUBERNETES = "1.33"


async def render(deployment: str = "l4-spot", **values: Any) -> dict[str, Any]:
    """Return the Job for a run of train-dpo/DEPLOYMENT, as the worker makes it; no server is asked."""
    client = PrefectClient("http://127.0.0.1:9/api")
    configuration = await KubernetesWorkerJobConfiguration.from_template_and_values(TEMPLATE, values, client=client)
    flow = Flow(id=RUN.flow_id, name="train-dpo")
    found = DeploymentResponse(id=UUID(int=3), flow_id=RUN.flow_id, name=deployment, created=NOW, updated=NOW)
    configuration.prepare_for_flow_run(RUN, deployment=found, flow=flow)
    job: dict[str, Any] = configuration.job_manifest
    return job


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = job["spec"]["template"]["spec"]
    return pod


def container_of(job: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod_of(job)["containers"]
    found: dict[str, Any] = container
    return found


def environment_of(job: dict[str, Any]) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container_of(job)["env"] if "value" in item}


def test_every_variable_is_typed_described_and_used() -> None:
    text = json.dumps(TEMPLATE["job_configuration"])
    for name, variable in VARIABLES.items():
        assert variable["type"] in ("string", "integer", "object"), name
        assert variable["title"], name
        assert len(variable["description"]) > 20, name
        assert f'"{{{{ {name} }}}}' in text, f"nothing reads {name}"
        if "default" in variable:
            jsonschema.validate(variable["default"], variable)
    assert set(re.findall(r"\{\{ (\w+) \}\}", text)) == set(VARIABLES)


async def test_a_preemption_is_a_pause() -> None:
    job = await render()
    spec = job["spec"]
    # backoffLimit above 0 is what makes Prefect leave the run Running on SIGTERM, for the next pod.
    assert environment_of(job)["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "relinquish"
    assert spec["backoffLimit"] == 6
    first, *_ = spec["podFailurePolicy"]["rules"]
    assert first == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert spec["podReplacementPolicy"] == "Failed"
    assert (spec["parallelism"], spec["completions"]) == (1, 1)
    assert pod_of(job)["restartPolicy"] == "Never"
    assert pod_of(job)["terminationGracePeriodSeconds"] == 25
    assert container_of(job)["args"] == ["prefect", "flow-run", "execute"]
    assert pod_of(job)["automountServiceAccountToken"] is False
    assert pod_security_problems(pod_of(job)) == []


# What GKE writes on its nodes; other clusters write neither.
L4, A100 = ({"cloud.google.com/gke-accelerator": name} for name in ("nvidia-l4", "nvidia-tesla-a100"))
SPOT, STANDARD = ({"cloud.google.com/gke-provisioning": name} for name in ("spot", "standard"))


def may_run_on(pod: dict[str, Any], node: dict[str, str]) -> bool:
    """Tell whether the scheduler's required node affinity lets a pod onto a node with these labels."""
    matches = {
        "In": lambda rule: node.get(rule["key"]) in rule["values"],
        "NotIn": lambda rule: node.get(rule["key"]) not in rule["values"],
        "DoesNotExist": lambda rule: rule["key"] not in node,
    }
    required = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    return any(
        all(matches[rule["operator"]](rule) for rule in term["matchExpressions"])
        for term in required["nodeSelectorTerms"]
    )


@pytest.mark.parametrize(
    ("avoid", "spot", "on_demand"), [("standard", True, False), ("spot", False, True), ("none", True, True)]
)
async def test_spot_on_demand_or_either(avoid: str, spot: bool, on_demand: bool) -> None:
    """Outside GKE, where no node says what it is, the request for a GPU alone decides."""
    pod = pod_of(await render(avoid_nodes=avoid))
    assert may_run_on(pod, L4 | SPOT) is spot
    assert may_run_on(pod, L4 | STANDARD) is on_demand
    assert not may_run_on(pod, A100 | SPOT)
    assert not may_run_on(pod, A100 | STANDARD)
    assert may_run_on(pod, {"kubernetes.io/os": "linux"})


async def test_secrets_come_by_reference_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in the worker's own environment, which is not the Job's, must not get into it."""
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "VLLM_API_KEY"):
        monkeypatch.setenv(name, "planted-secret-value")
    job = await render()
    assert container_of(job)["envFrom"] == [{"secretRef": {"name": "preflow-train", "optional": True}}]
    assert "planted-secret-value" not in json.dumps(job)


# Every variable, and a value for it that is not the default.
GIVEN: dict[str, Any] = {
    "name": "mine", "namespace": "research", "labels": {"team": "a"}, "annotations": {"note": "b"},
    "command": "sleep 1", "env": {"HF_HOME": "/workspace/hub"}, "image": "registry.example/train:1",
    "image_pull_policy": "Never", "gpu_type": "nvidia-h100-80gb", "gpu_count": 2, "avoid_nodes": "spot",
    "compute_class": "l4", "gpu_usd_per_hour": "gpu=2", "cpu": "2", "memory": "9Gi", "shared_memory": "1Gi",
    "ephemeral_storage": "19Gi", "workspace_volume": {"name": "workspace", "persistentVolumeClaim": {"claimName": "w"}},
    "service_account_name": "trainer", "secret_name": "keys", "backoff_limit": 2, "deadline_seconds": 90,
    "grace_seconds": 100, "finished_job_ttl": 5,
}  # fmt: skip


async def test_every_variable_reaches_the_job_and_kubernetes_takes_it() -> None:
    assert GIVEN.keys() == VARIABLES.keys()
    jsonschema.validate(GIVEN, {"properties": VARIABLES})
    plain = await render()
    check_schema(plain)
    check_schema(await render(**GIVEN))
    for name, value in GIVEN.items():
        job = await render(**{name: value})
        assert job != plain, name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpu_type", "l4"), ("gpu_count", -1), ("avoid_nodes", "yes"), ("cpu", "six"), ("memory", "24GB"),
        ("gpu_usd_per_hour", "l4-spot=1.0.0"), ("backoff_limit", 0), ("grace_seconds", 600), ("deadline_seconds", 0),
        ("image_pull_policy", "Sometimes"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_the_schema(name: str, value: object) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value, VARIABLES[name])


def check_schema(job: dict[str, Any]) -> None:
    """Check a Job against Kubernetes' own schema, unknown fields refused.

    Prefect's worker wants `parallelism` and `completions` in the pod, where Kubernetes ignores them with a warning.
    """
    import kubernetes_validate

    job = deepcopy(job)
    assert (pod_of(job).pop("parallelism"), pod_of(job).pop("completions")) == (1, 1)
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
