"""The double of the Kubernetes API behaves as the API does, seen through the client that Prefect's worker uses."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from kubernetes_asyncio import config, watch
from kubernetes_asyncio.client import ApiClient, ApiException, BatchV1Api, CoreV1Api

from tests.fakes.kubernetes.cluster import FakeKubernetes
from tests.fakes.kubernetes.schema import pod_security_problems

NAMESPACE = "preflow"
SPOT = {"type": "DisruptionTarget", "status": "True"}
IGNORE = {"rules": [{"action": "Ignore", "onPodConditions": [SPOT]}]}
FOREVER = "trap 'exit 143' TERM; echo up; while true; do sleep 0.05; done"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="containers are Linux processes")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeKubernetes]:
    timing = {"schedule": 0.02, "node_lost": 0.3}
    settings = {"backoff_seconds": 0.5, "timing": timing, "node_labels": {"gpu": "l4"}}
    with FakeKubernetes(tmp_path_factory.mktemp("cluster"), settings) as cluster:
        yield cluster
    assert "Traceback" not in cluster.errors()


@pytest_asyncio.fixture
async def client(cluster: FakeKubernetes) -> AsyncIterator[ApiClient]:
    client = await config.new_client_from_config(str(cluster.kubeconfig()))
    async with client:
        yield client


@pytest.fixture
def batch(client: ApiClient) -> BatchV1Api:
    return BatchV1Api(client)


@pytest.fixture
def core(client: ApiClient) -> CoreV1Api:
    return CoreV1Api(client)


def a_job(command: str, pod: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    container = {"name": "main", "image": "any", "command": ["bash", "-c", command]}
    template = {"spec": {"restartPolicy": "Never", "containers": [container], **(pod or {})}}
    return {"metadata": {"generateName": "job-", "labels": {"app": "test"}}, "spec": {"template": template, **spec}}


async def start(batch: BatchV1Api, command: str, pod: dict[str, Any] | None = None, **spec: Any) -> str:
    job = await batch.create_namespaced_job(NAMESPACE, a_job(command, pod, **spec))
    return str(job.metadata.name)


async def until(find: Callable[[], Awaitable[Any]], seconds: float = 30) -> Any:
    """Return what `find` finds as soon as it finds something."""
    deadline = time.monotonic() + seconds
    while True:
        found = await find()
        if found or time.monotonic() > deadline:
            assert found, "it did not happen in time"
            return found
        await asyncio.sleep(0.05)


async def ended(batch: BatchV1Api, name: str) -> Any:
    """Wait until a Job is over and return it."""

    async def find() -> Any:
        job = await batch.read_namespaced_job(name, NAMESPACE)
        return job if {c.type for c in job.status.conditions or []} & {"Complete", "Failed"} else None

    return await until(find)


async def pods_of(core: CoreV1Api, job: str) -> list[Any]:
    pods = await core.list_namespaced_pod(NAMESPACE, label_selector=f"job-name={job}")
    return sorted(pods.items, key=lambda pod: int(pod.metadata.resource_version))


async def running(core: CoreV1Api, job: str, but: str = "") -> str:
    """Wait until a pod of a Job, not the one named `but`, has printed that it is up; return its name."""

    async def find() -> str | None:
        for pod in await pods_of(core, job):
            if (
                pod.status.phase == "Running"
                and pod.metadata.name != but
                and "deletion" not in str(pod.metadata.finalizers)
            ):
                log = await core.read_namespaced_pod_log(pod.metadata.name, NAMESPACE)
                return str(pod.metadata.name) if "up" in log else None
        return None

    return str(await until(find))


def reasons(job: Any) -> dict[str, str]:
    return {condition.type: condition.reason for condition in job.status.conditions}


def lives(pid: int) -> bool:
    """Tell whether a process is there, and more than an entry that nobody has asked for yet."""
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


async def refused(awaited: Awaitable[Any]) -> dict[str, Any]:
    """Return the Status of a request that the API must refuse."""
    with pytest.raises(ApiException) as caught:
        await awaited
    status: dict[str, Any] = json.loads(caught.value.body)
    assert status["kind"] == "Status"
    assert status["code"] == caught.value.status
    return status


async def test_a_job_runs_to_its_end(batch: BatchV1Api, core: CoreV1Api) -> None:
    name = await start(batch, "echo hello from $HOSTNAME")
    job = await ended(batch, name)
    assert reasons(job) == {"SuccessCriteriaMet": "CompletionsReached", "Complete": "CompletionsReached"}
    assert (job.status.succeeded, job.status.failed, job.status.active) == (1, None, None)
    assert job.spec.backoff_limit == 6
    (pod,) = await pods_of(core, name)
    assert pod.status.phase == "Succeeded"
    assert await core.read_namespaced_pod_log(pod.metadata.name, NAMESPACE) == f"hello from {pod.metadata.name}\n"


async def test_failures_are_retried_ever_later_until_the_limit(batch: BatchV1Api, core: CoreV1Api) -> None:
    name = await start(batch, "exit 3", backoffLimit=2)
    job = await ended(batch, name)
    assert reasons(job) == {"FailureTarget": "BackoffLimitExceeded", "Failed": "BackoffLimitExceeded"}
    assert job.status.failed == 3
    pods = await pods_of(core, name)
    assert [pod.status.container_statuses[0].state.terminated.exit_code for pod in pods] == [3, 3, 3]
    waits = (job.status.conditions[-1].last_transition_time - job.status.start_time).total_seconds()
    assert waits >= 1, "0.5 s, then 1 s, told in whole seconds"


async def test_a_preemption_is_not_a_failure(cluster: FakeKubernetes, batch: BatchV1Api, core: CoreV1Api) -> None:
    name = await start(batch, FOREVER, backoffLimit=0, podFailurePolicy=IGNORE)
    first = await running(core, name)
    cluster.order("preempt", namespace=NAMESPACE, pod=first)
    second = await running(core, name, but=first)
    old = await core.read_namespaced_pod(first, NAMESPACE)
    assert (old.status.phase, old.status.reason) == ("Failed", "Terminated")
    assert old.status.container_statuses[0].state.terminated.exit_code == 143
    assert "TerminationByKubelet" in {condition.reason for condition in old.status.conditions}
    await core.create_namespaced_pod_eviction(second, NAMESPACE, {"metadata": {"name": second}})
    third = await running(core, name, but=second)
    job = await batch.read_namespaced_job(name, NAMESPACE)
    assert job.status.failed is None
    cluster.order("kill", namespace=NAMESPACE, pod=third)
    job = await ended(batch, name)
    assert reasons(job)["Failed"] == "BackoffLimitExceeded"
    killed = (await core.read_namespaced_pod(third, NAMESPACE)).status.container_statuses[0].state.terminated
    assert (killed.exit_code, killed.reason) == (137, "OOMKilled")


async def test_an_eviction_may_shorten_the_grace_and_still_sends_sigterm(batch: BatchV1Api, core: CoreV1Api) -> None:
    """Without that this pod, which does not hear SIGTERM, would have ten minutes."""
    deaf = FOREVER.replace("exit 143", "echo heard")
    patient = {"terminationGracePeriodSeconds": 600}
    name = await start(batch, deaf, patient, podFailurePolicy=IGNORE, podReplacementPolicy="Failed")
    first = await running(core, name)
    log = await core.read_namespaced_pod_log(first, NAMESPACE, follow=True, _preload_content=False)
    at_once = {"metadata": {"name": first}, "deleteOptions": {"gracePeriodSeconds": 0}}
    await core.create_namespaced_pod_eviction(first, NAMESPACE, at_once)
    assert "heard" in (await log.content.read()).decode()
    await running(core, name, but=first)
    await batch.delete_namespaced_job(name, NAMESPACE, propagation_policy="Background", grace_period_seconds=0)


def test_pod_security_forbids_what_the_standard_forbids() -> None:
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    fine: dict[str, Any] = {
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [{"name": "main", "securityContext": security}],
        "volumes": [{"name": "w", "persistentVolumeClaim": {"claimName": "w"}}],
    }  # fmt: skip
    assert pod_security_problems(fine) == []
    volume = {"name": "w", "hostPath": {"path": "/srv"}}
    assert pod_security_problems({**fine, "volumes": [volume]}) == [
        "restricted volume types (volume 'w' uses 'hostPath')"
    ]
    assert len(pod_security_problems({"containers": [{"name": "main"}]})) == 4


async def test_a_pod_on_a_lost_node_stays_until_the_node_is_given_up(
    cluster: FakeKubernetes, batch: BatchV1Api, core: CoreV1Api
) -> None:
    name = await start(batch, FOREVER, backoffLimit=0, podFailurePolicy=IGNORE, podReplacementPolicy="Failed")
    first = await running(core, name)
    assert cluster.order("processes", namespace=NAMESPACE, pod=first)
    cluster.order("lose-node", namespace=NAMESPACE, pod=first)
    assert cluster.order("processes", namespace=NAMESPACE, pod=first) == []

    async def terminating() -> bool:
        return (await core.read_namespaced_pod(first, NAMESPACE)).metadata.deletion_timestamp is not None

    await until(terminating)
    await core.delete_namespaced_pod(first, NAMESPACE, grace_period_seconds=0)
    await asyncio.sleep(1.5)
    assert [pod.metadata.name for pod in await pods_of(core, name)] == [first], "force does not help"
    cluster.order("give-node-up", namespace=NAMESPACE, pod=first)
    await running(core, name, but=first)
    assert (await refused(core.read_namespaced_pod(first, NAMESPACE)))["code"] == 404
    await batch.delete_namespaced_job(name, NAMESPACE, propagation_policy="Background")


async def test_a_rule_can_end_the_job(batch: BatchV1Api) -> None:
    rule = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [42]}}
    job = await ended(batch, await start(batch, "exit 42", podFailurePolicy={"rules": [rule]}))
    assert reasons(job)["Failed"] == "PodFailurePolicy"
    assert job.status.failed == 1


async def test_grace_then_the_axe_for_the_whole_session(
    cluster: FakeKubernetes, batch: BatchV1Api, core: CoreV1Api
) -> None:
    stubborn = "trap '' TERM; setsid sleep 600 & echo up; while true; do sleep 0.05; done"
    name = await start(batch, stubborn, {"terminationGracePeriodSeconds": 1}, backoffLimit=0)
    pod = await running(core, name)
    processes = cluster.order("processes", namespace=NAMESPACE, pod=pod)
    await core.delete_namespaced_pod(pod, NAMESPACE)
    deleted = await core.read_namespaced_pod(pod, NAMESPACE)
    assert deleted.metadata.deletion_grace_period_seconds == 1
    await ended(batch, name)
    assert processes
    assert not [pid for pid in processes if lives(pid)]
    assert (await refused(core.read_namespaced_pod(pod, NAMESPACE)))["reason"] == "NotFound"


async def test_the_deadline_ends_a_job_and_the_ttl_removes_it(batch: BatchV1Api, core: CoreV1Api) -> None:
    name = await start(batch, FOREVER, activeDeadlineSeconds=1, ttlSecondsAfterFinished=1)
    job = await ended(batch, name)
    assert reasons(job)["Failed"] == "DeadlineExceeded"

    async def gone() -> bool:
        with suppress(ApiException):
            await batch.read_namespaced_job(name, NAMESPACE)
            return False
        return not await pods_of(core, name)

    await until(gone)


async def test_a_job_deleted_in_the_foreground_outlives_its_pods(batch: BatchV1Api, core: CoreV1Api) -> None:
    name = await start(batch, FOREVER, {"terminationGracePeriodSeconds": 2})
    await running(core, name)
    await batch.delete_namespaced_job(name, NAMESPACE, propagation_policy="Foreground")
    assert (await batch.read_namespaced_job(name, NAMESPACE)).metadata.finalizers == ["foregroundDeletion"]

    async def job_gone() -> bool:
        with suppress(ApiException):
            await batch.read_namespaced_job(name, NAMESPACE)
            return False
        return True

    await until(job_gone)
    assert await pods_of(core, name) == []


async def test_a_watch_tells_every_change_and_can_be_resumed(batch: BatchV1Api) -> None:
    listed = await batch.list_namespaced_job(NAMESPACE)
    seen: list[tuple[str, str]] = []
    name = await start(batch, "true")
    async with watch.Watch().stream(
        batch.list_namespaced_job, NAMESPACE, label_selector="app=test", timeout_seconds=30,
        resource_version=listed.metadata.resource_version,
    ) as stream:  # fmt: skip
        async for event in stream:
            if event["object"].metadata.name == name:
                seen.append((event["type"], event["object"].metadata.resource_version))
                if event["object"].status.completion_time:
                    break
    kinds = [kind for kind, _ in seen]
    assert kinds[0] == "ADDED"
    assert set(kinds[1:]) == {"MODIFIED"}
    versions = [int(version) for _, version in seen]
    assert versions == sorted(set(versions))
    again = [
        event["object"].metadata.resource_version
        async for event in watch.Watch().stream(
            batch.list_namespaced_job, NAMESPACE, timeout_seconds=1, resource_version=str(versions[0]),
            field_selector=f"metadata.name={name}",
        )
    ]  # fmt: skip
    assert [int(version) for version in again] == versions[1:]


async def test_a_log_can_be_followed(batch: BatchV1Api, core: CoreV1Api) -> None:
    name = await start(batch, "echo up; sleep 1; echo later")
    pod = await running(core, name)
    response = await core.read_namespaced_pod_log(pod, NAMESPACE, follow=True, _preload_content=False)
    assert (await response.content.read()).decode() == "up\nlater\n"


async def test_nonsense_is_refused(batch: BatchV1Api, core: CoreV1Api) -> None:
    async def status_of(job: dict[str, Any], **options: Any) -> dict[str, Any]:
        return await refused(batch.create_namespaced_job(NAMESPACE, job, **options))

    always = await status_of(a_job("true", {"restartPolicy": "Always"}))
    assert (always["code"], "restartPolicy" in always["message"]) == (422, True)
    nobody = await refused(batch.create_namespaced_job("nowhere", a_job("true")))
    assert (nobody["code"], nobody["message"]) == (404, 'namespaces "nowhere" not found')
    assert (await status_of(a_job("true", backoffLimit="six")))["code"] == 400
    named = a_job("true")
    named["metadata"] = {"name": "the-one"}
    await batch.create_namespaced_job(NAMESPACE, named)
    assert (await status_of(named))["reason"] == "AlreadyExists"


async def test_a_pod_that_fits_no_node_stays_pending(batch: BatchV1Api, core: CoreV1Api) -> None:
    name = await start(batch, "true", {"nodeSelector": {"gpu": "h100"}})

    async def unschedulable() -> bool:
        pods = await pods_of(core, name)
        return any(condition.reason == "Unschedulable" for pod in pods for condition in pod.status.conditions or [])

    await until(unschedulable)
    await batch.delete_namespaced_job(name, NAMESPACE)
