"""Trainings in Kubernetes Jobs lose their pod, their node, the worker, the server, and end as if nothing had been.

A real server, the real worker, the real job template and the real trainer; the cluster is the double in
tests/fakes/kubernetes, or a real one that PREFLOW_TEST_KUBECONFIG names (see tests/fakes/kubernetes/cluster.py).
"""

import asyncio
import os
import signal
import tempfile
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
from tests.fakes.kubernetes.api import WORKER, granted
from tests.fakes.kubernetes.cluster import Cluster, DoubleCluster, RealCluster, Unavailable
from tests.fakes.kubernetes.jobs import LONGEST_BACKOFF_SECONDS, backoff_seconds
from tests.fakes.kubernetes.kubelet import isolation
from tests.fakes.kubernetes.platform import (
    AUTH,
    DEPLOYMENT,
    SECONDS,
    Kubernetes,
    Server,
    Training,
    Worker,
    register,
    wait_until,
)  # fmt: skip
from tests.fakes.tiny_training import TinyWorld

SLOW_ENOUGH = {
    "logging_steps": 1, "save_steps": 10, "eval_steps": 40, "gradient_accumulation_steps": 4,
    "lease_seconds": 4,
}  # fmt: skip
# Six preemptions have a Job wait for 10 + 20 + 40 + 80 + 160 + 320 s; the double's clock runs faster then.
HASTE = 20.0
OVER = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

pytestmark = pytest.mark.long  # a cluster that loses pods and nodes


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if "PREFLOW_TEST_KUBECONFIG" in os.environ:
        real = RealCluster()
        yield real
        real.close()
        return
    if not isolation():
        pytest.skip("this user may not make a process namespace, in which the double runs a container")
    with DoubleCluster.open(tmp_path_factory.mktemp("kubernetes"), HASTE) as double:
        yield double


@dataclass
class Platform:
    """All that runs, and the inputs of a training."""

    cluster: Cluster
    kubernetes: Kubernetes
    server: Server
    worker: Worker
    world: TinyWorld
    folder: Path

    def training(self, steps: int | None = None) -> TrainingConfig:
        """Return settings slow enough to be met in the middle."""
        return self.world.config(**SLOW_ENOUGH, max_steps=steps or self.cluster.steps)

    def train(self, name: str, steps: int | None = None, **variables: Any) -> Training:
        """Ask for a training in a workspace of its own."""
        training = self.training(steps)
        return Training.start(self.server, self.cluster, self.world, self.folder / name, training, **variables)

    def cancel(self, run: Training) -> None:
        """Cancel a run as the UI does."""
        state = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
        self.server.ask("POST", f"/flow_runs/{run.id}/set_state", state)

    def end_of(self, run: Training) -> dict[str, Any]:
        """Wait for the end of a run and return it."""
        found: dict[str, Any] = wait_until(
            lambda: state if (state := run.state())["state_type"] in OVER else None, what=f"the end of run {run.id}"
        )
        return found

    def has_ended(self, run: Training) -> bool:
        """Tell whether a run's Job is over, or gone, so that no pod comes any more."""
        kinds = [
            {item["type"] for item in job["status"].get("conditions", []) if item["status"] == "True"}
            for job in self.kubernetes.jobs(run.id)
        ]
        return all(found & {"Complete", "Failed"} for found in kinds)

    def end_of_job(self, run: Training) -> dict[str, Any]:
        """Wait for the end of a run's one Job, which comes a little after the run's, and return it."""
        wait_until(lambda: self.has_ended(run), what=f"the end of the Job of run {run.id}")
        (job,) = self.kubernetes.jobs(run.id)
        return job


