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


POD = "spec/template/spec"
CONTAINER = f"{POD}/containers/0"
TERMS = f"{POD}/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms"
# Each variable, a value for it, and every field of the Job that it decides.
FIELDS: dict[str, tuple[Any, set[str]]] = {
    "name": ("mine", {"metadata/generateName"}),
    "namespace": ("research", {"metadata/namespace"}),
    "labels": ({"team": "a"}, {"metadata/labels/team", "spec/template/metadata/labels/team"}),
    "annotations": (
        {"note": "b"},
        {"metadata/annotations", "metadata/annotations/note", "spec/template/metadata/annotations/note"},
    ),
    "command": ("sleep 1", {f"{CONTAINER}/args/{number}" for number in range(3)}),
    "env": ({"HF_HOME": "/workspace/hub"}, {f"{CONTAINER}/env/HF_HOME"}),
    "image": ("registry.example/train:1", {f"{CONTAINER}/image"}),
    "image_pull_policy": ("Never", {f"{CONTAINER}/imagePullPolicy"}),
    "gpu_type": ("nvidia-h100-80gb", {f"{TERMS}/0/matchExpressions/1/values/0"}),
    "gpu_count": (2, {f"{CONTAINER}/resources/{kind}/nvidia.com/gpu" for kind in ("requests", "limits")}),
    "avoid_nodes": ("spot", {f"{TERMS}/{term}/matchExpressions/0/values/0" for term in (0, 1)}),
    "compute_class": ("l4", {f"{POD}/nodeSelector", f"{POD}/nodeSelector/cloud.google.com/compute-class"}),
    "gpu_usd_per_hour": ("gpu=2", {f"{CONTAINER}/env/PREFLOW_GPU_USD_PER_HOUR"}),
    "cpu": ("2", {f"{CONTAINER}/resources/{kind}/cpu" for kind in ("requests", "limits")}),
    "memory": ("9Gi", {f"{CONTAINER}/resources/{kind}/memory" for kind in ("requests", "limits")}),
    "shared_memory": ("1Gi", {f"{POD}/volumes/0/emptyDir/sizeLimit"}),
    "ephemeral_storage": (
        "9Gi", {f"{CONTAINER}/resources/{kind}/ephemeral-storage" for kind in ("requests", "limits")}
    ),
    "workspace_volume": (
        {"name": "workspace", "persistentVolumeClaim": {"claimName": "mine"}},
        {f"{POD}/volumes/3/emptyDir", f"{POD}/volumes/3/persistentVolumeClaim/claimName"},
    ),
    "service_account_name": ("trainer", {f"{POD}/serviceAccountName"}),
    "secret_name": ("keys", {f"{CONTAINER}/envFrom/0/secretRef/name"}),
    "backoff_limit": (2, {"spec/backoffLimit"}),
    "deadline_seconds": (90, {"spec/activeDeadlineSeconds"}),
    "grace_seconds": (100, {f"{POD}/terminationGracePeriodSeconds"}),
    "finished_job_ttl": (5, {"spec/ttlSecondsAfterFinished"}),
}  # fmt: skip


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Return every scalar of a Job by its path; an environment variable's path ends in its name."""
    if isinstance(value, list) and path.endswith("/env"):
        value = {item["name"]: item.get("value") for item in value}
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {
        leaf: scalar
        for key, item in value.items()
        for leaf, scalar in leaves(item, f"{path}/{key}".lstrip("/")).items()
    }


@pytest.mark.parametrize("variable", list(VARIABLES))
async def test_a_variable_decides_its_own_fields_and_no_others(variable: str) -> None:
    value, fields = FIELDS[variable]
    jsonschema.validate(value, VARIABLES[variable])
    job = await render(**{variable: value})
    before, after = leaves(await render()), leaves(job)
    check_schema(job)
    changed = {path for path in before.keys() | after.keys() if before.get(path, ...) != after.get(path, ...)}
    assert changed == fields
    for field in fields & after.keys():
        scalars = set(leaves(value).values())
        assert after[field] in scalars or str(value) in str(after[field]) or after[field] in str(value).split()


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
