"""The double for tests: served from a thread of theirs, with what they look at and the faults that they order."""

import asyncio
import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tests.fakes.kubernetes.api import Api
from tests.fakes.kubernetes.store import NAMESPACE, Object

T = TypeVar("T")
CLAIM = "workspace"
JOB_VARIABLES = {"workspace_volume": {"name": "workspace", "persistentVolumeClaim": {"claimName": CLAIM}}}


class Cluster:
    """The double; `open` starts it, and `haste` divides the seconds for which a Job waits between pods."""

    namespace = NAMESPACE

    def __init__(self, folder: Path, haste: float) -> None:
        self.haste = haste
        self.workspace = folder / "claims" / CLAIM
        self.workspace.mkdir(parents=True)
        self._folder, self._api, self._loop = folder, Api(folder, haste), asyncio.new_event_loop()
        self._url = ""

    @classmethod
    @contextmanager
    def open(cls, folder: Path, haste: float = 1.0) -> Iterator["Cluster"]:
        """Serve the API; at the end every container is killed, and an error of the double raised."""
        double = cls(folder, haste)
        thread = threading.Thread(target=double._loop.run_forever, daemon=True)
        thread.start()
        try:
            double._url = asyncio.run_coroutine_threadsafe(double._api.start(), double._loop).result(60)
            yield double
        finally:
            asyncio.run_coroutine_threadsafe(double._api.stop(), double._loop).result(60)
            double._loop.call_soon_threadsafe(double._loop.stop)
            thread.join()

    def kubeconfig(self, user: str = "admin") -> Path:
        """Return a kubeconfig with a bearer token, which is the user's name."""
        context = {"cluster": "double", "user": user, "namespace": self.namespace}
        content = {
            "apiVersion": "v1", "kind": "Config", "current-context": "double",
            "clusters": [{"name": "double", "cluster": {"server": self._url}}],
            "users": [{"name": user, "user": {"token": user}}],
            "contexts": [{"name": "double", "context": context}],
        }  # fmt: skip
        file = self._folder / f"kubeconfig-{user}"
        file.write_text(yaml.safe_dump(content))
        return file

    def _there(self, work: Callable[[Api], T]) -> T:
        """Do something in the double's own thread."""

        async def do() -> T:
            return work(self._api)

        return asyncio.run_coroutine_threadsafe(do(), self._loop).result(60)

    def create(self, plural: str, item: Object) -> None:
        """Add an object, as an administrator does."""
        self._there(lambda api: api.store.create(plural, item))

    def items(self, plural: str, run: str) -> list[Object]:
        """Return the Jobs or pods of a flow run, as they are now."""
        return self._there(lambda api: copy.deepcopy(api.store.all(plural, _of_run(run))))

    def running_pod(self, run: str) -> str:
        """Return the name of the one pod of a run that is running and not on its way out."""
        (name,) = [
            pod["metadata"]["name"]
            for pod in self.items("pods", run)
            if pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]
        ]
        return str(name)

    def order(self, fault: str, pod: str) -> None:
        """Have a fault of the kubelet befall a pod: preempt, kill, lose_node or give_node_up."""
        self._there(lambda api: getattr(api.kubelet, fault)(api.store.get("pods", pod)))

    def delete_job(self, run: str) -> None:
        """Delete a run's Job, as somebody does with kubectl."""
        self._there(lambda api: api.jobs.delete(api.store.all("jobs", _of_run(run))[0], False, None))

    def processes(self, pod: str) -> list[int]:
        return self._there(lambda api: api.kubelet.container(api.store.get("pods", pod)).processes())

    def requests(self, user: str) -> list[dict[str, Any]]:
        return [row for row in list(self._api.requests) if row["user"] == user]


def _of_run(run: str) -> Callable[[Object], bool]:
    return lambda item: item["metadata"].get("labels", {}).get("prefect.io/flow-run-id") == run
