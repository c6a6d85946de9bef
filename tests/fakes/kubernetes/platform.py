"""preflow as on a cluster: a Prefect server, the worker as its manifest starts it, and runs of train-dpo/l4-spot."""

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kubernetes_asyncio import config

from tasks.config import TrainingConfig
from tasks.demo import watchdog
from tasks.demo.services import Service, free_port, prefect_server
from tests.deployed import rest_client
from tests.fakes.kubernetes.api import WORKER
from tests.fakes.kubernetes.cluster import Cluster
from tests.fakes.process import ROOT
from tests.fakes.tiny_training import TinyWorld

AUTH = "admin:not-a-secret"
DEPLOYMENT = "train-dpo/l4-spot"
QUIET = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_CLI_COLORS": "false"}
SECONDS = 300.0


def wait_until(condition: Callable[[], Any], seconds: float = SECONDS, what: str = "it") -> Any:
    """Return what `condition` finds as soon as it finds something."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what} did not happen in {seconds:.0f} s"
        time.sleep(0.1)


def clean_environment() -> dict[str, str]:
    """Return this process's environment without its Prefect settings, which the worker would hand on to Jobs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **QUIET}


def kill_watched(watchdog_pid: int) -> None:
    """SIGKILL the process group that a watchdog looks after."""
    for child in Path(f"/proc/{watchdog_pid}/task/{watchdog_pid}/children").read_text().split():
        with suppress(ProcessLookupError):
            os.killpg(int(child), signal.SIGKILL)


class Server:
    """A Prefect server that asks for authentication and may be killed and started again with its database."""

    def __init__(self, folder: Path, host: str) -> None:
        (folder / "home").mkdir(parents=True)
        self._service: Service = prefect_server(folder / "home")
        self._service.command = [host if part == "127.0.0.1" else part for part in self._service.command]
        self._service.environment = {
            **self._service.environment, "PREFECT_SERVER_API_AUTH_STRING": AUTH,
            # Five minutes by default: then the server has the worker delete the Job of a run that is still Cancelling.
            "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_CANCELLING_TIMEOUT_SECONDS": "30",
        }  # fmt: skip
        self.port = self._service.port
        self._client = rest_client(f"http://127.0.0.1:{self.port}/api", auth=tuple(AUTH.split(":")))

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._service.start()
        self._service.wait_ready()

    def kill(self) -> None:
        """SIGKILL the server."""
        if self._service._process is not None:
            kill_watched(self._service._process.pid)
        self.stop()

    def stop(self) -> None:
        """End it."""
        self._service.stop()

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """Return the answer to a request of the REST API."""
        answer = self._client.request(method, path, json=body)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None


class Worker:
    """The worker of l4-spot with the arguments and the environment that infra/k8s/base/workers.yaml gives it."""

    def __init__(self, folder: Path, server: Server, cluster: Cluster) -> None:
        folder.mkdir(parents=True)
        self._folder, self._server, self._cluster = folder, server, cluster
        self._process: subprocess.Popen[bytes] | None = None

    def _environment(self, entries: list[dict[str, Any]]) -> dict[str, str]:
        ui = f"http://127.0.0.1:{self._server.port}"
        values = {"prefect-auth": AUTH, "metadata.namespace": self._cluster.namespace, "PREFECT_UI_URL": ui}
        found = clean_environment() | {"HOME": str(self._folder), "KUBECONFIG": str(self._cluster.kubeconfig(WORKER))}
        for entry in entries:
            source = entry.get("valueFrom", {})
            name = source.get("secretKeyRef", {}).get("name") or source.get("fieldRef", {}).get("fieldPath")
            name = name or source.get("configMapKeyRef", {}).get("key")
            found[entry["name"]] = values[name] if name else entry["value"]
        found["PREFECT_API_URL"] = self._cluster.api_url(self._server.port)
        found["PREFECT_WORKER_WEBSERVER_HOST"] = "127.0.0.1"
        found["PREFECT_WORKER_WEBSERVER_PORT"] = str(free_port())
        return found | {"PREFECT_WORKER_QUERY_SECONDS": "1"}

    def start(self) -> None:
        """Start the worker and wait until it takes runs."""
        before = self.log().count("started!")
        manifests = yaml.safe_load_all((ROOT / "infra" / "k8s" / "base" / "workers.yaml").read_text())
        (deployment,) = [item for item in manifests if item["metadata"]["name"] == WORKER]
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        reader, self._lifeline = os.pipe()
        with (self._folder / "worker.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, watchdog.__file__, str(reader), "10", *container["args"]],
                cwd=self._folder, env=self._environment(container["env"]), stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, pass_fds=[reader],
            )  # fmt: skip
        os.close(reader)
        wait_until(lambda: self.log().count("started!") > before, what="the worker's start")

    def kill(self) -> None:
        """SIGKILL the worker, if it was started."""
        if self._process is not None:
            kill_watched(self._process.pid)
            self._process.wait()
            os.close(self._lifeline)
            self._process = None

    def log(self) -> str:
        """Return what it printed."""
        file = self._folder / "worker.log"
        return file.read_text(errors="replace") if file.exists() else ""


