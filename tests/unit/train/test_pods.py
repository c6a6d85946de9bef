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
RUN = UUID(int=1)


def pod(phase: str = "Running", node: str | None = "n1", leaving: str | None = None, **status: Any) -> dict[str, Any]:
    spec = {"nodeName": node} if node else {}
    metadata = {"name": "p", "uid": "p"} | ({"deletionTimestamp": leaving} if leaving else {})
    return {"metadata": metadata, "spec": spec, "status": {"phase": phase, **status}}


def event(about: str, reason: str, message: str, minute: int = 1) -> dict[str, Any]:
    facts = {"type": "Warning", "reason": reason, "message": message, "lastTimestamp": f"2026-01-01T12:{minute:02}:00Z"}
    return {"involvedObject": {"uid": about}, **facts}


def explain(*found: dict[str, Any], events: tuple[dict[str, Any], ...] = (), jobs: Any = (JOB,)) -> str:
    return " ".join(Sight(jobs, found, events).explain(NOW))


def unschedulable(message: str) -> dict[str, Any]:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return pod(phase="Pending", node=None, conditions=[condition])


def ended(reason: str, code: int, *conditions: dict[str, str]) -> dict[str, Any]:
    container = {"name": "prefect-job", "state": {"terminated": {"reason": reason, "exitCode": code}}}
    return pod(phase="Failed", containerStatuses=[container], conditions=list(conditions))


PULL = {"name": "prefect-job", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no train:1"}}}
PREEMPTED = {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (unschedulable("0/3 nodes are available: 3 node(s) had untolerated taint {a: b}."), ("{a: b}", "tolerate")),
        (unschedulable("3 node(s) didn't match Pod's node affinity/selector."), ("didn't match", "gpu_type")),
        (unschedulable("3 Insufficient nvidia.com/gpu."), ("3 Insufficient", "All GPUs")),
        (pod(phase="Pending", containerStatuses=[PULL]), ("no train:1",)),
        (pod(), ("kubectl logs p",)),
        (
            pod(node="n7", leaving="2026-01-01T12:05:00Z"),
            ("kubectl delete node n7", "kubectl taint nodes n7 node.kube"),
        ),
        (ended("OOMKilled", 137), ("OOMKilled", "600 s at most")),
        (ended("Error", 143, PREEMPTED), ("preempted (TerminationByKubelet)", "600 s at most")),
        (ended("Error", 1), ("exit code 1", "600 s at most")),
        (pod(phase="Failed", reason="Evicted", message="no disk"), ("evicted", "it started (Evicted: no disk)")),
        (pod(phase="Failed", containerStatuses=[PULL]), ("evicted", "before it started (no reason is given)")),
    ],
)
def test_what_a_pod_waits_for_or_died_of_is_shown_with_what_to_do(found: dict[str, Any], said: tuple[str, ...]) -> None:
    text = explain(found)
    assert all(part in text for part in said)
    assert ("OOMKilled" in text) == ("OOMKilled" in said)
    assert ("delete node" in text) == ("n7" in str(said))


@pytest.mark.parametrize(
    ("about", "message", "remedy"),
    [
        ("p", "Node scale up in zones europe-west4-a failed: GCE_STOCKOUT", "No such machine is free"),
        ("p", "in zones x failed: ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS", "No such machine is free"),
        ("p", "GCE quota exceeded: GPUS_ALL_REGIONS", "ask Google for more"),
        ("job", "forbidden: exceeded quota: gpus, used: 1, limited: 1", "A ResourceQuota of the namespace is used up"),
        ("job", 'violates PodSecurity "restricted:latest": hostPath', "The namespace forbids such a pod"),
    ],
)
def test_what_an_event_says_is_shown_with_what_to_do(about: str, message: str, remedy: str) -> None:
    events = (
        event(about, "Failed", message, 5),
        event(about, "Failed", "an old one"),
        event("other", "Failed", "not it"),
    )
    said = explain(*([unschedulable("1 Insufficient nvidia.com/gpu.")] if about == "p" else []), events=events)
    assert all(part in said for part in (message, remedy))
    assert ("Insufficient nvidia.com/gpu" in said) == (about == "p")
    assert not [other for other in ("an old one", "not it") if other in said], "the newest of each reason, and its own"
    assert ("Google" in said) == (remedy == "ask Google for more")


def test_a_pod_within_its_grace_is_not_called_lost_and_a_job_may_be_gone() -> None:
    assert "delete node" not in explain(pod(leaving="2026-01-01T12:09:50Z"))
    assert "no Job of this run" in explain(jobs=())


async def test_it_is_said_after_five_minutes_and_once_or_how_to_ask(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(pods.logger, "warning", lambda text, *values: lines.append(text % values))
    monkeypatch.setattr(pods, "LOOK_SECONDS", 0.0)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setattr("kubernetes_asyncio.config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    watch = PodWatch(RUN, "research")
    await watch.say(299)
    assert lines == []
    await watch.say(301)
    assert f"kubectl -n research describe pods -l prefect.io/flow-run-id={RUN}" in lines.pop()

    async def look(run: UUID, namespace: str) -> Sight:
        assert (run, namespace) == (RUN, "research")
        return Sight((JOB,), (unschedulable("0/1 nodes are available: 1 Insufficient nvidia.com/gpu."),), ())

    monkeypatch.setattr(pods, "look", look)
    for seconds in (302, 400):
        await watch.say(seconds)
    (line,) = lines
    assert line.startswith("nothing was heard of the training for 5 minutes. Pod p waits.")


def test_the_namespace_is_the_runs_or_the_pools() -> None:
    template = {"variables": {"properties": {"namespace": {"default": "research"}}}, "job_configuration": {}}
    pool = WorkPool(name="l4-spot", type="kubernetes", base_job_template=template)
    assert PodWatch.of(RUN, pool, {}) == PodWatch(RUN, "research")
    assert PodWatch.of(RUN, pool, {"namespace": "mine"}) == PodWatch(RUN, "mine")
    assert PodWatch.of(RUN, WorkPool(name="local", type="process"), {}) is None
