"""Eviction of a training's pod, against an HTTP server that speaks as much Kubernetes as that takes."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, urlparse
from uuid import UUID

import pytest
import yaml
from kubernetes_asyncio import config as kubernetes_config
from prefect.client.schemas.objects import FlowRun

from tasks.drill import preemption
from tasks.drill.preemption import Kind, PodTarget
from tasks.errors import PreflowError
from tasks.train.work_pool import TrainingOrder

RUN = UUID(int=7)
POLLS_UNTIL_GONE = 2


def pod(name: str, phase: str = "Running", run: UUID = RUN, leaving: bool = False) -> dict[str, Any]:
    metadata = {"name": name, "uid": f"uid-{name}", "labels": {"prefect.io/flow-run-id": str(run)}}
    if leaving:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": {"phase": phase}}


class Cluster:
    """Pods, the evictions asked for, and an API that takes an evicted pod away after a few questions."""

    def __init__(self) -> None:
        self.pods: dict[str, dict[str, Any]] = {}
        self.evictions: list[tuple[str, int]] = []
        self.asked = 0
        cluster = self

        class Api(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = urlparse(self.path)
                name = path.path.partition("/namespaces/preflow/pods")[2].strip("/")
                if name:
                    self._answer(*cluster.read(name))
                    return
                key, _, value = parse_qs(path.query)["labelSelector"][0].partition("=")
                items = [item for item in cluster.pods.values() if item["metadata"]["labels"].get(key) == value]
                self._answer(200, {"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": items})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path.endswith(f"/namespaces/preflow/pods/{body['metadata']['name']}/eviction"), self.path
                cluster.evictions.append((body["metadata"]["name"], body["deleteOptions"]["gracePeriodSeconds"]))
                self._answer(201, {"apiVersion": "v1", "kind": "Status", "status": "Success"})

            def _answer(self, status: int, body: dict[str, Any]) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def read(self, name: str) -> tuple[int, dict[str, Any]]:
        self.asked += 1
        if self.asked > POLLS_UNTIL_GONE:
            return 404, {"apiVersion": "v1", "kind": "Status", "status": "Failure", "code": 404}
        return 200, self.pods[name]

    def add(self, *pods: dict[str, Any]) -> None:
        self.pods |= {item["metadata"]["name"]: item for item in pods}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.server.shutdown()


@pytest.fixture
async def target(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PodTarget:
    """The target as the drill makes it, through a kubeconfig."""
    monkeypatch.setattr(preemption, "POD_SECONDS", 0.01)
    kubeconfig = {
        "apiVersion": "v1", "kind": "Config", "current-context": "here", "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "here", "context": {"cluster": "fake", "user": "me"}}],
        "clusters": [{"name": "fake", "cluster": {"server": f"http://127.0.0.1:{cluster.server.server_port}"}}],
    }  # fmt: skip
    file = tmp_path / "kubeconfig"
    file.write_text(yaml.safe_dump(kubeconfig))
    await kubernetes_config.load_config(config_file=str(file))
    return PodTarget("preflow", 15)


class Order:
    """An order whose training has run twice; only the newest run has a pod to take away."""

    async def runs(self) -> list[FlowRun]:
        return [FlowRun(id=UUID(int=6), flow_id=UUID(int=1)), FlowRun(id=RUN, flow_id=UUID(int=1))]


ORDER = cast(TrainingOrder, Order())


@pytest.mark.parametrize(("kind", "grace"), [(Kind.NOTICE, 15), (Kind.AT_ONCE, 0)])
async def test_the_running_pod_of_the_newest_run_is_evicted(
    cluster: Cluster, target: PodTarget, kind: Kind, grace: int
) -> None:
    cluster.add(
        pod("failed", phase="Failed"), pod("leaving", leaving=True), pod("other", run=UUID(int=6)), pod("wanted")
    )
    await target.preempt(ORDER, kind)
    assert cluster.evictions == [("wanted", grace)]
    assert cluster.asked == POLLS_UNTIL_GONE + 1, "it is waited for until the pod is gone"


async def test_without_a_running_pod_it_is_said_where_one_was_looked_for(cluster: Cluster, target: PodTarget) -> None:
    cluster.add(pod("failed", phase="Failed"))
    with pytest.raises(PreflowError, match=f"flow-run-id={RUN} in namespace preflow"):
        await target.preempt(ORDER, Kind.NOTICE)
