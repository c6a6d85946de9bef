"""Trainings in Kubernetes Jobs lose their pod, their node, the worker, the server, and end as if nothing had been.

A real server, the real worker, the real job template and the real trainer; the cluster is the double in
tests/fakes/kubernetes.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from tasks.config import TrainingConfig
from tasks.drill.drill import Drill, choose_target, read_digests, train_with_preemptions
from tasks.train import work_pool as remote
from tasks.train.work_pool import TrainingOrder
from tests.deployed import until
from tests.fakes.kubernetes.api import WORKER, granted
from tests.fakes.kubernetes.cluster import JOB_VARIABLES, Cluster
from tests.fakes.kubernetes.jobs import backoff_seconds
from tests.fakes.kubernetes.kubelet import isolation
from tests.fakes.kubernetes.platform import AUTH, DEPLOYMENT, Server, Training, Worker, register
from tests.fakes.tiny_training import TinyWorld

SLOW_ENOUGH = {
    "logging_steps": 1, "save_steps": 10, "eval_steps": 40, "gradient_accumulation_steps": 4,
    "lease_seconds": 4,
}  # fmt: skip
STEPS = 80
# Six preemptions have a Job wait for 10 + 20 + 40 + 80 + 160 + 320 s; the double's clock runs faster then.
HASTE = 20.0
OVER = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

pytestmark = pytest.mark.long  # a cluster that loses pods and nodes


@dataclass
class Platform:
    """All that runs, and the inputs of a training."""

    cluster: Cluster
    server: Server
    worker: Worker
    world: TinyWorld
    folder: Path

    def training(self, steps: int = STEPS) -> TrainingConfig:
        """Return settings slow enough to be met in the middle."""
        return self.world.config(**SLOW_ENOUGH, max_steps=steps)

    def train(self, name: str, steps: int = STEPS, **variables: Any) -> Training:
        """Ask for a training in a workspace of its own."""
        return Training.start(self.server, self.world, self.folder / name, self.training(steps), **variables)

    def cancel(self, run: Training) -> None:
        """Cancel a run as the UI does."""
        state = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
        self.server.ask("POST", f"/flow_runs/{run.id}/set_state", state)

    def end_of(self, run: Training) -> dict[str, Any]:
        """Wait for the end of a run and return it."""
        found: dict[str, Any] = until(lambda: state if (state := run.state())["state_type"] in OVER else None)
        return found

    def end_of_job(self, run: Training) -> list[dict[str, Any]]:
        """Wait until a run's Job is over, or gone, so that no pod comes any more; return what is there of it."""

        def is_over() -> bool:
            kinds = [
                {item["type"] for item in job["status"].get("conditions", [])}
                for job in self.cluster.items("jobs", run.id)
            ]
            return all(found & {"Complete", "Failed"} for found in kinds)

        until(is_over)
        return self.cluster.items("jobs", run.id)


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    if not isolation():
        pytest.skip("this user may not make a process namespace, in which the double runs a container")
    folder = tmp_path_factory.mktemp("platform")
    with Cluster.open(tmp_path_factory.mktemp("kubernetes"), HASTE) as cluster:
        server = Server(folder / "prefect")
        worker = Worker(folder / "worker", server, cluster)
        server.start()
        try:
            register(server, cluster)
            worker.start()
            world = TinyWorld.build(cluster.workspace / "world")
            yield Platform(cluster, server, worker, world, cluster.workspace)
        finally:
            worker.kill()
            server.stop()


@pytest.fixture(scope="module")
def calm(platform: Platform) -> Training:
    """A run that nobody disturbs, started before the others."""
    return platform.train("calm")


@pytest.fixture(scope="module")
def mishaps(platform: Platform) -> dict[str, Training]:
    """Runs that end before any flow starts; Prefect takes half a minute to be sure of that, so they begin early."""
    commands = {"broken": "no-such-command", "deleted": "sleep 600", "unwanted": "sleep 600"}
    runs = {name: platform.train(name, command=text, backoff_limit=1) for name, text in commands.items()}
    for run in runs.values():
        until(lambda run=run: platform.cluster.items("pods", run.id) and run.state()["infrastructure_pid"])
    platform.cluster.delete_job(runs["deleted"].id)
    platform.cancel(runs["unwanted"])
    return runs


def metrics_time(run: Training) -> int:
    file = run.file("metrics.jsonl")
    return file.stat().st_mtime_ns if file else 0