def register(server: Server, cluster: Cluster) -> None:
    """Make the pools and deployments with deployments/register.sh, and what only this cluster needs."""
    environment = clean_environment() | {
        "PREFECT_API_URL": f"http://127.0.0.1:{server.port}/api", "PREFECT_API_AUTH_STRING": AUTH,
        "HOME": str(cluster.workspace),
    }  # fmt: skip
    done = subprocess.run(
        ["deployments/register.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if cluster.is_real:
        return
    # The double's containers see this machine's files, where the image's /opt/preflow is this checkout.
    step = {"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}
    found = server.ask("GET", f"/deployments/name/{DEPLOYMENT}")
    server.ask("PATCH", f"/deployments/{found['id']}", {"pull_steps": [step]})


class Kubernetes:
    """The tests' own view of the cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """Return the answer to a request below /api/v1 or /apis/batch/v1 of the cluster's namespace."""

        async def call() -> Any:
            client = await config.new_client_from_config(str(self._cluster.kubeconfig()))
            group = "apis/batch/v1" if path.startswith("jobs") else "api/v1"
            url = f"{client.configuration.host}/{group}/namespaces/{self._cluster.namespace}/{path}"
            headers = {"Content-Type": "application/json"}
            async with client:
                await client.update_params_for_auth(headers, [], ["BearerToken"])
                answer = await client.rest_client.request(method, url, headers=headers, body=body)
                text = answer.data.decode()
                return json.loads(text) if text.startswith("{") else text

        return asyncio.run(call())

    def make_auth_secret(self) -> None:
        """Make the Secret from which Jobs get the server's auth string, as infra/k8s/secrets.sh does."""
        data = {"auth-string": base64.b64encode(AUTH.encode()).decode()}
        self.ask("POST", "secrets", {"metadata": {"name": "prefect-auth"}, "data": data})

    def jobs(self, run: str) -> list[dict[str, Any]]:
        """Return the Jobs of a flow run."""
        found: list[dict[str, Any]] = self.ask("GET", f"jobs?labelSelector=prefect.io/flow-run-id={run}")["items"]
        return found

    def pods(self, run: str) -> list[dict[str, Any]]:
        """Return the pods of a flow run."""
        found: list[dict[str, Any]] = self.ask("GET", f"pods?labelSelector=prefect.io/flow-run-id={run}")["items"]
        return found

    def running_pod(self, run: str) -> str:
        """Return the name of the one pod of a run that is running and not on its way out."""
        (name,) = [
            pod["metadata"]["name"]
            for pod in self.pods(run)
            if pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]
        ]
        return str(name)


@dataclass
class Training:
    """One flow run of train-dpo/l4-spot and what its training leaves in the workspace."""

    server: Server
    id: str
    folder: Path

    @classmethod
    def start(
        cls, server: Server, cluster: Cluster, world: TinyWorld, workspace: Path, training: TrainingConfig,
        **variables: Any,
    ) -> "Training":  # fmt: skip
        """Ask for a run, as the UI does; base, adapter and pairs are given as pods see them."""
        workspace.mkdir()
        workspace.chmod(0o777)  # on a real cluster pods are another user
        preferences = world.preferences.model_copy(update={"uri": cluster.inside(Path(world.preferences.uri))})
        told = training.model_dump(mode="json", exclude_unset=True) | {
            "base_model": cluster.inside(world.base), "sft_adapter": cluster.inside(world.adapter),
        }  # fmt: skip
        body = {
            "parameters": {
                "preferences": preferences.model_dump(mode="json"), "workspace": cluster.inside(workspace),
                "training": told,
            },
            "job_variables": cluster.job_variables() | variables,
        }  # fmt: skip
        deployment = server.ask("GET", f"/deployments/name/{DEPLOYMENT}")["id"]
        run = server.ask("POST", f"/deployments/{deployment}/create_flow_run", body)
        return cls(server, run["id"], workspace)

    def _file(self, pattern: str) -> Path | None:
        return next(iter(self.folder.glob(f"training/*/{pattern}")), None)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl, as far as they are written."""
        file = self._file("metrics.jsonl")
        return [json.loads(line) for line in file.read_text().splitlines()] if file else []

    def step(self) -> int:
        """Return the newest optimizer step that the metrics tell of."""
        return max((int(row["step"]) for row in self.rows()), default=0)

    def saved_step(self) -> int:
        """Return the step of the newest whole checkpoint."""
        found = self.folder.glob("training/*/checkpoints/step-*/COMMITTED.json")
        return max((int(marker.parent.name.removeprefix("step-")) for marker in found), default=0)

    def token(self) -> int:
        """Return the fencing token of the newest trainer: how many have held the lease."""
        file = self._file("lease.json")
        return int(json.loads(file.read_text())["token"]) if file else 0

    def state(self) -> dict[str, Any]:
        """Return the flow run."""
        found: dict[str, Any] = self.server.ask("GET", f"/flow_runs/{self.id}")
        return found

    def adapter(self) -> dict[str, str]:
        """Return the digests of the finished adapter's files."""
        file = self._file("adapter/COMMITTED.json")
        assert file is not None, f"no adapter in {self.folder}"
        return {name: facts["sha256"] for name, facts in json.loads(file.read_text())["files"].items()}
