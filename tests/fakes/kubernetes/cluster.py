"""The cluster that tests use: the double, in a thread of the tests, or a real one that the environment names.

On a real one the tests make a namespace and a persistent volume of their own and remove them at the end, so the
kubeconfig must be an administrator's.

PREFLOW_TEST_KUBECONFIG         kubeconfig of a real cluster; without it the double is started
PREFLOW_TEST_IMAGE              the train image, as the cluster pulls it
PREFLOW_TEST_WORKSPACE          folder of this machine that the cluster's nodes see, writable for uid 10001
PREFLOW_TEST_WORKSPACE_VOLUME   that folder as a volume source, in JSON: {"hostPath": {"path": "/srv/preflow-test"}}
PREFLOW_TEST_API_URL            address of these tests' Prefect server as pods reach it, http://HOST:{port}/api
PREFLOW_TEST_STEPS              optimizer steps of a training (600); worker and server start again meanwhile
"""

import asyncio
import json
import os
import subprocess
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.fakes.kubernetes.api import Api
from tests.fakes.kubernetes.store import NAMESPACE
from tests.fakes.process import ROOT

ADMIN = "admin"
CLAIM = "workspace"
WORKSPACE_VOLUME = {"name": "workspace", "persistentVolumeClaim": {"claimName": CLAIM}}


class Unavailable(Exception):
    """A fault that cannot be ordered of a real cluster."""


class DoubleCluster:
    """The double; `open` starts it."""

    is_real = False
    server_host = "127.0.0.1"
    namespace = NAMESPACE
    steps = 80

    def __init__(self, folder: Path, haste: float) -> None:
        self.haste = haste
        self.workspace = folder / "claims" / CLAIM
        self.workspace.mkdir(parents=True)
        self._folder, self._api = folder, Api(folder, haste)
        self._loop = asyncio.new_event_loop()
        self.url = ""

    @classmethod
    @contextmanager
    def open(cls, folder: Path, haste: float = 1.0) -> Iterator["DoubleCluster"]:
        """Serve the API in a thread; at the end every container is killed, and an error of the double raised.

        `haste` divides the seconds for which a Job waits between pods, and nothing else.
        """
        double = cls(folder, haste)
        thread = threading.Thread(target=double._loop.run_forever, daemon=True)
        thread.start()
        try:
            double.url = double._await(double._api.start())
            yield double
        finally:
            double._await(double._api.stop())
            double._loop.call_soon_threadsafe(double._loop.stop)
            thread.join()

    def _await(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def kubeconfig(self, user: str = ADMIN) -> Path:
        """Return a kubeconfig with a bearer token, which is the user's name."""
        context = {"cluster": "double", "user": user, "namespace": self.namespace}
        content = {
            "apiVersion": "v1", "kind": "Config", "current-context": "double",
            "clusters": [{"name": "double", "cluster": {"server": self.url}}],
            "users": [{"name": user, "user": {"token": user}}],
            "contexts": [{"name": "double", "context": context}],
        }  # fmt: skip
        file = self._folder / f"kubeconfig-{user}"
        file.write_text(yaml.safe_dump(content))
        return file

    def inside(self, path: Path) -> str:
        """Return a path of the workspace as pods see it: containers see this machine's files."""
        return str(path)

    def job_variables(self) -> dict[str, Any]:
        """Return the variables of the pool's template that this cluster needs."""
        return {"workspace_volume": WORKSPACE_VOLUME}

    def api_url(self, port: int) -> str:
        """Return the address of this machine's Prefect server as pods reach it."""
        return f"http://127.0.0.1:{port}/api"

    def _on(self, pod: str, order: Callable[[dict[str, Any]], Any]) -> Any:
        async def work() -> Any:
            return order(self._api.store.get("pods", pod))

        return self._await(work())

    def preempt(self, pod: str) -> None:
        """Announce the end of a pod's node: DisruptionTarget, SIGTERM, and 15 s."""
        self._on(pod, self._api.kubelet.preempt)

    def kill(self, pod: str) -> None:
        """SIGKILL a pod's processes."""
        self._on(pod, self._api.kubelet.kill)

    def lose_node(self, pod: str) -> None:
        """Let a pod's node vanish."""
        self._on(pod, self._api.kubelet.lose_node)

    def give_node_up(self, pod: str) -> None:
        """Delete a lost node's object."""
        self._on(pod, self._api.kubelet.give_node_up)

    def processes(self, pod: str) -> list[int]:
        """Return the pids of a pod's processes."""
        found: list[int] = self._on(pod, lambda item: self._api.kubelet.container(item).processes())
        return found

    def requests(self, user: str) -> list[dict[str, Any]]:
        """Return what a user asked of the API."""
        return [row for row in list(self._api.requests) if row["user"] == user]


class RealCluster:
    """A cluster that the environment names; its faults go through the API, and those that cannot are `Unavailable`."""

    is_real = True
    haste = 1.0
    server_host = "0.0.0.0"  # its pods must reach this machine

    def __init__(self) -> None:
        self._kubeconfig = Path(os.environ["PREFLOW_TEST_KUBECONFIG"])
        self.namespace = f"preflow-test-{uuid.uuid4().hex[:8]}"
        self.workspace = Path(os.environ["PREFLOW_TEST_WORKSPACE"])
        self.steps = int(os.environ.get("PREFLOW_TEST_STEPS", "600"))
        for item in self._objects():
            self.kubectl("create", "--filename", "-", given=json.dumps(item))

    def _objects(self) -> list[dict[str, Any]]:
        """Return a namespace as strict as the product's, and the volume, which its pods may only claim."""
        source = json.loads(os.environ["PREFLOW_TEST_WORKSPACE_VOLUME"])
        source.pop("name", None)
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
            "workspace_volume": WORKSPACE_VOLUME,
            "image": os.environ["PREFLOW_TEST_IMAGE"], "namespace": self.namespace, "service_account_name": "default",
            "gpu_count": 0, "cpu": "1", "memory": "4Gi", "ephemeral_storage": "4Gi",
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


Cluster = DoubleCluster | RealCluster