def reach(run: Training, step: int) -> None:
    until(lambda: run.step() >= step)
    assert run.state()["state_type"] == "RUNNING", "too late: it is over"


def wait_for_a_step(run: Training) -> None:
    before = run.step()
    until(lambda: run.step() > before)


@contextmanager
def held(platform: Platform, run: Training) -> Iterator[None]:
    """Stop a pod for as long as something slow starts or ends, which then finds the training in its middle."""
    processes = platform.cluster.processes(platform.cluster.running_pod(run.id))
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in processes:
            os.kill(pid, signal.SIGCONT)


def strike(platform: Platform, run: Training, fault: Callable[[str], None]) -> float:
    """Order a fault for a run's pod and return the seconds until the next trainer has done a step."""
    token = run.token()
    fault(platform.cluster.running_pod(run.id))
    struck = time.monotonic()
    until(lambda: run.token() == token + 1)
    written = metrics_time(run)
    until(lambda: metrics_time(run) > written)
    return time.monotonic() - struck


def lose_and_give_up(platform: Platform, run: Training, pod: str) -> None:
    """Lose a pod's node: the pod stays Terminating, and no other comes, until somebody gives the node up."""
    platform.cluster.order("lose_node", pod)

    def terminating() -> bool:
        pods = platform.cluster.items("pods", run.id)
        return any(one["metadata"]["name"] == pod and "deletionTimestamp" in one["metadata"] for one in pods)

    until(terminating)
    time.sleep(5)
    assert terminating(), "force or time do not help"
    platform.cluster.order("give_node_up", pod)


def test_six_preemptions_and_the_run_ends_as_one_that_nobody_disturbs(
    platform: Platform,
    calm: Training,
    mishaps: dict[str, Training],
    record_property: Callable[[str, object], None],
) -> None:
    """Evicted and killed by turns, and at last its node is lost; the Job waits longer each time."""
    disturbed, cluster = platform.train("disturbed"), platform.cluster
    evicted = ("preemption, 15 s grace", lambda pod: cluster.order("preempt", pod))
    killed = ("SIGKILL", lambda pod: cluster.order("kill", pod))
    lost = ("node lost and given up", lambda pod: lose_and_give_up(platform, disturbed, pod))
    faults = [evicted, killed, evicted, killed, evicted, lost]
    for number, (name, fault) in enumerate(faults, 1):
        reach(disturbed, 10 * number)
        seconds, wait = strike(platform, disturbed, fault), backoff_seconds(number)
        assert seconds >= wait / cluster.haste, "a Job does not start sooner"
        record_property(f"{number}. {name}", round(seconds - wait / cluster.haste + wait, 1))
    run = platform.end_of(disturbed)
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    assert run["run_count"] == 1 + len(faults), "every pod went on with the same run"
    assert disturbed.token() == 1 + len(faults), "one trainer a pod, one after the other"
    (job,) = platform.end_of_job(disturbed)
    assert job["status"]["succeeded"] == 1
    assert job["status"].get("failed", 0) == 2, "a disruption uses up no retry"
    run, (pod,) = platform.end_of(calm), platform.cluster.items("pods", calm.id)
    assert (run["state_type"], run["run_count"], calm.token()) == ("COMPLETED", 1, 1)
    assert platform.end_of_job(calm)[0]["status"]["succeeded"] == 1
    assert pod["status"]["phase"] == "Succeeded"
    assert [row["step"] for row in calm.rows() if "loss" in row] == list(range(STEPS + 1))
    assert disturbed.result() == calm.result(), "the very same steps, each once"


def test_worker_and_server_may_die_while_it_trains(platform: Platform, calm: Training) -> None:
    run = platform.train("outages")
    ask, limits = platform.server.ask, "/v2/concurrency_limits"
    ask("POST", f"{limits}/", {"name": "one", "limit": 1})
    lease = ask("POST", f"{limits}/increment-with-lease", {"names": ["one"], "slots": 1})["lease_id"]
    reach(run, 5)
    for piece in (platform.worker, platform.server):
        with held(platform, run):
            piece.kill()
        wait_for_a_step(run)
        with held(platform, run):
            piece.start()
        wait_for_a_step(run)
    ask("POST", f"{limits}/leases/{lease}/renew", {"lease_duration": 300})  # else Prefect ends the run that holds it
    ended = platform.end_of(run)
    assert ended["state_type"] == "COMPLETED", ended["state"]["message"]
    assert (ended["run_count"], run.token()) == (1, 1)
    assert len(platform.cluster.items("pods", run.id)) == 1
    platform.end_of(calm)
    assert run.result() == calm.result()


