"""Scheduler and kubelet: what becomes of a pod from its creation to its end, and of its node.

A container is a set of processes of this machine in a pid namespace of their own: nobody inside sees the processes of
another pod, and with the first process all the others die at once. It sees this machine's files; what a pod mounts at
/tmp and at its home folder is a folder of the pod's own, named in TMPDIR and HOME.
"""

import asyncio
import base64
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from tests.fakes.kubernetes.store import ApiError, Object, Store, now, set_condition
from tests.fakes.process import ROOT

TERMINAL = ("Succeeded", "Failed")
SCHEDULE_SECONDS = 0.1
# A kubelet that is told a grace of 0 still sends SIGTERM and waits this long.
LEAST_GRACE_SECONDS = 2.0
# On a real cluster 40 s until a node is seen as lost, and 300 more until its pods are marked for deletion.
NODE_LOST_SECONDS = 2.0
# The one image of this cluster: the checkout, and the environment that runs these tests.
IMAGE = {
    "HOME": "/home/preflow", "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
    "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1",
}  # fmt: skip
# The first process, as tini is in the images: passes SIGTERM on to its one child and to nobody else.
INIT = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: child.terminate())
child = subprocess.Popen(sys.argv[1:])
code = child.wait()
sys.exit(code if code >= 0 else 128 - code)
"""


@cache
def isolation() -> list[str]:
    """Return the command that gives a process its own pid namespace; empty where this machine does not allow it."""
    tied = ["setpriv", "--pdeathsig", "KILL"]  # no container outlives the double, however that ends
    for user in ([], ["--user", "--map-root-user"]):
        command = [*tied, "unshare", *user, "--pid", "--fork", "--kill-child", "--mount-proc"]
        with suppress(FileNotFoundError):
            if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
                return command
    return []


class Container:
    """One running container, and how it came to its end."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log, self.reason, self.node_is_lost = log, "", False
        self._killed = False
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*isolation(), sys.executable, "-S", "-E", "-c", INIT, *command], env=dict(environment), cwd=ROOT,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    async def wait(self) -> int:
        """Return the exit status as Kubernetes tells it: 128 and the signal's number where a signal ended it."""
        while (code := self._process.poll()) is None:  # noqa: ASYNC110  a process sets no event
            await asyncio.sleep(0.05)
        return 128 + signal.SIGKILL if self._killed else code

    def terminate(self) -> None:
        self._signal_first(signal.SIGTERM)

    def kill(self) -> None:
        if self.is_running:
            self._killed = True
            self._signal_first(signal.SIGKILL)

    def _signal_first(self, number: int) -> None:
        with suppress(OSError):
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
            for first in children.split():
                os.kill(int(first), number)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def processes(self) -> list[int]:
        with suppress(psutil.NoSuchProcess):
            return [process.pid for process in psutil.Process(self._process.pid).children(recursive=True)]
        return []


