"""The cluster that tests use: the double, in a process of its own, or a real one that the environment names.

On a real one the tests make a namespace and a persistent volume of their own and remove them at the end, so the
kubeconfig must be an administrator's.

PREFLOW_TEST_KUBECONFIG         kubeconfig of a real cluster; without it the double is started
PREFLOW_TEST_IMAGE              the train image, as the cluster pulls it
PREFLOW_TEST_WORKSPACE          folder of this machine that the cluster's nodes see, writable for uid 10001
PREFLOW_TEST_WORKSPACE_VOLUME   that folder as a volume source, in JSON: {"hostPath": {"path": "/srv/preflow-test"}}
PREFLOW_TEST_API_URL            address of these tests' Prefect server as pods reach it, http://HOST:{port}/api
PREFLOW_TEST_STEPS              optimizer steps of a training (600); worker and server start again meanwhile
"""

import json
import os
import subprocess
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import httpx
import yaml

ROOT = Path(__file__).resolve().parents[3]
ADMIN = "admin"
CLAIM = "workspace"
WORKSPACE_VOLUME = {"name": "workspace", "persistentVolumeClaim": {"claimName": CLAIM}}


def kubeconfig(file: Path, server: str, user: str, namespace: str) -> Path:
    """Write a kubeconfig with a bearer token, which for the double is the user's name."""
    context = {"cluster": "double", "user": user, "namespace": namespace}
    content = {
        "apiVersion": "v1", "kind": "Config", "current-context": "double", "preferences": {},
        "clusters": [{"name": "double", "cluster": {"server": server}}],
        "users": [{"name": user, "user": {"token": user}}],
        "contexts": [{"name": "double", "context": context}],
    }  # fmt: skip
    file.write_text(yaml.safe_dump(content))
    return file