async def test_the_drill_evicts_and_kills_and_the_result_is_the_same(
    platform: Platform, calm: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = platform.cluster
    await asyncio.to_thread(platform.end_of, calm)
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.5)
    monkeypatch.setattr("kubernetes_asyncio.config.KUBE_CONFIG_DEFAULT_LOCATION", str(cluster.kubeconfig()))
    monkeypatch.setattr("kubernetes_asyncio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(cluster.kubeconfig()))
    drill = Drill(str(platform.folder), DEPLOYMENT, preemptions=2, steps=STEPS)
    with temporary_settings({PREFECT_API_URL: platform.server.api, PREFECT_API_AUTH_STRING: AUTH}):
        target, variables = await choose_target(drill)
        order = TrainingOrder(
            DEPLOYMENT, platform.world.preferences, str(calm.folder), platform.training(), max_restarts=0,
            job_variables=JOB_VARIABLES | variables,
        )  # fmt: skip
        lost, digests = await train_with_preemptions(order, target, drill)
        (preempted,) = platform.folder.glob("preempted-*")
        (run,) = await replace(order, workspace=str(preempted)).runs()
    assert digests == read_digests(order)
    assert [preemption.kind.value for preemption in lost] == ["SIGTERM", "SIGKILL"]
    assert lost[0].resumed_from >= lost[0].at_step, "within its grace the trainer saves"
    assert lost[1].resumed_from % 10 == 0 or lost[1].resumed_from == lost[0].resumed_from, "a killed one saves nothing"
    assert all(preemption.seconds_lost > 0 for preemption in lost)
    assert run.run_count == 3, "the Job brought every pod by itself, and nobody had to reschedule the run"
    (job,) = cluster.items("jobs", str(run.id))
    assert job["status"].get("failed", 0) == 1, "an eviction uses up no retry, a killed container does"


def test_a_run_that_is_cancelled_while_it_trains_ends_its_trainer(
    platform: Platform, record_property: Callable[[str, object], None]
) -> None:
    run = platform.train("endless", steps=100_000)
    reach(run, 3)
    platform.cancel(run)
    cancelled = time.monotonic()
    assert platform.end_of(run)["state_type"] == "CANCELLED"
    platform.end_of_job(run)
    record_property("cancelled", round(time.monotonic() - cancelled, 1))
    assert len(platform.cluster.items("pods", run.id)) == run.token() == 1, "nobody went on with what was cancelled"
    assert run.saved_step() >= run.step() - 1, "what was done is saved: the next run of these settings goes on there"


def test_a_pod_that_never_starts_ends_the_run_with_its_log(platform: Platform, mishaps: dict[str, Training]) -> None:
    run = mishaps["broken"]
    assert platform.end_of(run)["state_type"] == "CRASHED"
    body = {"logs": {"flow_run_id": {"any_": [run.id]}}}
    until(
        lambda: any(
            "no-such-command" in entry["message"] for entry in platform.server.ask("POST", "/logs/filter", body)
        )
    )


def test_a_run_that_is_cancelled_before_it_starts_loses_its_job(
    platform: Platform, mishaps: dict[str, Training]
) -> None:
    run = mishaps["unwanted"]
    assert platform.end_of(run)["state_type"] == "CANCELLED"
    until(lambda: platform.cluster.items("jobs", run.id) == [])


def test_a_job_that_somebody_deletes_ends_the_run(platform: Platform, mishaps: dict[str, Training]) -> None:
    assert platform.end_of(mishaps["deleted"])["state_type"] == "CRASHED"


def test_the_role_grants_what_the_worker_asks_for_and_no_more(platform: Platform, mishaps: dict[str, Training]) -> None:
    """Runs that start and mishaps of every kind, against infra/k8s/base/accounts.yaml, which the double enforces."""
    for run in mishaps.values():
        platform.end_of(run)
    until(lambda: platform.cluster.items("jobs", mishaps["unwanted"].id) == [])
    asked = platform.cluster.requests(WORKER)
    assert not [row for row in asked if row["code"] == 403]
    assert {(row["verb"], row["group"], row["resource"]) for row in asked} == granted()[WORKER]
    assert {row["namespace"] for row in asked} == {platform.cluster.namespace}
