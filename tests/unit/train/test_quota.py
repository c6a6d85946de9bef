"""Quotas of the namespace, read by the flow worker's account and role through the API, before anything is spent."""

import asyncio
import json
import logging
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
from tests.fakes.kubernetes.cluster import DoubleCluster
from tests.fakes.kubernetes.platform import Kubernetes
from tests.fakes.process import ROOT

TEMPLATE = json.loads((ROOT / "deployments" / "l4-spot.job-template.json").read_text())
POOL = WorkPool(name="l4-spot", type="kubernetes", base_job_template=TEMPLATE)
NOW = datetime(2026, 1, 1, tzinfo=UTC)
GPU = "requests.nvidia.com/gpu"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DoubleCluster]:
    """A cluster that this process reaches as the flow worker does."""
    with DoubleCluster.open(tmp_path) as double, temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        for place in ("kubernetes_asyncio.config", "kubernetes_asyncio.config.kube_config"):
            monkeypatch.setattr(f"{place}.KUBE_CONFIG_DEFAULT_LOCATION", str(double.kubeconfig(FLOWS)))
        yield double


def add_quota(cluster: DoubleCluster, hard: dict[str, str], used: dict[str, str], **spec: Any) -> None:
    made = {
        "metadata": {"generateName": "gpus"},
        "spec": {"hard": hard, **spec},
        "status": {"hard": hard, "used": used},
    }
    Kubernetes(cluster).ask("POST", "resourcequotas", made)


def add_training(cluster: DoubleCluster, phase: str) -> None:
    labels, resources = {"preflow.dev/component": "training"}, {"requests": {"nvidia.com/gpu": "1"}}
    spec = {"containers": [{"name": "prefect-job", "resources": resources}]}
    pod = {"metadata": {"generateName": "t-", "labels": labels}, "spec": spec, "status": {"phase": phase}}
    Kubernetes(cluster).ask("POST", "pods", pod)


def check(**job_variables: Any) -> None:
    deployment = DeploymentResponse(
        id=UUID(int=1), flow_id=UUID(int=2), name="l4-spot", created=NOW, updated=NOW, job_variables=job_variables
    )
    asyncio.run(check_quotas(POOL, deployment))


@pytest.mark.parametrize(
    ("hard", "used", "variables", "said"),
    [
        ({GPU: "0"}, {}, {}, r"quota gpus\w+ has requests.nvidia.com/gpu 0, 0 of it used, and a training wants 1,"),
        ({GPU: "2"}, {GPU: "1"}, {"gpu_count": 2}, r"gpu 2, 1 of it used, and a training wants 2.*edit resourcequota"),
        ({"cpu": "8500m"}, {"cpu": "2600m"}, {}, r"has cpu 8\.5\d*, 2\.6\d* of it used, and a training wants 6"),
        ({"limits.memory": "20Gi"}, {}, {}, r"has limits.memory"),
    ],
)
def test_a_quota_that_lets_no_training_start_is_an_error(
    cluster: DoubleCluster, hard: dict[str, str], used: dict[str, str], variables: dict[str, Any], said: str
) -> None:
    add_quota(cluster, hard, used)
    with pytest.raises(PreflowError, match=said):
        check(**variables)


def test_what_trainings_use_is_free_again_when_they_end(
    cluster: DoubleCluster, caplog: pytest.LogCaptureFixture
) -> None:
    add_quota(cluster, {GPU: "1"}, {GPU: "1"})
    add_training(cluster, "Succeeded")
    with pytest.raises(PreflowError, match="end what uses it"):
        check()
    add_training(cluster, "Running")
    check()
    assert "requests.nvidia.com/gpu 1, 1 of it used, and a training wants 1: it starts when" in caplog.text


def test_room_another_resource_and_other_pods_are_no_reason(
    cluster: DoubleCluster, caplog: pytest.LogCaptureFixture
) -> None:
    add_quota(cluster, {GPU: "3", "services": "0", "memory": "1Ti"}, {GPU: "2", "services": "5"})
    check()
    add_quota(cluster, {GPU: "0"}, {}, scopes=["BestEffort"])
    check()
    assert caplog.text == ""


def test_the_flow_worker_may_ask_all_that_it_asks_and_no_more(cluster: DoubleCluster) -> None:
    check()
    asyncio.run(look(UUID(int=1), cluster.namespace))
    asked = cluster.requests(FLOWS)
    assert {row["code"] for row in asked} == {200}
    assert {(row["verb"], row["group"], row["resource"]) for row in asked} == granted()[FLOWS]
    assert {verb for verb, _, _ in granted()[FLOWS]} == {"list"}, "it changes nothing"


@pytest.mark.parametrize("missing", ["role", "cluster", "answer"])
def test_where_nobody_tells_nothing_is_refused(
    cluster: DoubleCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    add_quota(cluster, {GPU: "0"}, {})
    caplog.set_level(logging.INFO)
    if missing == "role":
        monkeypatch.setitem(granted(), FLOWS, {("list", "", "pods")})
    elif missing == "answer":
        monkeypatch.setattr(quota, "ANSWER_SECONDS", 0.0)
    else:
        cluster.kubeconfig(FLOWS).unlink()
    check()
    assert "quotas of namespace preflow cannot be read from here" in caplog.text


def test_a_quantity_is_read_as_kubernetes_writes_it() -> None:
    assert [str(amount(text)) for text in ("1", 2, "24Gi", "5M", "1e3")] == ["1", "2", "25769803776", "5000000", "1E+3"]
    assert float(amount("500m")) == 0.5
