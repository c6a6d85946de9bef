"""What a quiet training on Kubernetes waits for, as the API's objects say it."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.schemas.objects import WorkPool

from tasks.train import pods
from tasks.train.pods import PodWatch, Sight

NOW = datetime(2026, 1, 1, 12, 10, tzinfo=UTC)
JOB = {"metadata": {"name": "brave-fox-abc", "uid": "job"}}


def pod(name: str = "p", phase: str = "Running", node: str | None = "n1", **status: Any) -> dict[str, Any]:
    spec = {"nodeName": node} if node else {}
    return {"metadata": {"name": name, "uid": name}, "spec": spec, "status": {"phase": phase, **status}}


def event(about: str, reason: str, message: str, minute: int = 1, kind: str = "Warning") -> dict[str, Any]:
    facts = {"type": kind, "reason": reason, "message": message, "lastTimestamp": f"2026-01-01T12:{minute:02}:00Z"}
    return {"involvedObject": {"uid": about}, **facts}


def explain(*found: dict[str, Any], events: tuple[dict[str, Any], ...] = (), jobs: Any = (JOB,)) -> str:
    return " ".join(Sight(jobs, found, events).explain(NOW))


def unschedulable(message: str) -> dict[str, Any]:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return pod(phase="Pending", node=None, conditions=[condition])


def test_a_pod_of_a_lost_node_gets_its_remedy() -> None:
    lost = pod(node="gke-spot-7")
    lost["metadata"]["deletionTimestamp"] = "2026-01-01T12:05:00Z"
    said = explain(lost)
    assert "kubectl delete node gke-spot-7" in said
    assert "kubectl taint nodes gke-spot-7 node.kubernetes.io/out-of-service=nodeshutdown:NoExecute" in said
    lost["metadata"]["deletionTimestamp"] = "2026-01-01T12:09:50Z"
    assert "delete node" not in explain(lost), "it is within its grace"


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("Node scale up in zones europe-west4-a failed: GCE_STOCKOUT", "No such machine is free"),
        ("in zones x failed: ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS", "No such machine is free"),
        ("GCE quota exceeded: GPUS_ALL_REGIONS", "quota is used up"),
    ],
)
def test_what_the_autoscaler_says_is_shown_with_what_to_do(message: str, remedy: str) -> None:
    events = event("p", "FailedScaleUp", message, 5), event("p", "FailedScaleUp", "an old one", 4)
    said = explain(unschedulable("1 Insufficient nvidia.com/gpu."), events=events)
    assert all(part in said for part in (message, remedy, "Insufficient nvidia.com/gpu"))
    assert "an old one" not in said, "the newest of each reason"


@pytest.mark.parametrize(
    ("waiting", "said"),
    [
        (unschedulable("0/3 nodes are available: 3 node(s) had untolerated taint {a: b}."), ("{a: b}", "tolerate")),
        (unschedulable("3 node(s) didn't match Pod's node affinity/selector."), ("didn't match", "gpu_type")),
        (unschedulable("3 Insufficient nvidia.com/gpu."), ("3 Insufficient", "All GPUs")),
        (pod(phase="Pending", containerStatuses=[{"name": "prefect-job", "state": {"waiting": {
            "reason": "ImagePullBackOff", "message": "no train:1"}}}]), ("no train:1",)),
        (pod(), ("kubectl logs p",)),
    ],
)  # fmt: skip
def test_what_a_pod_waits_for_is_shown_with_what_to_do(waiting: dict[str, Any], said: tuple[str, ...]) -> None:
    assert all(part in explain(waiting) for part in said)


def test_lack_of_memory_is_told_from_a_preemption() -> None:
    def ended(reason: str, code: int, *conditions: dict[str, str]) -> dict[str, Any]:
        container = {"name": "prefect-job", "state": {"terminated": {"reason": reason, "exitCode": code}}}
        return pod(phase="Failed", containerStatuses=[container], conditions=list(conditions))

    preempted = {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}
    ends = ended("OOMKilled", 137), ended("Error", 143, preempted), ended("Error", 1)
    memory, spot, own = (explain(end) for end in ends)
    assert "OOMKilled" in memory
    assert "preempted (TerminationByKubelet)" in spot
    assert "OOMKilled" not in spot + own
    assert "exit code 1" in own
    assert all("600 s at most" in said for said in (memory, spot, own)), "the wait for the next pod is explained"


def test_pods_that_may_not_be_made_and_jobs_that_are_not_there() -> None:
    forbidden = event("job", "FailedCreate", 'violates PodSecurity "restricted:latest": hostPath')
    said = explain(events=(forbidden, event("other", "FailedCreate", "of another Job")))
    assert "violates PodSecurity" in said
    assert "of another Job" not in said
    said = explain(events=(event("job", "FailedCreate", "forbidden: exceeded quota: gpus, used: 1, limited: 1"),))
    assert "A ResourceQuota of the namespace is used up" in said
    assert "Google" not in said
    assert "no Job of this run" in explain(jobs=())


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(pods.logger, "warning", lambda text, *values: lines.append(text % values))
    monkeypatch.setattr(pods, "LOOK_SECONDS", 0.0)
    return lines


async def test_it_is_said_after_five_minutes_and_once(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async def look(run: UUID, namespace: str) -> Sight:
        assert (run, namespace) == (UUID(int=1), "research")
        return Sight((JOB,), (unschedulable("0/1 nodes are available: 1 Insufficient nvidia.com/gpu."),), ())

    monkeypatch.setattr(pods, "look", look)
    watch = PodWatch(UUID(int=1), "research")
    await watch.say(299)
    assert said == []
    for seconds in (301, 400):
        await watch.say(seconds)
    (line,) = said
    assert line.startswith("nothing was heard of the training for 5 minutes. Pod p waits.")


async def test_without_a_way_to_the_cluster_the_command_is_given(
    said: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setattr("kubernetes_asyncio.config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    await PodWatch(UUID(int=7), "preflow").say(301)
    (line,) = said
    assert f"kubectl -n preflow describe pods -l prefect.io/flow-run-id={UUID(int=7)}" in line


def test_the_namespace_is_the_runs_or_the_pools() -> None:
    template = {"variables": {"properties": {"namespace": {"default": "research"}}}, "job_configuration": {}}
    pool = WorkPool(name="l4-spot", type="kubernetes", base_job_template=template)
    run = UUID(int=1)
    assert PodWatch.of(run, pool, {}) == PodWatch(run, "research")
    assert PodWatch.of(run, pool, {"namespace": "mine"}) == PodWatch(run, "mine")
    assert PodWatch.of(run, WorkPool(name="local", type="process"), {}) is None
    assert PodWatch.of(run, None, {}) is None