class Kubelet:
    """All nodes of the cluster; every pod gets a node of its own, as a pod that wants the node's one GPU does."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store, self._folder = store, folder
        self._containers: dict[str, Container] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.count: Callable[[Object], None] = lambda _: None  # the Job controller's: told of every pod that ends

    def _soon(self, work: Any) -> None:
        self._tasks.append(asyncio.create_task(work))

    def _changing(self, pod: Object) -> Any:
        return self._store.changing("pods", pod)

    def accept(self, pod: Object) -> None:
        self._soon(self._run(pod))

    async def _run(self, pod: Object) -> None:
        await asyncio.sleep(SCHEDULE_SECONDS)
        if "deletionTimestamp" in pod["metadata"]:
            return
        with self._changing(pod):
            pod["spec"]["nodeName"] = f"spot-{len(self._containers) + 1}"
            try:
                container = self._containers[pod["metadata"]["uid"]] = self._start(pod)
            except ApiError as error:
                _set_state(pod, {"waiting": {"reason": "CreateContainerConfigError", "message": str(error)}})
                return
            pod["status"] |= {"phase": "Running", "startTime": now()}
            _set_state(pod, {"running": {"startedAt": now()}})
        code = await container.wait()
        if not container.node_is_lost:
            self._finish(pod, code, container.reason)

    def _start(self, pod: Object) -> Container:
        (spec,) = pod["spec"]["containers"]
        folder = self._folder / pod["metadata"]["uid"]
        mounts = self._mounts(pod, folder)
        environment = self._environment(pod) | {"HOSTNAME": pod["metadata"]["name"]}
        environment = {name: mounts.get(value, value) for name, value in environment.items()}
        if "/tmp" in mounts:
            environment["TMPDIR"] = mounts["/tmp"]
        words = spec.get("command", []) + spec.get("args", [])
        return Container([_expand(word, environment) for word in words], environment, folder / "log")

    def _mounts(self, pod: Object, folder: Path) -> dict[str, str]:
        folder.mkdir(parents=True)
        claims = {
            volume["name"]: volume.get("persistentVolumeClaim", {}).get("claimName")
            for volume in pod["spec"].get("volumes", [])
        }
        mounts = {}
        for mount in pod["spec"]["containers"][0].get("volumeMounts", []):
            claim = claims[mount["name"]]
            place = self._folder / "claims" / claim if claim else folder / "volumes" / mount["name"]
            place.mkdir(parents=True, exist_ok=True)
            mounts[mount["mountPath"]] = str(place)
        return mounts

    def _environment(self, pod: Object) -> dict[str, str]:
        (container,) = pod["spec"]["containers"]
        environment = dict(IMAGE)
        for source in container.get("envFrom", []):
            environment |= self._secret(source["secretRef"])
        for entry in container.get("env", []):
            value = self._value_from(pod, entry["valueFrom"]) if "valueFrom" in entry else entry.get("value", "")
            environment[entry["name"]] = _expand(value, environment)
        return environment

    def _value_from(self, pod: Object, source: Object) -> str:
        if "fieldRef" in source:
            part, _, name = source["fieldRef"]["fieldPath"].partition(".")
            return str(pod[part][name])
        return self._secret(source["secretKeyRef"])[source["secretKeyRef"]["key"]]

    def _secret(self, wanted: Object) -> dict[str, str]:
        if wanted.get("optional") and self._store.find("secrets", wanted["name"]) is None:
            return {}
        data = self._store.get("secrets", wanted["name"]).get("data", {})
        return {key: base64.b64decode(value).decode() for key, value in data.items()}

    def _finish(self, pod: Object, code: int, reason: str = "") -> None:
        with self._changing(pod):
            pod["status"]["phase"] = "Succeeded" if code == 0 and not reason else "Failed"
            reason = reason or ("Completed" if code == 0 else "Error")
            _set_state(pod, {"terminated": {"exitCode": code, "reason": reason, "finishedAt": now()}})
        self.count(pod)
        self._remove_if_over(pod)

    def _remove_if_over(self, pod: Object) -> None:
        there = self._store.find("pods", pod["metadata"]["name"]) is pod
        if there and "deletionTimestamp" in pod["metadata"] and pod["status"]["phase"] in TERMINAL:
            self._store.delete("pods", pod)

    def delete(self, pod: Object, grace: float | None = None) -> None:
        """Begin a pod's deletion: SIGTERM, SIGKILL after the grace, then the object goes; never with its node lost."""
        seconds = pod["spec"].get("terminationGracePeriodSeconds", 30) if grace is None else grace
        with self._changing(pod):
            pod["metadata"].setdefault("deletionTimestamp", now())
            pod["metadata"]["deletionGracePeriodSeconds"] = seconds
        container = self._containers.get(pod["metadata"]["uid"])
        if container is None:
            self._finish(pod, 128 + signal.SIGKILL)
        elif not container.node_is_lost:
            self._soon(self._end(container, seconds))
        self._remove_if_over(pod)

    async def _end(self, container: Container, grace: float) -> None:
        container.terminate()
        with suppress(TimeoutError):
            await asyncio.wait_for(container.wait(), max(grace, LEAST_GRACE_SECONDS))
        container.kill()

    # Faults.

    def evict(self, pod: Object, grace: float | None) -> None:
        """Delete a pod as the eviction API does: marked as a disruption first."""
        with self._changing(pod):
            set_condition(pod, "DisruptionTarget", "EvictionByEvictionAPI", "evicted")
        self.delete(pod, grace)

    def preempt(self, pod: Object, grace: float = 15.0) -> None:
        """End a pod as a kubelet does whose spot node is about to be taken away; the object stays."""
        container = self.container(pod)
        container.reason = "Terminated"
        with self._changing(pod):
            set_condition(pod, "DisruptionTarget", "TerminationByKubelet", "imminent node shutdown")
        self._soon(self._end(container, grace))

    def kill(self, pod: Object, reason: str = "OOMKilled") -> None:
        """SIGKILL all processes of a pod, as the kernel does when memory runs out."""
        container = self.container(pod)
        container.reason = reason
        container.kill()

    def lose_node(self, pod: Object) -> None:
        """Take a node away without a word: its processes are gone at once, and the API learns it later."""
        container = self.container(pod)
        container.node_is_lost = True
        container.kill()
        self._soon(self._declare_lost(pod))

    async def _declare_lost(self, pod: Object) -> None:
        await asyncio.sleep(NODE_LOST_SECONDS)
        with self._changing(pod):
            set_condition(pod, "DisruptionTarget", "DeletionByTaintManager", "deleting due to NoExecute taint")
        self.delete(pod)

    def give_node_up(self, pod: Object) -> None:
        """Fail the pod of a lost node: its Node object was deleted, or tainted as out of service."""
        self._finish(pod, 128 + signal.SIGKILL)

    def container(self, pod: Object) -> Container:
        """Return the container of a pod.

        Raises:
            ApiError: 400: it has none.
        """
        found = self._containers.get(pod["metadata"]["uid"])
        if found is None:
            raise ApiError(400, "BadRequest", f"the container in pod {pod['metadata']['name']} is waiting to start")
        return found

    async def close(self) -> None:
        """Kill everything; raises what went wrong in the double itself."""
        for container in self._containers.values():
            container.kill()
            await container.wait()
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        for volumes in self._folder.glob("*/volumes"):
            shutil.rmtree(volumes, ignore_errors=True)
        for result in results:
            if isinstance(result, Exception):
                raise result


def _set_state(pod: Object, state: Object) -> None:
    (container,) = pod["spec"]["containers"]
    pod["status"]["containerStatuses"] = [
        {
            "name": container["name"], "image": container["image"], "imageID": "", "restartCount": 0,
            "ready": "running" in state, "state": state,
        }
    ]  # fmt: skip


def _expand(text: str, known: Mapping[str, str]) -> str:
    """Replace $(NAME) as Kubernetes does: an unknown name stays as it is."""
    return re.sub(r"\$\(([-._a-zA-Z][-._a-zA-Z0-9]*)\)", lambda found: known.get(found[1], found[0]), text)
