"""The Job that the worker makes of the pool's template, rendered by the worker's own classes."""

import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any
from uuid import UUID

import jsonschema
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from tests.fakes.process import ROOT

TEMPLATE = json.loads((ROOT / "deployments" / "l4-spot.job-template.json").read_text())
VARIABLES = TEMPLATE["variables"]["properties"]
RUN = FlowRun(id=UUID(int=1), flow_id=UUID(int=2), name="brave-fox")
KUBERNETES = "1.33"


async def render(template: dict[str, Any] = TEMPLATE, **values: Any) -> dict[str, Any]:
    """Return the Job for a flow run; the variables hold no reference, so no server is asked."""
    client = PrefectClient("http://127.0.0.1:9/api")
    configuration = await KubernetesWorkerJobConfiguration.from_template_and_values(template, values, client=client)
    configuration.prepare_for_flow_run(RUN)
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
    return {item["name"]: item["value"] for item in container_of(job)["env"]}


def test_every_variable_is_typed_described_and_used() -> None:
    text = json.dumps(TEMPLATE["job_configuration"])
    for name, variable in VARIABLES.items():
        assert variable["type"] in ("string", "integer", "object"), name
        assert variable["title"], name
        assert len(variable["description"]) > 20, name
        assert f'"{{{{ {name} }}}}' in text, f"nothing reads {name}"
        if "default" in variable:
            jsonschema.validate(variable["default"], variable)


def test_every_placeholder_is_a_variable() -> None:
    def placeholders(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                yield from placeholders(item)
        elif isinstance(value, str) and "{{" in value:
            yield value.split("{{")[1].split("}}")[0].strip()

    assert set(placeholders(TEMPLATE["job_configuration"])) == set(VARIABLES)


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


async def test_a_job_ends_and_is_cleared_away() -> None:
    spec = (await render())["spec"]
    assert spec["activeDeadlineSeconds"] == 86_400
    assert spec["ttlSecondsAfterFinished"] == 600


async def test_it_asks_for_a_spot_node_with_the_accelerator() -> None:
    pod = pod_of(await render())
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-accelerator": "nvidia-l4",
        "cloud.google.com/gke-spot": "true",
    }
    assert {item["key"] for item in pod["tolerations"]} == {"nvidia.com/gpu", "cloud.google.com/gke-spot"}
    resources = container_of(await render())["resources"]
    assert resources["limits"] == resources["requests"]
    assert resources["limits"] == {"cpu": "6", "memory": "24Gi", "ephemeral-storage": "60Gi", "nvidia.com/gpu": 1}


async def test_without_the_defaults_any_node_will_do() -> None:
    """On demand, or a cluster that is not GKE: the pool's settings without the default of `spot` or `gpu_type`."""
    template = deepcopy(TEMPLATE)
    del template["variables"]["properties"]["spot"]["default"]
    assert pod_of(await render(template))["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    del template["variables"]["properties"]["gpu_type"]["default"]
    assert pod_of(await render(template))["nodeSelector"] == {}


async def test_the_pod_may_do_nothing_but_train() -> None:
    job = await render()
    pod, container = pod_of(job), container_of(job)
    assert pod["securityContext"] == {
        "runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "privileged": False,
        "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert pod["automountServiceAccountToken"] is False
    assert pod["serviceAccountName"] == "preflow-train"


async def test_what_is_written_has_a_volume() -> None:
    job = await render()
    volumes = {volume["name"]: volume for volume in pod_of(job)["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container_of(job)["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}
    assert {"/tmp", "/home/preflow", "/workspace"} < set(mounts)
    assert len(volumes) == len(mounts)


async def test_secrets_come_by_reference_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in the worker's own environment, which is not the Job's, must not get into it."""
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "VLLM_API_KEY"):
        monkeypatch.setenv(name, "planted-secret-value")
    job = await render()
    assert container_of(job)["envFrom"] == [{"secretRef": {"name": "preflow-train", "optional": True}}]
    assert "planted-secret-value" not in json.dumps(job)


async def test_changed_variables_arrive() -> None:
    claim = {"name": "workspace", "persistentVolumeClaim": {"claimName": "preflow-workspace"}}
    job = await render(
        namespace="research", image="registry.example/train:1", image_pull_policy="Never", gpu_type="nvidia-tesla-a100",
        gpu_count=2, cpu="500m", memory="900Mi", shared_memory="64Mi", ephemeral_storage="1Gi", workspace_volume=claim,
        service_account_name="trainer", secret_name="keys", backoff_limit=1, deadline_seconds=90, grace_seconds=100,
        finished_job_ttl=5, env={"HF_HOME": "/workspace/hub"}, labels={"team": "a"}, annotations={"note": "b"},
    )  # fmt: skip
    pod, container, spec = pod_of(job), container_of(job), job["spec"]
    assert job["metadata"]["namespace"] == "research"
    assert (container["image"], container["imagePullPolicy"]) == ("registry.example/train:1", "Never")
    assert pod["nodeSelector"]["cloud.google.com/gke-accelerator"] == "nvidia-tesla-a100"
    assert container["resources"]["limits"] == {
        "cpu": "500m", "memory": "900Mi", "ephemeral-storage": "1Gi", "nvidia.com/gpu": 2,
    }  # fmt: skip
    assert claim in pod["volumes"]
    assert (pod["serviceAccountName"], container["envFrom"][0]["secretRef"]["name"]) == ("trainer", "keys")
    assert (spec["backoffLimit"], spec["activeDeadlineSeconds"], spec["ttlSecondsAfterFinished"]) == (1, 90, 5)
    assert pod["terminationGracePeriodSeconds"] == 100
    assert environment_of(job)["HF_HOME"] == "/workspace/hub"
    assert job["metadata"]["labels"]["team"] == "a"
    assert spec["template"]["metadata"]["annotations"]["note"] == "b"
    check_schema(job)


async def test_the_command_is_the_workers() -> None:
    assert container_of(await render())["args"] == ["prefect", "flow-run", "execute"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpu_type", "l4"), ("gpu_count", -1), ("spot", "yes"), ("cpu", "six"), ("memory", "24GB"),
        ("backoff_limit", 0), ("grace_seconds", 600), ("deadline_seconds", 0), ("image_pull_policy", "Sometimes"),
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


async def test_kubernetes_knows_every_field() -> None:
    job = await render()
    check_schema(job)
    pod_of(job)["tolerations"][0]["operater"] = "Exists"
    with pytest.raises(Exception, match="operater"):
        check_schema(job)
