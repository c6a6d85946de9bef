"""preflow as on a cluster: a Prefect server, the worker as its manifest starts it, and runs of train-dpo/l4-spot."""

import base64
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tasks.config import TrainingConfig
from tasks.demo import watchdog
from tasks.demo.services import Service, free_port, prefect_server
from tests.deployed import rest_client, until
from tests.fakes.kubernetes.api import WORKER
from tests.fakes.kubernetes.cluster import JOB_VARIABLES, Cluster
from tests.fakes.process import ROOT
from tests.fakes.tiny_training import TinyWorld

AUTH = "admin:not-a-secret"
DEPLOYMENT = "train-dpo/l4-spot"
QUIET = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_CLI_COLORS": "false"}


def clean_environment(**more: str) -> dict[str, str]:
    """Return this process's environment without its Prefect settings, which the worker would hand on to Jobs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), **QUIET, **more}


def kill_watched(watchdog_pid: int) -> None:
    """SIGKILL the process group that a watchdog looks after."""
    for child in Path(f"/proc/{watchdog_pid}/task/{watchdog_pid}/children").read_text().split():
        with suppress(ProcessLookupError):
            os.killpg(int(child), signal.SIGKILL)


class Server:
    """A Prefect server that asks for authentication and may be killed and started again with its database."""

    def __init__(self, folder: Path) -> None:
        (folder / "home").mkdir(parents=True)
        self._service: Service = prefect_server(folder / "home")
        self._service.environment = {
            **self._service.environment, "PREFECT_SERVER_API_AUTH_STRING": AUTH,
            # Five minutes by default: then the server has the worker delete the Job of a run that is still Cancelling.
            "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_CANCELLING_TIMEOUT_SECONDS": "30",
        }  # fmt: skip
        self.api = f"http://127.0.0.1:{self._service.port}/api"
        self._client = rest_client(self.api, auth=tuple(AUTH.split(":")))
        self.stop = self._service.stop

    def start(self) -> None:
        self._service.start()
        self._service.wait_ready()

    def kill(self) -> None:
        if self._service._process is not None:
            kill_watched(self._service._process.pid)
        self.stop()

    def ask(self, method: str, path: str, body: object = None) -> Any:
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
        ui = self._server.api.removesuffix("/api")
        values = {"prefect-auth": AUTH, "metadata.namespace": self._cluster.namespace, "PREFECT_UI_URL": ui}
        found = clean_environment(HOME=str(self._folder), KUBECONFIG=str(self._cluster.kubeconfig(WORKER)))
        for entry in entries:
            source = entry.get("valueFrom", {})
            name = source.get("secretKeyRef", {}).get("name") or source.get("fieldRef", {}).get("fieldPath")
            name = name or source.get("configMapKeyRef", {}).get("key")
            found[entry["name"]] = values[name] if name else entry["value"]
        return found | {
            "PREFECT_API_URL": self._server.api, "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1",
            "PREFECT_WORKER_WEBSERVER_PORT": str(free_port()), "PREFECT_WORKER_QUERY_SECONDS": "1",
        }  # fmt: skip

    def start(self) -> None:
        """Start the worker and wait until it takes runs."""
        log = self._folder / "worker.log"
        log.touch()
        before = log.read_text().count("started!")
        manifests = yaml.safe_load_all((ROOT / "infra" / "k8s" / "base" / "workers.yaml").read_text())
        (deployment,) = [item for item in manifests if item["metadata"]["name"] == WORKER]
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        reader, self._lifeline = os.pipe()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, watchdog.__file__, str(reader), "10", *container["args"]],
                cwd=self._folder, env=self._environment(container["env"]), stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True, pass_fds=[reader],
            )  # fmt: skip
        os.close(reader)
        until(lambda: log.read_text(errors="replace").count("started!") > before)

    def kill(self) -> None:
        if self._process is not None:
            kill_watched(self._process.pid)
            self._process.wait()
            os.close(self._lifeline)
            self._process = None


def register(server: Server, cluster: Cluster) -> None:
    """Make the pools and deployments with deployments/register.sh, and what only this cluster needs."""
    environment = clean_environment(
        PREFECT_API_URL=server.api, PREFECT_API_AUTH_STRING=AUTH, HOME=str(cluster.workspace)
    )
    done = subprocess.run(
        ["deployments/register.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # The double's containers see this machine's files, where the image's /opt/preflow is this checkout.
    step = {"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}
    found = server.ask("GET", f"/deployments/name/{DEPLOYMENT}")
    server.ask("PATCH", f"/deployments/{found['id']}", {"pull_steps": [step]})
    # The Secret from which Jobs get the server's auth string, as infra/k8s/secrets.sh makes it.
    data = {"auth-string": base64.b64encode(AUTH.encode()).decode()}
    cluster.create("secrets", {"metadata": {"name": "prefect-auth"}, "data": data})


@dataclass
class Training:
    """One flow run of train-dpo/l4-spot and what its training leaves in the workspace."""

    server: Server
    id: str
    folder: Path

    @classmethod
    def start(
        cls, server: Server, world: TinyWorld, workspace: Path, training: TrainingConfig, **variables: Any
    ) -> "Training":
        """Ask for a run, as the UI does."""
        workspace.mkdir()
        body = {
            "parameters": {
                "preferences": world.preferences.model_dump(mode="json"), "workspace": str(workspace),
                "training": training.model_dump(mode="json", exclude_unset=True),
            },
            "job_variables": JOB_VARIABLES | variables,
        }  # fmt: skip
        deployment = server.ask("GET", f"/deployments/name/{DEPLOYMENT}")["id"]
        return cls(server, server.ask("POST", f"/deployments/{deployment}/create_flow_run", body)["id"], workspace)

    def file(self, pattern: str) -> Path | None:
        return next(iter(self.folder.glob(f"training/*/{pattern}")), None)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl, as far as they are written."""
        file = self.file("metrics.jsonl")
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
        file = self.file("lease.json")
        return int(json.loads(file.read_text())["token"]) if file else 0

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.server.ask("GET", f"/flow_runs/{self.id}")
        return found

    def result(self) -> tuple[dict[str, str], bytes]:
        """Return the digests of the finished adapter's files, and the metrics."""
        adapter, metrics = self.file("adapter/COMMITTED.json"), self.file("metrics.jsonl")
        assert adapter is not None, f"no adapter in {self.folder}"
        assert metrics is not None
        facts = json.loads(adapter.read_text())["files"]
        return {name: one["sha256"] for name, one in facts.items()}, metrics.read_bytes()
