"""Quotas of the namespace, read by the flow worker's account and role through the API, before anything is spent."""

import asyncio
import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.schemas.objects import WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.errors import PreflowError
from tasks.train import quota
from tasks.train.pods import look
from tasks.train.quota import amount, check_quotas
from tests.fakes.kubernetes.api import FLOWS, granted
from tests.fakes.kubernetes.cluster import Cluster
from tests.fakes.process import ROOT

TEMPLATE = json.loads((ROOT / "deployments" / "l4-spot.job-template.json").read_text())
POOL = WorkPool(name="l4-spot", type="kubernetes", base_job_template=TEMPLATE)
NOW = datetime(2026, 1, 1, tzinfo=UTC)
GPU = "requests.nvidia.com/gpu"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster that this process reaches as the flow worker does."""
    with Cluster.open(tmp_path) as double, temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        for place in ("kubernetes_asyncio.config", "kubernetes_asyncio.config.kube_config"):
            monkeypatch.setattr(f"{place}.KUBE_CONFIG_DEFAULT_LOCATION", str(double.kubeconfig(FLOWS)))
        yield double


def add_quota(cluster: Cluster, hard: dict[str, str], used: dict[str, str], **spec: Any) -> None:
    made = {"metadata": {"generateName": "gpus"}, "spec": {"hard": hard, **spec}, "status": {"used": used}}
    cluster.create("resourcequotas", made)


def check(**job_variables: Any) -> None:
    deployment = DeploymentResponse(
        id=UUID(int=1), flow_id=UUID(int=2), name="l4-spot", created=NOW, updated=NOW, job_variables=job_variables
    )
    asyncio.run(check_quotas(POOL, deployment))


@pytest.mark.parametrize(
    ("hard", "used", "variables", "said"),
    [
        ({GPU: "0"}, {}, {}, r"quota gpus\w+ has requests.nvidia.com/gpu 0, 0 of it used, and a training wants 1,"),
        ({GPU: "1"}, {GPU: "1"}, {"gpu_count": 2}, r"gpu 1, 1 of it used, and a training wants 2.*edit resourcequota"),
        ({"cpu": "5500m"}, {"cpu": "2600m"}, {}, r"has cpu 5\.5\d*, 2\.6\d* of it used, and a training wants 6"),
        ({"limits.memory": "20Gi"}, {}, {}, r"has limits.memory"),
    ],
)
def test_a_quota_that_is_smaller_than_a_training_is_an_error(
    cluster: Cluster, hard: dict[str, str], used: dict[str, str], variables: dict[str, Any], said: str
) -> None:
    add_quota(cluster, hard, used)
    with pytest.raises(PreflowError, match=said):
        check(**variables)


@pytest.mark.parametrize(
    ("hard", "used", "said"),
    [
        ({GPU: "1"}, {GPU: "1"}, "requests.nvidia.com/gpu 1, 1 of it used, and a training wants 1: it starts when"),
        ({"cpu": "8500m"}, {"cpu": "2600m"}, "has cpu 8.500, 2.600 of it used, and a training wants 6: it starts when"),
    ],
)
def test_what_is_used_up_is_a_warning_for_it_may_end_and_the_run_may_need_no_pod(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, hard: dict[str, str], used: dict[str, str], said: str
) -> None:
    add_quota(cluster, hard, used)
    check()
    assert said in caplog.text


def test_room_another_resource_and_other_pods_are_no_reason(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    others = {"services": "0", "requests.storage": "no number"}
    add_quota(cluster, {GPU: "3", "memory": "1Pi"} | others, {GPU: "2", "services": "5"})
    check()
    add_quota(cluster, {GPU: "0"}, {}, scopes=["BestEffort"])
    check()
    assert caplog.text == ""


def test_what_a_template_only_limits_counts_as_requested(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    template = json.loads(json.dumps(TEMPLATE))
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    del pod["containers"][0]["resources"]["requests"]
    monkeypatch.setattr(sys.modules[__name__], "POOL", POOL.model_copy(update={"base_job_template": template}))
    add_quota(cluster, {GPU: "0"}, {})
    with pytest.raises(PreflowError, match=r"has requests\.nvidia\.com/gpu 0"):
        check()


def test_the_flow_worker_may_ask_all_that_it_asks_and_no_more(cluster: Cluster) -> None:
    check()
    asyncio.run(look(UUID(int=1), cluster.namespace))
    asked = cluster.requests(FLOWS)
    assert {row["code"] for row in asked} == {200}
    assert {(row["verb"], row["group"], row["resource"]) for row in asked} == granted()[FLOWS]
    assert {verb for verb, _, _ in granted()[FLOWS]} == {"list"}, "it changes nothing"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("role", "ApiException: (403)"),
        ("answer", "TimeoutError"),
        ("cluster", "PreflowError: no way to a Kubernetes cluster"),
        ("empty kubeconfig", "PreflowError: no way to a Kubernetes cluster"),
        ("user", "PreflowError: no way to a Kubernetes cluster"),
        ("number", "InvalidOperation"),
        ("job variable", "ValidationError"),
        ("block", "ConnectError"),
        ("namespace", "ApiException: (404)"),
    ],
)
def test_where_nobody_tells_nothing_is_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wrong: str, said: str
) -> None:
    add_quota(cluster, {GPU: "0"}, {})
    kubeconfig = cluster.kubeconfig(FLOWS)
    variables: dict[str, dict[str, Any]] = {
        "number": {"cpu": "lots"}, "job variable": {"labels": "none"},
        "block": {"env": {"KEY": "{{ prefect.blocks.secret.none }}"}}, "namespace": {"namespace": "other"},
    }  # fmt: skip
    if wrong == "role":
        monkeypatch.setitem(granted(), FLOWS, {("list", "", "pods")})
    elif wrong == "answer":
        monkeypatch.setattr(quota, "ANSWER_SECONDS", 0.0)
    elif wrong == "cluster":
        kubeconfig.unlink()
    elif wrong == "empty kubeconfig":
        kubeconfig.write_text("")
    elif wrong == "user":
        kubeconfig.write_text(kubeconfig.read_text().replace("users:", "unused:").replace("http:", "https:"))
    check(**variables.get(wrong, {}))
    assert f"quotas of namespace {'other' if wrong == 'namespace' else 'preflow'} are not compared" in caplog.text
    assert said in caplog.text


def test_a_quantity_is_read_as_kubernetes_writes_it() -> None:
    whole = {"1": 1, "24Gi": 24 * 2**30, "5M": 5 * 10**6, "1e3": 1000, "1E3": 1000, "2P": 2 * 10**15, "3E": 3 * 10**18,
             "1Pi": 2**50, "1Ei": 2**60}  # fmt: skip
    assert {text: amount(text) for text in whole} == whole
    assert [float(amount(text)) for text in ("500m", "7u", "9n", 2)] == [0.5, 7e-6, 9e-9, 2.0]
