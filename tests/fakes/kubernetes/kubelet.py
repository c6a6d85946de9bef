"""Scheduler and kubelet: what becomes of a pod from its creation to its end, and of its node."""

import asyncio
import base64
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.kubernetes.container import Container, expand
from tests.fakes.kubernetes.store import PODS, SECRETS, ApiError, Object, Store, now

LOG = logging.getLogger(__name__)
TERMINAL = ("Succeeded", "Failed")
SPOT_GRACE_SECONDS = 15.0
# A kubelet that is told a grace of 0 still sends SIGTERM and waits this long.
LEAST_GRACE_SECONDS = 2.0


@dataclass(frozen=True)
class Image:
    """What the one image of this cluster holds: the checkout, and the environment that runs these tests."""

    root: Path
    path: str = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"

    def environment(self) -> dict[str, str]:
        """Return the image's ENV."""
        return {"HOME": "/home/preflow", "PATH": self.path, "PYTHONPATH": str(self.root), "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Timing:
    """Delays in seconds; on a real cluster a node is lost after 40, its pods go after 300 more."""

    schedule: float = 0.1
    node_lost: float = 2.0


@dataclass
class Running:
    """A pod whose container was started."""

    container: Container
    folder: Path
    task: "asyncio.Task[None] | None" = None
    node_is_lost: bool = False
    termination: str = ""


@dataclass
class Kubelet:
    """All nodes of the cluster; every pod gets a node of its own, as a pod that wants the node's one GPU does.

    Args:
        store: the objects.
        folder: for logs and for the volumes of pods.
        image: what containers start from.
        labels: of every node; a pod whose nodeSelector asks for more stays Pending.
        timing: how long things take.
    """

    store: Store
    folder: Path
    image: Image
    labels: dict[str, str]
    timing: Timing
    _running: dict[str, Running] = field(default_factory=dict)
    _tasks: set["asyncio.Task[None]"] = field(default_factory=set)
    _nodes: int = 0

    def _soon(self, work: Any) -> "asyncio.Task[None]":
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            LOG.error("the kubelet failed", exc_info=task.exception())

    def change(self, pod: Object, changes: Callable[[Object], None]) -> Object | None:
        """Change the newest version of a pod; None where it is gone."""
        try:
            newest = self.store.get(PODS, pod["metadata"]["namespace"], pod["metadata"]["name"])
        except ApiError:
            return None
        if newest["metadata"]["uid"] != pod["metadata"]["uid"]:
            return None
        changes(newest)
        return self.store.update(PODS, newest)

    # Beginning.

    def accept(self, pod: Object) -> None:
        """Take a pod that was just created."""
        self._soon(self._run(pod))

    async def _run(self, pod: Object) -> None:
        await asyncio.sleep(self.timing.schedule)
        selector = pod["spec"].get("nodeSelector", {})
        if any(self.labels.get(key) != value for key, value in selector.items()):
            self.change(pod, lambda p: set_condition(p, "PodScheduled", "False", "Unschedulable",
                        "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector."))  # fmt: skip
            return
        self._nodes += 1
        node = f"spot-{self._nodes}"
        scheduled = self.change(pod, lambda p: _schedule(p, node))
        if scheduled is None or "deletionTimestamp" in scheduled["metadata"]:
            return
        try:
            environment = self._environment(scheduled)
        except ApiError as error:
            message = str(error)
            self.change(pod, lambda p: _waiting(p, "CreateContainerConfigError", message))
            return
        await self._start(scheduled, environment)

    async def _start(self, pod: Object, environment: dict[str, str]) -> None:
        container = pod["spec"]["containers"][0]
        folder = self.folder / pod["metadata"]["uid"]
        mounts = self._mounts(pod, folder)
        environment = {name: _mapped(value, mounts) for name, value in environment.items()}
        if "/tmp" in mounts:
            environment.setdefault("TMPDIR", str(mounts["/tmp"]))
        command = [expand(part, environment) for part in container.get("command", []) + container.get("args", [])]
        started = await Container.start(
            pod["metadata"]["name"], command, environment, self.image.root, folder / f"{container['name']}.log"
        )
        running = self._running[pod["metadata"]["uid"]] = Running(started, folder)
        running.task = self._soon(self._follow(pod, running))
        self.change(pod, _started)

    def _mounts(self, pod: Object, folder: Path) -> dict[str, Path]:
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        mounts = {}
        for mount in pod["spec"]["containers"][0].get("volumeMounts", []):
            claim = volumes[mount["name"]].get("persistentVolumeClaim")
            place = self.folder / "claims" / claim["claimName"] if claim else folder / "volumes" / mount["name"]
            place.mkdir(parents=True, exist_ok=True)
            mounts[mount["mountPath"]] = place
        folder.mkdir(parents=True, exist_ok=True)
        return mounts

    def _environment(self, pod: Object) -> dict[str, str]:
        container = pod["spec"]["containers"][0]
        environment = self.image.environment()
        for source in container.get("envFrom", []):
            environment |= self._secret(pod, source["secretRef"], source.get("prefix", ""))
        for entry in container.get("env", []):
            value = self._value_from(pod, entry["valueFrom"]) if "valueFrom" in entry else entry.get("value", "")
            if value is not None:
                environment[entry["name"]] = expand(value, environment)
        return environment

    def _secret(self, pod: Object, wanted: Object, prefix: str = "") -> dict[str, str]:
        try:
            secret = self.store.get(SECRETS, pod["metadata"]["namespace"], wanted["name"])
        except ApiError:
            if wanted.get("optional"):
                return {}
            raise
        return {prefix + key: base64.b64decode(value).decode() for key, value in secret.get("data", {}).items()}

    def _value_from(self, pod: Object, source: Object) -> str | None:
        if "fieldRef" in source:
            found: Any = pod
            for part in source["fieldRef"]["fieldPath"].split("."):
                found = found.get(part, "")
            return str(found)
        wanted = source["secretKeyRef"]
        value = self._secret(pod, wanted).get(wanted["key"])
        if value is None and not wanted.get("optional"):
            raise ApiError(404, "NotFound", f"couldn't find key {wanted['key']} in Secret {wanted['name']}")
        return value

    # End.

    async def _follow(self, pod: Object, running: Running) -> None:
        code = await running.container.wait()
        if running.node_is_lost:
            return
        finished = self.change(pod, lambda p: _finished(p, code, running.termination))
        if finished is not None and "deletionTimestamp" in finished["metadata"]:
            self.remove_if_free(finished)

    def remove_if_free(self, pod: Object) -> None:
        """Remove a pod that is over, was deleted, and has no finalizer left."""
        metadata = pod["metadata"]
        over = pod["status"].get("phase") in TERMINAL or metadata["uid"] not in self._running
        if "deletionTimestamp" in metadata and over and not metadata.get("finalizers"):
            self.store.delete(PODS, metadata["namespace"], metadata["name"])

    def delete(self, pod: Object, grace: float | None = None) -> Object:
        """Begin a pod's deletion: SIGTERM, SIGKILL after the grace, then the object goes."""
        seconds = pod["spec"].get("terminationGracePeriodSeconds", 30) if grace is None else grace
        if "deletionTimestamp" in pod["metadata"]:
            seconds = min(seconds, pod["metadata"]["deletionGracePeriodSeconds"])
        changed = self.change(pod, lambda p: p["metadata"].update(
            {"deletionTimestamp": p["metadata"].get("deletionTimestamp", now()), "deletionGracePeriodSeconds": seconds}
        ))  # fmt: skip
        if changed is None:
            return pod
        running = self._running.get(pod["metadata"]["uid"])
        if running is None:
            changed = self.change(pod, lambda p: p["status"].update({"phase": "Failed"})) or changed
            self.remove_if_free(changed)
        elif pod["status"]["phase"] in TERMINAL:
            self.remove_if_free(changed)
        else:
            self._soon(self._end(running, seconds))
        return changed

    async def _end(self, running: Running, grace: float) -> None:
        if running.node_is_lost:
            return
        running.container.terminate()
        if running.task is not None:
            await asyncio.wait([running.task], timeout=max(grace, LEAST_GRACE_SECONDS))
        running.container.kill()

    # Faults.

    def running(self, pod: Object) -> Running:
        """Return the container of a pod.

        Raises:
            ApiError: 404: it has none.
        """
        found = self._running.get(pod["metadata"]["uid"])
        if found is None:
            raise ApiError(404, "NotFound", f"pod {pod['metadata']['name']} has no container yet")
        return found

    def evict(self, pod: Object, grace: float | None = None, reason: str = "EvictionByEvictionAPI") -> None:
        """Delete a pod as the eviction API does: marked as a disruption first."""
        marked = self.change(pod, lambda p: set_condition(p, "DisruptionTarget", "True", reason, "evicted"))
        if marked is not None:
            self.delete(marked, grace)

    def preempt(self, pod: Object, grace: float = SPOT_GRACE_SECONDS) -> None:
        """End a pod as a kubelet does whose spot node is about to be taken away: SIGTERM, and SIGKILL 15 s later."""
        running = self.running(pod)
        running.termination = "Terminated"
        self.change(pod, lambda p: set_condition(p, "DisruptionTarget", "True", "TerminationByKubelet",
                    "Pod was terminated in response to imminent node shutdown."))  # fmt: skip
        self._soon(self._end(running, min(grace, pod["spec"].get("terminationGracePeriodSeconds", 30))))

    def kill(self, pod: Object, reason: str = "OOMKilled") -> None:
        """SIGKILL all processes of a pod, as the kernel does when memory runs out."""
        running = self.running(pod)
        running.termination = reason
        running.container.kill()

    def lose_node(self, pod: Object) -> None:
        """Take a node away without a word: its processes are gone at once, and the API learns it later."""
        running = self.running(pod)
        running.node_is_lost = True
        running.container.kill()
        self._soon(self._declare_lost(pod))

    async def _declare_lost(self, pod: Object) -> None:
        """Mark the pod for deletion; it stays Terminating until the node is given up, or comes back."""
        await asyncio.sleep(self.timing.node_lost)
        self.change(pod, lambda p: set_condition(p, "DisruptionTarget", "True", "DeletionByTaintManager",
                    "Taint manager: deleting due to NoExecute taint"))  # fmt: skip
        self.delete(pod)

    def give_node_up(self, pod: Object) -> None:
        """Fail the pod of a lost node: its Node object was deleted, or tainted as out of service."""
        failed = self.change(pod, lambda p: p["status"].update({"phase": "Failed"}))
        if failed is not None:
            self.remove_if_free(failed)

    # Reading.

    def log_of(self, pod: Object) -> Path:
        """Return the file that holds what a pod's container printed."""
        return self.running(pod).container.log

    def is_over(self, pod: Object) -> bool:
        """Tell whether a pod's container has ended."""
        task = self.running(pod).task
        return task is not None and task.done()

    def processes(self, pod: Object) -> list[int]:
        """Return the pids of a pod's processes."""
        return self.running(pod).container.processes()

    async def close(self) -> None:
        """Kill everything."""
        for running in self._running.values():
            running.container.kill()
        await asyncio.gather(*(running.task for running in self._running.values() if running.task is not None))
        for task in self._tasks:
            task.cancel()
        for running in self._running.values():
            shutil.rmtree(running.folder / "volumes", ignore_errors=True)


def set_condition(item: Object, kind: str, status: str, reason: str = "", message: str = "") -> None:
    """Set one condition of an object's status."""
    conditions = item["status"].setdefault("conditions", [])
    conditions[:] = [condition for condition in conditions if condition["type"] != kind]
    told = {"reason": reason, "message": message} if reason else {}
    conditions.append({"type": kind, "status": status, "lastTransitionTime": now(), **told})


def has_condition(item: Object, kind: str) -> bool:
    """Tell whether a condition is True."""
    conditions = item.get("status", {}).get("conditions", [])
    return any(condition["type"] == kind and condition["status"] == "True" for condition in conditions)


def _mapped(value: str, mounts: dict[str, Path]) -> str:
    return str(mounts[value]) if value in mounts else value


def _container_status(pod: Object, state: Object, ready: bool) -> Object:
    container = pod["spec"]["containers"][0]
    return {
        "name": container["name"], "image": container["image"], "imageID": "", "restartCount": 0, "ready": ready,
        "started": "running" in state, "state": state, "lastState": {},
    }  # fmt: skip


def _schedule(pod: Object, node: str) -> None:
    pod["spec"]["nodeName"] = node
    set_condition(pod, "PodScheduled", "True")
    set_condition(pod, "Initialized", "True")
    _waiting(pod, "ContainerCreating", "")


def _waiting(pod: Object, reason: str, message: str) -> None:
    state = {"waiting": {"reason": reason, **({"message": message} if message else {})}}
    pod["status"]["containerStatuses"] = [_container_status(pod, state, ready=False)]


def _started(pod: Object) -> None:
    status = pod["status"]
    if status["phase"] in TERMINAL:
        return
    status |= {"phase": "Running", "startTime": now(), "podIP": "10.0.0.1", "hostIP": "10.0.0.2"}
    status["containerStatuses"] = [_container_status(pod, {"running": {"startedAt": now()}}, ready=True)]
    set_condition(pod, "Ready", "True")
    set_condition(pod, "ContainersReady", "True")


def _finished(pod: Object, code: int, termination: str) -> None:
    status = pod["status"]
    shut_down = termination == "Terminated"
    reason = termination if termination == "OOMKilled" else ("Completed" if code == 0 else "Error")
    started = status.get("startTime", now())
    terminated = {"exitCode": code, "reason": reason, "startedAt": started, "finishedAt": now()}
    status["phase"] = "Succeeded" if code == 0 and not shut_down else "Failed"
    status["containerStatuses"] = [_container_status(pod, {"terminated": terminated}, ready=False)]
    if shut_down:
        status |= {"reason": "Terminated", "message": "Pod was terminated in response to imminent node shutdown."}
    set_condition(pod, "Ready", "False", "PodCompleted" if code == 0 else "PodFailed")
    set_condition(pod, "ContainersReady", "False", "PodCompleted" if code == 0 else "PodFailed")
