"""What the double of Kubernetes must do as a real cluster does, for the tests of preemption to mean something."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes.kubernetes.cluster import DoubleCluster
from tests.fakes.kubernetes.jobs import pod_security_problems
from tests.fakes.kubernetes.kubelet import isolation
from tests.fakes.kubernetes.platform import Kubernetes, wait_until
from tests.unit.infra.test_job_template import RUN, render

pytestmark = [
    pytest.mark.slow,  # a kubelet's least grace, and the time until a node is seen as lost
    pytest.mark.skipif(not isolation(), reason="this user may not make a process namespace"),
]
DEAF = "trap 'echo heard' TERM; echo up on $PREFLOW_NODE; while true; do sleep 0.05; done"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DoubleCluster]:
    with DoubleCluster.open(tmp_path_factory.mktemp("cluster"), backoff_seconds=0.05) as double:
        yield double


def running(kubernetes: Kubernetes, job: str, but: str = "") -> str:
    """Wait until a pod of a Job, another than `but`, has printed that it is up; return its name."""

    def look() -> str | None:
        for pod in kubernetes.ask("GET", f"pods?labelSelector=job-name={job}")["items"]:
            name = str(pod["metadata"]["name"])
            if name != but and pod["status"]["phase"] == "Running":
                return name if "up" in kubernetes.ask("GET", f"pods/{name}/log") else None
        return None

    return str(wait_until(look, 30, "a pod"))


async def rendered(command: str) -> dict[str, Any]:
    job = await render(backoff_limit=1)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    container |= {"command": ["bash", "-c"], "args": [command]}
    return job


def test_a_pod_is_evicted_lost_and_killed(cluster: DoubleCluster) -> None:
    kubernetes = Kubernetes(cluster)
    job = kubernetes.ask("POST", "jobs", asyncio.run(rendered(DEAF)))["metadata"]["name"]
    first = running(kubernetes, job)
    log = cluster.log(first)
    body = {"metadata": {"name": first}, "deleteOptions": {"gracePeriodSeconds": 0}}
    kubernetes.ask("POST", f"pods/{first}/eviction", body)
    second = running(kubernetes, job, but=first)
    assert "heard" in log.read_text(), "a grace of 0 still sends SIGTERM"
    assert "up on spot-1" in log.read_text(), "by which the trainer knows its price"
    cluster.lose_node(second)
    wait_until(lambda: kubernetes.ask("GET", f"pods/{second}")["metadata"].get("deletionTimestamp"), 30)
    kubernetes.ask("DELETE", f"pods/{second}?gracePeriodSeconds=0")
    time.sleep(0.5)
    (left,) = kubernetes.pods(str(RUN.id))
    assert left["metadata"]["name"] == second, "force does not help, and no other comes"
    cluster.give_node_up(second)
    third = running(kubernetes, job, but=second)
    status = kubernetes.ask("GET", f"jobs/{job}")["status"]
    assert (status["active"], "failed" in status) == (1, False), "a disruption uses up no retry"
    cluster.kill(third)
    wait_until(lambda: kubernetes.ask("GET", f"jobs/{job}")["status"].get("failed") == 1, 30, "a failure")


async def test_pod_security_forbids_what_the_standard_forbids() -> None:
    pod = (await render())["spec"]["template"]["spec"]
    assert pod_security_problems(pod) == []
    volume = {"name": "w", "hostPath": {"path": "/srv"}}
    assert pod_security_problems({**pod, "volumes": [volume]}) == [
        "restricted volume types (volume 'w' uses 'hostPath')"
    ]
    assert len(pod_security_problems({"containers": [{"name": "main"}]})) == 4