@pytest.fixture(scope="module")
def platform(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("platform")
    cluster.workspace.mkdir(exist_ok=True)
    workspace = Path(tempfile.mkdtemp(dir=cluster.workspace, prefix="preemption-"))
    workspace.chmod(0o755)
    server, kubernetes = Server(folder / "prefect", cluster.server_host), Kubernetes(cluster)
    worker = Worker(folder / "worker", server, cluster)
    server.start()
    try:
        kubernetes.make_auth_secret()
        register(server, cluster)
        worker.start()
        yield Platform(cluster, kubernetes, server, worker, TinyWorld.build(workspace / "world"), workspace)
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
        wait_until(lambda run=run: platform.kubernetes.pods(run.id) and run.state()["infrastructure_pid"], what="a Job")
    (deleted,) = platform.kubernetes.jobs(runs["deleted"].id)
    platform.kubernetes.ask("DELETE", f"jobs/{deleted['metadata']['name']}?propagationPolicy=Background")
    platform.cancel(runs["unwanted"])
    return runs


def metrics_of(run: Training) -> bytes:
    (file,) = run.folder.glob("training/*/metrics.jsonl")
    return file.read_bytes()


def metrics_time(run: Training) -> int:
    return max((file.stat().st_mtime_ns for file in run.folder.glob("training/*/metrics.jsonl")), default=0)


def reach(run: Training, step: int) -> None:
    wait_until(lambda: run.step() >= step, what=f"step {step}")
    assert run.state()["state_type"] == "RUNNING", "too late: it is over"


def wait_for_a_step(run: Training) -> None:
    before = run.step()
    wait_until(lambda: run.step() > before, what=f"a step after {before}")


@contextmanager
def held(platform: Platform, run: Training) -> Iterator[None]:
    """Stop a pod for as long as something slow starts or ends, which then finds the training in its middle."""
    try:
        processes = platform.cluster.processes(platform.kubernetes.running_pod(run.id))
    except Unavailable as reason:
        print(f"the training goes on meanwhile ({reason})")
        processes = []
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
    fault(platform.kubernetes.running_pod(run.id))
    struck = time.monotonic()
    wait_until(lambda: run.token() == token + 1, LONGEST_BACKOFF_SECONDS + SECONDS, "another trainer")
    written = metrics_time(run)
    wait_until(lambda: metrics_time(run) > written, what="a step of the next trainer")
    return time.monotonic() - struck


def lose_and_give_up(platform: Platform, pod: str) -> None:
    """Lose a pod's node: the pod stays Terminating, and no other comes, until somebody gives the node up."""
    platform.cluster.lose_node(pod)

    def terminating() -> Any:
        return platform.kubernetes.ask("GET", f"pods/{pod}")["metadata"].get("deletionTimestamp")

    wait_until(terminating, what="the pod's deletion")
    time.sleep(5)
    assert terminating(), "force or time do not help"
    platform.cluster.give_node_up(pod)


@pytest.mark.timeout(3600)  # on a real cluster
def test_six_preemptions_and_the_run_ends_as_one_that_nobody_disturbs(
    platform: Platform,
    calm: Training,
    mishaps: dict[str, Training],
    record_property: Callable[[str, object], None],
) -> None:
    """Evicted and killed by turns, and at last its node is lost; the Job waits longer each time."""
    disturbed, cluster = platform.train("disturbed"), platform.cluster
    evicted, killed = ("preemption, 15 s grace", cluster.preempt), ("SIGKILL", cluster.kill)
    lost = ("node lost and given up", lambda pod: lose_and_give_up(platform, pod))
    struck = []
    for number, (name, fault) in enumerate([evicted, killed, evicted, killed, evicted, lost], 1):
        reach(disturbed, 10 * number * cluster.steps // 80)
        try:
            seconds = strike(platform, disturbed, fault)
        except Unavailable as reason:
            print(f"{name}: not tried ({reason})")
            continue
        struck.append(name)
        wait = backoff_seconds(number)
        assert seconds >= wait / cluster.haste, "a Job does not start sooner"
        unhurried = seconds - wait / cluster.haste + wait
        record_property(f"{number}. {name}", round(unhurried, 1))
        print(f"{number}. {name}: {unhurried:.1f} s to the next step, {wait:.0f} of them the Job's wait")
    run = platform.end_of(disturbed)
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    assert run["run_count"] == 1 + len(struck), "every pod went on with the same run"
    assert disturbed.token() == 1 + len(struck), "one trainer a pod, one after the other"
    job = platform.end_of_job(disturbed)
    assert job["status"]["succeeded"] == 1
    assert job["status"].get("failed", 0) == struck.count("SIGKILL"), "a disruption uses up no retry"
    assert platform.end_of(calm)["state_type"] == "COMPLETED"
    assert disturbed.adapter() == calm.adapter()
    assert metrics_of(disturbed) == metrics_of(calm), "the very same steps, each once"


def test_the_calm_run_needed_one_pod(platform: Platform, calm: Training) -> None:
    run = platform.end_of(calm)
    assert (run["state_type"], run["run_count"], calm.token()) == ("COMPLETED", 1, 1)
    steps = [row["step"] for row in calm.rows() if "loss" in row]
    assert steps == list(range(platform.cluster.steps + 1))
    assert platform.end_of_job(calm)["status"]["succeeded"] == 1
    (pod,) = platform.kubernetes.pods(calm.id)
    assert pod["status"]["phase"] == "Succeeded"


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
    assert len(platform.kubernetes.pods(run.id)) == 1
    platform.end_of(calm)
    assert run.adapter() == calm.adapter()
    assert metrics_of(run) == metrics_of(calm)


async def test_the_drill_evicts_and_kills_and_the_result_is_the_same(
    platform: Platform, calm: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = platform.cluster
    if cluster.is_real:
        pytest.skip("the drill watches the workspace, which here has another path than in a pod")
    await asyncio.to_thread(platform.end_of, calm)
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.5)
    monkeypatch.setattr("kubernetes_asyncio.config.KUBE_CONFIG_DEFAULT_LOCATION", str(cluster.kubeconfig()))
    monkeypatch.setattr("kubernetes_asyncio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(cluster.kubeconfig()))
    drill = Drill(str(platform.folder), DEPLOYMENT, preemptions=2, steps=cluster.steps)
    api = f"http://127.0.0.1:{platform.server.port}/api"
    with temporary_settings({PREFECT_API_URL: api, PREFECT_API_AUTH_STRING: AUTH}):
        target, variables = await choose_target(drill)
        order = TrainingOrder(
            DEPLOYMENT, platform.world.preferences, str(calm.folder), platform.training(), max_restarts=0,
            job_variables=cluster.job_variables() | variables,
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
    (job,) = await asyncio.to_thread(platform.kubernetes.jobs, str(run.id))
    assert job["status"].get("failed", 0) == 1, "an eviction uses up no retry, a killed container does"


def test_a_run_that_is_cancelled_while_it_trains_ends_its_trainer(
    platform: Platform, record_property: Callable[[str, object], None]
) -> None:
    run = platform.train("endless", steps=100_000)
    reach(run, 3)
    platform.cancel(run)
    cancelled = time.monotonic()
    assert platform.end_of(run)["state_type"] == "CANCELLED"
    wait_until(lambda: platform.has_ended(run), what="the end of the Job")
    seconds = time.monotonic() - cancelled
    record_property("cancelled", round(seconds, 1))
    print(f"cancelled: {seconds:.1f} s until nothing of it was left")
    assert len(platform.kubernetes.pods(run.id)) == run.token() == 1, "nobody went on with what was cancelled"
    assert run.saved_step() >= run.step() - 1, "what was done is saved: the next run of these settings goes on there"


def test_a_pod_that_never_starts_ends_the_run_with_its_log(platform: Platform, mishaps: dict[str, Training]) -> None:
    run = mishaps["broken"]
    assert platform.end_of(run)["state_type"] == "CRASHED"
    body = {"logs": {"flow_run_id": {"any_": [run.id]}}}
    wait_until(
        lambda: any(
            "no-such-command" in entry["message"] for entry in platform.server.ask("POST", "/logs/filter", body)
        ),
        what="the pod's log among the run's",
    )


def test_a_run_that_is_cancelled_before_it_starts_loses_its_job(
    platform: Platform, mishaps: dict[str, Training]
) -> None:
    run = mishaps["unwanted"]
    assert platform.end_of(run)["state_type"] == "CANCELLED"
    wait_until(lambda: platform.kubernetes.jobs(run.id) == [], what="the end of the Job")


def test_a_job_that_somebody_deletes_ends_the_run(platform: Platform, mishaps: dict[str, Training]) -> None:
    assert platform.end_of(mishaps["deleted"])["state_type"] == "CRASHED"


def test_the_role_grants_what_the_worker_asks_for_and_no_more(platform: Platform, mishaps: dict[str, Training]) -> None:
    """Runs that start and mishaps of every kind, against infra/k8s/base/accounts.yaml, which the double enforces."""
    for run in mishaps.values():
        platform.end_of(run)
    wait_until(lambda: platform.kubernetes.jobs(mishaps["unwanted"].id) == [], what="the end of the Job")
    try:
        asked = platform.cluster.requests(WORKER)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert not [row for row in asked if row["code"] == 403]
    assert {(row["verb"], row["group"], row["resource"]) for row in asked} == granted()[WORKER]
    assert {row["namespace"] for row in asked} == {platform.cluster.namespace}
