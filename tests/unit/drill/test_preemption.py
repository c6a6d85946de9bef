"""Interrupting a training's pod, against a server that speaks as much Kubernetes as that takes."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pytest
import pytest_asyncio
import yaml
from aiohttp import web
from kubernetes_asyncio import config as kubernetes_config
from prefect.client.schemas.objects import FlowRun

from tasks.drill import preemption
from tasks.drill.preemption import Kind, PodTarget
from tasks.errors import PreflowError
from tasks.train.work_pool import TrainingOrder

RUN = UUID(int=7)
POLLS_UNTIL_GONE = 3
PODS = "/api/v1/namespaces/preflow/pods"


def pod(name: str, phase: str = "Running", run: UUID = RUN, leaving: bool = False) -> dict[str, Any]:
    metadata = {"name": name, "uid": f"uid-{name}", "labels": {"prefect.io/flow-run-id": str(run)}}
    if leaving:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": {"phase": phase}}


class Cluster:
    """Pods, what was done to them, and an API that takes a pod away after it was listed a few times."""

    def __init__(self) -> None:
        self.pods, self.listed, self.forbidden, self.silent = list[dict[str, Any]](), 0, False, "nothing"
        self.done, self.reviewed = list[tuple[str, Any]](), list[tuple[str, str]]()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        name, _, action = request.path.removeprefix(PODS).strip("/").partition("/")
        if self.silent == (action or "list"):
            await asyncio.sleep(60)
        if request.path.endswith("selfsubjectaccessreviews"):
            asked = (await request.json())["spec"]["resourceAttributes"]
            self.reviewed.append((asked["verb"], asked["subresource"]))
            allowed = (asked["namespace"], asked["resource"]) == ("preflow", "pods") and not (
                self.forbidden and asked["subresource"]
            )
            return web.json_response({"spec": {}, "status": {"allowed": allowed}}, status=201)
        if action and self.forbidden:
            return web.json_response({"kind": "Status", "code": 403}, status=403)
        if action == "eviction":
            self.done.append((name, (await request.json())["deleteOptions"]["gracePeriodSeconds"]))
            return web.json_response({"kind": "Status", "status": "Success"}, status=201)
        if action == "exec":
            self.done.append((name, request.query.getall("command")))
            stream = web.WebSocketResponse(protocols=["v4.channel.k8s.io"])
            await stream.prepare(request)
            await stream.close()
            return stream
        self.listed += 1
        key, _, value = request.query["labelSelector"].partition("=")
        items = [item for item in self.pods if item["metadata"]["labels"].get(key) == value]
        if self.listed > POLLS_UNTIL_GONE:
            items = [item for item in items if item["metadata"]["name"] != "wanted"]
        return web.json_response({"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": items})


def use_kubeconfig(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kubernetes_config, kubernetes_config.kube_config):
        monkeypatch.setattr(module, "KUBE_CONFIG_DEFAULT_LOCATION", str(file))


@pytest_asyncio.fixture
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    """A cluster that the kubeconfig names."""
    monkeypatch.setattr(preemption, "POD_SECONDS", 0.01)
    cluster = Cluster()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", cluster.answer)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    kubeconfig = {
        "apiVersion": "v1", "kind": "Config", "current-context": "here", "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "here", "context": {"cluster": "fake", "user": "me"}}],
        "clusters": [{"name": "fake", "cluster": {"server": f"http://127.0.0.1:{runner.addresses[0][1]}"}}],
    }  # fmt: skip
    file = tmp_path / "kubeconfig"
    file.write_text(yaml.safe_dump(kubeconfig))
    use_kubeconfig(file, monkeypatch)
    yield cluster
    await runner.cleanup()


class Order:
    """An order whose training has run twice; only the newest run has a pod to take away."""

    async def runs(self) -> list[FlowRun]:
        return [FlowRun(id=UUID(int=6), flow_id=UUID(int=1)), FlowRun(id=RUN, flow_id=UUID(int=1))]


ORDER = cast(TrainingOrder, Order())
TARGET = PodTarget(15, "preflow")


@pytest.mark.parametrize(("kind", "done"), [(Kind.NOTICE, 15), (Kind.AT_ONCE, ["sh", "-c", "kill -KILL -1"])])
async def test_the_running_pod_of_the_newest_run_is_evicted_or_killed(cluster: Cluster, kind: Kind, done: Any) -> None:
    others = [pod("failed", phase="Failed"), pod("leaving", leaving=True), pod("other", run=UUID(int=6))]
    cluster.pods = [*others, pod("wanted")]
    await TARGET.preempt(ORDER, kind)
    assert cluster.done == [("wanted", done)]
    assert cluster.listed == POLLS_UNTIL_GONE + 1, "it is waited for until the pod is gone"
    with pytest.raises(PreflowError, match=f"flow-run-id={RUN} in namespace preflow"):
        await TARGET.preempt(ORDER, kind)


@pytest.mark.parametrize(
    ("kind", "silent", "said"),
    [(Kind.NOTICE, "", "403 "), (Kind.AT_ONCE, "", "403 "), (Kind.NOTICE, "list", "it does not answer"),
     (Kind.NOTICE, "eviction", "it does not answer"), (Kind.AT_ONCE, "exec", "it does not answer")],
)  # fmt: skip
async def test_a_cluster_that_refuses_or_is_silent_ends_the_drill_with_a_message(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, kind: Kind, silent: str, said: str
) -> None:
    monkeypatch.setattr(preemption, "ANSWER_SECONDS", 0.5 if silent else 20.0)
    cluster.pods, cluster.silent, cluster.forbidden = [pod("wanted")], silent or "nothing", not silent
    with pytest.raises(PreflowError, match=rf"namespace preflow: {said}.*kubectl auth can-i"):
        await asyncio.wait_for(TARGET.preempt(ORDER, kind), 10)


async def test_a_right_that_is_missing_is_named_before_anything_is_trained(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await TARGET.check()
    assert cluster.reviewed == list(preemption.RIGHTS)
    cluster.forbidden = True
    with pytest.raises(PreflowError, match=r"may not create pods eviction in namespace preflow.*an administrator's"):
        await TARGET.check()
    monkeypatch.setattr(preemption, "ANSWER_SECONDS", 0.0)
    with pytest.raises(PreflowError, match=r"namespace preflow: it does not answer\. See"):
        await TARGET.check()


@pytest.mark.parametrize("kubeconfig", [None, "", "a: [", "5", "contexts: 5", "clusters: [a]", "current-context: here"])
async def test_without_a_cluster_it_is_said_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kubeconfig: str | None
) -> None:
    if kubeconfig is not None:
        (tmp_path / "kubeconfig").write_text(kubeconfig)
    use_kubeconfig(tmp_path / "kubeconfig", monkeypatch)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(PreflowError, match="set KUBECONFIG"):
        await TARGET.check()