@dataclass
class FakeKubernetes:
    """A running double; `settings` are the fields of `tests.fakes.kubernetes.server.Config`.

    Use as a context manager: leaving it kills every container.
    """

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    url: str = ""
    _process: subprocess.Popen[str] | None = None

    @property
    def namespace(self) -> str:
        """The namespace that exists."""
        return str(self.settings.get("namespace", "preflow"))

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "config.json"
        config.write_text(json.dumps({"folder": str(self.folder), "root": str(ROOT), **self.settings}))
        with (self.folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fakes.kubernetes.server", "--config", str(config)],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("listening on "):
            raise RuntimeError(f"the double did not start: {(self.folder / 'server.log').read_text()}")
        self.url = line.removeprefix("listening on ").strip()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.communicate(timeout=60)

    def kubeconfig(self, user: str = ADMIN) -> Path:
        """Return a kubeconfig for a user."""
        return kubeconfig(self.folder / f"kubeconfig-{user}", self.url, user, self.namespace)

    def order(self, fault: str, **given: str | float) -> Any:
        """Order a fault, or ask for a pod's processes."""
        answer = httpx.post(f"{self.url}/_control/{fault}", params=given, timeout=30)
        assert answer.is_success, answer.text
        return answer.json()

    def requests(self, user: str) -> list[dict[str, Any]]:
        """Return what a user asked of the API, in order."""
        rows = [json.loads(line) for line in (self.folder / "requests.jsonl").read_text().splitlines()]
        return [row for row in rows if row["user"] == user]

    def errors(self) -> str:
        """Return what the double itself complained about."""
        return (self.folder / "server.log").read_text()


class Unavailable(Exception):
    """A fault that cannot be ordered of a real cluster."""


class Cluster(Protocol):
    """What the tests need of a cluster."""

    is_real: bool
    server_host: str
    namespace: str
    workspace: Path
    template: dict[str, Any]
    steps: int

    def close(self) -> None:
        """Remove what was made on the cluster."""

    def kubeconfig(self, user: str = ADMIN) -> Path:
        """Return a kubeconfig; a real cluster has one for everybody."""

    def inside(self, path: Path) -> str:
        """Return a path of the workspace as pods see it."""

    def job_variables(self) -> dict[str, Any]:
        """Return the variables of the pool's template that this cluster needs."""

    def api_url(self, port: int) -> str:
        """Return the address of this machine's Prefect server as pods reach it."""

    def preempt(self, pod: str) -> None:
        """Announce the end of a pod's node: DisruptionTarget, SIGTERM, and 15 s."""

    def kill(self, pod: str) -> None:
        """SIGKILL a pod's processes."""

    def lose_node(self, pod: str) -> None:
        """Let a pod's node vanish; raises Unavailable."""

    def give_node_up(self, pod: str) -> None:
        """Delete a lost node's object, or taint it as out of service; raises Unavailable."""

    def processes(self, pod: str) -> list[int]:
        """Return the pids of a pod's processes, as this machine counts them; raises Unavailable."""

    def requests(self, user: str) -> list[dict[str, Any]]:
        """Return what a user asked of the API; raises Unavailable."""


def job_template() -> dict[str, Any]:
    """Return the pool's base job template."""
    found: dict[str, Any] = json.loads((ROOT / "deployments" / "l4-spot.job-template.json").read_text())
    return found


class DoubleCluster:
    """The double with a spot node pool, as the tests of whole runs use it."""

    is_real = False
    server_host = "127.0.0.1"
    steps = 80

    def __init__(self, fake: FakeKubernetes) -> None:
        self._fake = fake
        self.namespace = fake.namespace
        self.workspace = fake.folder / "claims" / CLAIM
        self.workspace.mkdir(parents=True, exist_ok=True)
        self.template = job_template()

    def close(self) -> None:
        """Nothing outlives the double."""

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Return the double's settings: nodes as GKE labels them, and the worker held to its role."""
        labels = {"cloud.google.com/gke-accelerator": "nvidia-l4", "cloud.google.com/gke-spot": "true"}
        roles = {"prefect-worker": str(ROOT / "infra" / "k8s" / "base" / "accounts.yaml")}
        return {"node_labels": labels, "roles": roles, "pod_security": True}

    def kubeconfig(self, user: str = ADMIN) -> Path:
        """Return a kubeconfig for a user."""
        return self._fake.kubeconfig(user)

    def inside(self, path: Path) -> str:
        """Return the path: containers see this machine's files."""
        return str(path)

    def job_variables(self) -> dict[str, Any]:
        """Return the workspace as a volume."""
        return {"workspace_volume": WORKSPACE_VOLUME}

    def api_url(self, port: int) -> str:
        """Return the address on this machine."""
        return f"http://127.0.0.1:{port}/api"

    def preempt(self, pod: str) -> None:
        """Preempt a pod's node."""
        self._order("preempt", pod, grace=15)

    def kill(self, pod: str) -> None:
        """SIGKILL a pod's processes."""
        self._order("kill", pod)

    def lose_node(self, pod: str) -> None:
        """Take a pod's node away."""
        self._order("lose-node", pod)

    def give_node_up(self, pod: str) -> None:
        """Delete a lost node's object."""
        self._order("give-node-up", pod)

    def processes(self, pod: str) -> list[int]:
        """Return the pids of a pod's processes."""
        found: list[int] = self._order("processes", pod)
        return found

    def _order(self, fault: str, pod: str, **given: float) -> Any:
        return self._fake.order(fault, namespace=self.namespace, pod=pod, **given)

    def requests(self, user: str) -> list[dict[str, Any]]:
        """Return what a user asked of the API."""
        return self._fake.requests(user)


class RealCluster:
    """A cluster that the environment names; its faults go through the API, and those that cannot are `Unavailable`."""

    is_real = True
    server_host = "0.0.0.0"  # its pods must reach this machine

    def __init__(self) -> None:
        self._kubeconfig = Path(os.environ["PREFLOW_TEST_KUBECONFIG"])
        self.namespace = f"preflow-test-{uuid.uuid4().hex[:8]}"
        self.workspace = Path(os.environ["PREFLOW_TEST_WORKSPACE"])
        self.template = job_template()
        self.steps = int(os.environ.get("PREFLOW_TEST_STEPS", "600"))
        for item in self._objects():
            self.kubectl("create", "--filename", "-", given=json.dumps(item))

    def _objects(self) -> list[dict[str, Any]]:
        """Return a namespace as strict as the product's, and the volume, which its pods may only claim."""
        source = {key: value for key, value in json.loads(os.environ["PREFLOW_TEST_WORKSPACE_VOLUME"]).items()
                  if key != "name"}  # fmt: skip
        size, modes = {"storage": "1Gi"}, ["ReadWriteMany"]
        claim = {"accessModes": modes, "storageClassName": "", "volumeName": self.namespace,
                 "resources": {"requests": size}}  # fmt: skip
        volume = {"accessModes": modes, "storageClassName": "", "capacity": size,
                  "persistentVolumeReclaimPolicy": "Retain", **source}  # fmt: skip
        namespace = yaml.safe_load((ROOT / "infra" / "k8s" / "base" / "namespace.yaml").read_text())
        namespace["metadata"]["name"] = self.namespace
        return [
            namespace,
            {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": self.namespace}, "spec": volume},
            {
                "apiVersion": "v1", "kind": "PersistentVolumeClaim", "spec": claim,
                "metadata": {"name": CLAIM, "namespace": self.namespace},
            },
        ]  # fmt: skip

    def close(self) -> None:
        """Remove namespace and volume; the folder stays."""
        for kind in ("namespace", "persistentvolume"):
            self.kubectl("delete", kind, self.namespace, "--ignore-not-found", "--timeout=180s")

    def kubectl(self, *arguments: str, given: str | None = None) -> str:
        """Return what kubectl prints."""
        command = ["kubectl", "--kubeconfig", str(self._kubeconfig), *arguments]
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def kubeconfig(self, user: str = ADMIN) -> Path:
        """Return the one kubeconfig."""
        return self._kubeconfig

    def inside(self, path: Path) -> str:
        """Return a path below the workspace as pods see it."""
        return str(Path("/workspace") / path.relative_to(self.workspace))

    def job_variables(self) -> dict[str, Any]:
        """Return image, volume and sizes for a training of a few thousand weights."""
        return {
            "image": os.environ["PREFLOW_TEST_IMAGE"], "workspace_volume": WORKSPACE_VOLUME,
            "namespace": self.namespace, "service_account_name": "default", "gpu_count": 0, "cpu": "1",
            "memory": "4Gi", "ephemeral_storage": "4Gi",
        }  # fmt: skip

    def api_url(self, port: int) -> str:
        """Return the address that was given."""
        return os.environ["PREFLOW_TEST_API_URL"].format(port=port)

    def preempt(self, pod: str) -> None:
        """Evict a pod: marked as a disruption, with its grace."""
        body = {
            "apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": self.namespace},
            "deleteOptions": {"gracePeriodSeconds": 15},
        }  # fmt: skip
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/eviction"
        self.kubectl("create", "--raw", path, "--filename", "-", given=json.dumps(body))

    def kill(self, pod: str) -> None:
        """SIGKILL everything in a pod's container but its first process, which ends with them."""
        self.kubectl("--namespace", self.namespace, "exec", pod, "--", "sh", "-c", "kill -KILL -1")

    def lose_node(self, pod: str) -> None:
        """Refuse."""
        raise Unavailable("a node cannot be lost through the API")

    def give_node_up(self, pod: str) -> None:
        """Refuse."""
        raise Unavailable("no node was lost")

    def processes(self, pod: str) -> list[int]:
        """Refuse."""
        raise Unavailable("a real pod's processes are on another machine")

    def requests(self, user: str) -> list[dict[str, Any]]:
        """Refuse."""
        raise Unavailable("a real cluster's audit log is not at hand")
