"""The Job controller as of 1.33, for Jobs of one pod at a time, and what a Job and its pods must look like."""

import time
from typing import Any

import kubernetes_validate

from tests.fakes.kubernetes.kubelet import TERMINAL, Kubelet
from tests.fakes.kubernetes.store import ApiError, Object, Store, has_condition, now, set_condition

KUBERNETES = "1.33"
TICK_SECONDS = 0.2
BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 10.0, 600.0
ENDS = ("Complete", "Failed")
# The volumes that the standard `restricted` allows.
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


class JobController:
    """Makes pods for Jobs, counts how they end, and ends the Jobs."""

    def __init__(self, store: Store, kubelet: Kubelet, haste: float) -> None:
        self._store, self._kubelet, self._haste = store, kubelet, haste
        self._ended: dict[str, int] = {}
        self._not_before: dict[str, float] = {}
        kubelet.count = self._count

    async def work(self) -> None:
        """Look at all Jobs at every change, and at least five times a second."""
        while True:
            for job in self._store.all("jobs"):
                with self._store.changing("jobs", job):
                    self._sync(job)
            await self._store.wait(TICK_SECONDS)

    def _sync(self, job: Object) -> None:
        pods = self._pods(job)
        if "deletionTimestamp" in job["metadata"]:
            if not pods:
                self._store.delete("jobs", job)
            return
        if any(has_condition(job, kind) for kind in ENDS):
            return
        status = job["status"]
        status.setdefault("startTime", now())
        alive = [pod for pod in pods if pod["status"]["phase"] not in TERMINAL]
        if status.get("succeeded"):
            self._finish(job, alive, "SuccessCriteriaMet", "Complete", "CompletionsReached")
        elif status.get("failed", 0) > job["spec"]["backoffLimit"]:
            self._finish(job, alive, "FailureTarget", "Failed", "BackoffLimitExceeded")
        elif not alive and time.monotonic() >= self._not_before.get(job["metadata"]["uid"], 0.0):
            alive = self._create_pod(job)
        status["active"] = len([pod for pod in alive if "deletionTimestamp" not in pod["metadata"]])
        status["terminating"] = len(alive) - status["active"]

    def _pods(self, job: Object) -> list[Object]:
        uid = job["metadata"]["uid"]
        return self._store.all("pods", lambda pod: pod["metadata"]["ownerReferences"][0]["uid"] == uid)

    def _count(self, pod: Object) -> None:
        """Count a pod that has ended, and decide when the next one may come."""
        owner = pod["metadata"]["ownerReferences"][0]
        job = self._store.find("jobs", owner["name"])
        if job is None:
            return
        with self._store.changing("jobs", job):
            if pod["status"]["phase"] == "Succeeded":
                job["status"]["succeeded"] = 1
                return
            ended = self._ended[owner["uid"]] = self._ended.get(owner["uid"], 0) + 1
            self._not_before[owner["uid"]] = time.monotonic() + backoff_seconds(ended) / self._haste
            if not is_ignored(job, pod):
                job["status"]["failed"] = job["status"].get("failed", 0) + 1

    def _finish(self, job: Object, alive: list[Object], first: str, last: str, reason: str) -> None:
        """Set the first condition at once, and the last one when no pod is left: so since 1.31."""
        if not has_condition(job, first):
            set_condition(job, first, reason)
        for pod in alive:
            if "deletionTimestamp" not in pod["metadata"]:
                self._kubelet.delete(pod)
        if not alive:
            set_condition(job, last, reason)
            if last == "Complete":
                job["status"]["completionTime"] = now()

    def _create_pod(self, job: Object) -> list[Object]:
        metadata, template = job["metadata"], job["spec"]["template"]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": metadata["name"], "uid": metadata["uid"]}
        labels = {**template["metadata"].get("labels", {}), "job-name": metadata["name"]}
        about = {"generateName": metadata["name"] + "-", "labels": labels, "ownerReferences": [owner]}
        pod = self._store.create("pods", {"metadata": about, "spec": template["spec"], "status": {"phase": "Pending"}})
        self._kubelet.accept(pod)
        return [pod]

    def delete(self, job: Object, foreground: bool, grace: float | None) -> None:
        """Delete a Job with its pods; in the foreground they go first."""
        for pod in self._pods(job):
            self._kubelet.delete(pod, grace)
        if foreground:
            with self._store.changing("jobs", job):
                job["metadata"]["deletionTimestamp"] = now()
        else:
            self._store.delete("jobs", job)


def backoff_seconds(ended: int) -> float:
    """Return how long a Job waits before it replaces a pod, after so many have ended other than well."""
    return min(LONGEST_BACKOFF_SECONDS, BACKOFF_SECONDS * 2.0 ** (ended - 1))


def is_ignored(job: Object, pod: Object) -> bool:
    """Tell whether the Job's podFailurePolicy ignores how a pod ended."""
    rules = job["spec"].get("podFailurePolicy", {}).get("rules", [])
    wanted = [item["type"] for rule in rules if rule["action"] == "Ignore" for item in rule["onPodConditions"]]
    return any(has_condition(pod, kind) for kind in wanted)


def admit(job: Object) -> Object:
    """Return a Job as the API takes it, with its defaults.

    Raises:
        ApiError: 400 for a wrong type, 422 for a combination that is not allowed.
    """
    job = _without_nulls({"kind": "Job", "apiVersion": "batch/v1", **job})
    try:
        kubernetes_validate.validate(job, KUBERNETES)
    except kubernetes_validate.ValidationError as error:
        raise ApiError(400, "BadRequest", f"Job cannot be handled as a Job: {error.message}") from error
    spec = job["spec"]
    if spec["template"]["spec"].get("restartPolicy") != "Never":
        raise ApiError(422, "Invalid", "spec.template.spec.restartPolicy: only Never, with a podFailurePolicy")
    if spec.get("podReplacementPolicy", "Failed") != "Failed":
        raise ApiError(422, "Invalid", "spec.podReplacementPolicy: only Failed, with a podFailurePolicy")
    if (spec.get("parallelism", 1), spec.get("completions", 1)) != (1, 1):
        raise ApiError(422, "Invalid", "this double has Jobs of one pod only")
    spec.setdefault("backoffLimit", 6)
    job["status"] = {}
    return job


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def pod_security_problems(pod: Object) -> list[str]:
    """Return what the standard `restricted` forbids of a pod."""
    security = pod.get("securityContext", {})
    problems = [
        f"restricted volume types (volume {volume['name']!r} uses {kind!r})"
        for volume in pod.get("volumes", []) for kind in volume if kind not in VOLUMES | {"name"}
    ]  # fmt: skip
    for container in pod["containers"]:
        name, own = container["name"], container.get("securityContext", {})
        merged = {**security, **own}
        if own.get("allowPrivilegeEscalation") is not False:
            problems.append(f"allowPrivilegeEscalation != false (container {name!r})")
        if own.get("capabilities", {}).get("drop") != ["ALL"]:
            problems.append(f"unrestricted capabilities (container {name!r})")
        if merged.get("runAsNonRoot") is not True:
            problems.append(f"runAsNonRoot != true (container {name!r})")
        if merged.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            problems.append(f"seccompProfile (container {name!r})")
    return problems
