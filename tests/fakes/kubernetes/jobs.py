"""The Job controller as of 1.33, the TTL controller, and the garbage collector."""

import copy
import logging
import time
from dataclasses import dataclass, field

from tests.fakes.kubernetes.kubelet import TERMINAL, Kubelet, has_condition, set_condition
from tests.fakes.kubernetes.schema import pod_security_problems
from tests.fakes.kubernetes.store import JOBS, PODS, SECRETS, ApiError, Object, Store, now, seconds_since

LOG = logging.getLogger(__name__)
TRACKING = "batch.kubernetes.io/job-tracking"
TICK_SECONDS = 0.2


@dataclass
class Backoff:
    """When a Job may start its next pod: `base` seconds after the first failure, then twice as long, and so on."""

    base: float
    most: float = 600.0
    _failures: dict[str, int] = field(default_factory=dict)
    _not_before: dict[str, float] = field(default_factory=dict)

    def failed(self, uid: str) -> None:
        """Note a failed pod of a Job."""
        count = self._failures[uid] = self._failures.get(uid, 0) + 1
        self._not_before[uid] = time.monotonic() + min(self.most, self.base * 2 ** (count - 1))

    def is_over(self, uid: str) -> bool:
        """Tell whether a Job has waited long enough."""
        return time.monotonic() >= self._not_before.get(uid, 0.0)


@dataclass
class JobController:
    """Makes pods for Jobs, counts how they end, and ends the Jobs.

    Args:
        backoff: 10 s on a real cluster.
    """

    store: Store
    kubelet: Kubelet
    backoff: Backoff
    pod_security: bool = False

    async def work(self) -> None:
        """Look at all Jobs at every change, and at least five times a second."""
        while True:
            for job in self.store.all(JOBS):
                try:
                    self._sync(job)
                except ApiError as error:
                    LOG.info("a Job changed under the controller, which looks again: %s", error)
            self._collect_garbage()
            await self.store.wait(TICK_SECONDS)

    def _sync(self, job: Object) -> None:
        before = copy.deepcopy(job)
        pods = self._pods(job)
        if "deletionTimestamp" in job["metadata"]:
            self._delete(job, pods)
            return
        if _is_over(job):
            self._account(job, pods)
            self._expire(job)
            return
        job["status"].setdefault("startTime", now())
        self._account(job, pods)
        self._end_or_go_on(job, self._pods(job))
        if job != before:
            self.store.update(JOBS, job)

    def _pods(self, job: Object) -> list[Object]:
        uid = job["metadata"]["uid"]
        return [
            pod for pod in self.store.all(PODS, job["metadata"]["namespace"])
            if any(owner["uid"] == uid for owner in pod["metadata"].get("ownerReferences", []))
        ]  # fmt: skip

    def _account(self, job: Object, pods: list[Object]) -> None:
        """Count every pod that has ended once: its finalizer says that it was not counted yet."""
        status = job["status"]
        for pod in pods:
            if TRACKING not in pod["metadata"].get("finalizers", []) or not _counts_as_ended(job, pod):
                continue
            if pod["status"]["phase"] == "Succeeded":
                status["succeeded"] = status.get("succeeded", 0) + 1
            else:
                self._account_failure(job, pod)
            self._release(pod)

    def _account_failure(self, job: Object, pod: Object) -> None:
        action, message = pod_failure_action(job, pod)
        if _is_over(job):
            return
        self.backoff.failed(job["metadata"]["uid"])
        if action == "Ignore":
            return
        job["status"]["failed"] = job["status"].get("failed", 0) + 1
        if action == "FailJob":
            set_condition(job, "FailureTarget", "True", "PodFailurePolicy", message)

    def _release(self, pod: Object) -> None:
        freed = self.kubelet.change(pod, lambda p: p["metadata"].update({"finalizers": [
            name for name in p["metadata"].get("finalizers", []) if name != TRACKING]}))  # fmt: skip
        if freed is not None:
            self.kubelet.remove_if_free(freed)

    def _end_or_go_on(self, job: Object, pods: list[Object]) -> None:
        spec, status = job["spec"], job["status"]
        alive = [pod for pod in pods if pod["status"].get("phase") not in TERMINAL]
        active = [pod for pod in alive if "deletionTimestamp" not in pod["metadata"]]
        if status.get("succeeded", 0) >= spec["completions"]:
            self._finish(job, active, alive, "SuccessCriteriaMet", "Complete", "CompletionsReached",
                         "Reached expected number of succeeded pods")  # fmt: skip
        elif has_condition(job, "FailureTarget") or self._must_fail(job):
            target = next(item for item in status["conditions"] if item["type"] == "FailureTarget")
            self._finish(job, active, alive, "FailureTarget", "Failed", target["reason"], target["message"])
        else:
            occupied = alive if spec["podReplacementPolicy"] == "Failed" else active
            missing = min(spec["parallelism"], spec["completions"] - status.get("succeeded", 0)) - len(occupied)
            if missing > 0 and not spec["suspend"] and self.backoff.is_over(job["metadata"]["uid"]):
                active += [self._create_pod(job) for _ in range(missing)]
        _set_counts(status, active, alive)

    def _must_fail(self, job: Object) -> bool:
        spec, status = job["spec"], job["status"]
        if status.get("failed", 0) > spec["backoffLimit"]:
            set_condition(job, "FailureTarget", "True", "BackoffLimitExceeded",
                          "Job has reached the specified backoff limit")  # fmt: skip
        elif seconds_since(status["startTime"]) >= spec.get("activeDeadlineSeconds", float("inf")):
            set_condition(
                job, "FailureTarget", "True", "DeadlineExceeded", "Job was active longer than specified deadline"
            )
        return has_condition(job, "FailureTarget")

    def _finish(
        self, job: Object, active: list[Object], alive: list[Object], first: str, last: str, reason: str, message: str
    ) -> None:
        """Set the first condition at once, and the last one when no pod is left: so since 1.31."""
        if not has_condition(job, first):
            set_condition(job, first, "True", reason, message)
        for pod in active:
            self.kubelet.delete(pod)
        active.clear()
        if not alive:
            set_condition(job, last, "True", reason, message)
            if last == "Complete":
                job["status"]["completionTime"] = now()

    def _create_pod(self, job: Object) -> Object:
        metadata, template = job["metadata"], copy.deepcopy(job["spec"]["template"])
        owner = {
            "apiVersion": "batch/v1", "kind": "Job", "name": metadata["name"], "uid": metadata["uid"],
            "controller": True, "blockOwnerDeletion": True,
        }  # fmt: skip
        pod = {
            "metadata": {
                **template.get("metadata", {}), "generateName": metadata["name"] + "-", "ownerReferences": [owner],
                "finalizers": [TRACKING],
            },
            "spec": template["spec"],
            "status": {"phase": "Pending", "qosClass": "BestEffort"},
        }  # fmt: skip
        problems = pod_security_problems(pod["spec"]) if self.pod_security else []
        if problems:
            raise ApiError(
                403, "Forbidden", f'pods "{metadata["name"]}" is forbidden: violates PodSecurity "restricted:latest": '
                + ", ".join(problems),
            )  # fmt: skip
        created = self.store.create(PODS, metadata["namespace"], pod)
        self.kubelet.accept(created)
        return created

    def _delete(self, job: Object, pods: list[Object]) -> None:
        """Go on deleting a Job: in the foreground its pods go first."""
        metadata = job["metadata"]
        for pod in pods:
            self._release(pod)
        left = self._pods(job)
        for pod in left:
            if "deletionTimestamp" not in pod["metadata"]:
                self.kubelet.delete(pod, metadata.get("deletionGracePeriodSeconds"))
        if not left or "foregroundDeletion" not in metadata.get("finalizers", []):
            self.store.delete(JOBS, metadata["namespace"], metadata["name"])

    def _expire(self, job: Object) -> None:
        ttl = job["spec"].get("ttlSecondsAfterFinished")
        ended = next(item["lastTransitionTime"] for item in job["status"]["conditions"] if item["type"] in ENDS)
        if ttl is not None and seconds_since(ended) >= ttl:
            job["metadata"] |= {"deletionTimestamp": now(), "finalizers": ["foregroundDeletion"]}
            self.store.update(JOBS, job)

    def _collect_garbage(self) -> None:
        """Delete what belongs to a Job that is gone."""
        living = {job["metadata"]["uid"] for job in self.store.all(JOBS)}
        for resource in (PODS, SECRETS):
            for item in self.store.all(resource):
                owners = item["metadata"].get("ownerReferences", [])
                if owners and not any(owner["uid"] in living for owner in owners):
                    self._collect(item)

    def _collect(self, item: Object) -> None:
        metadata = item["metadata"]
        if item["kind"] == "Secret":
            self.store.delete(SECRETS, metadata["namespace"], metadata["name"])
            return
        self._release(item)
        if "deletionTimestamp" not in metadata:
            self.kubelet.delete(item)


ENDS = ("Complete", "Failed")


def _is_over(job: Object) -> bool:
    return any(has_condition(job, kind) for kind in ENDS)


def _counts_as_ended(job: Object, pod: Object) -> bool:
    if pod["status"].get("phase") in TERMINAL:
        return True
    return "deletionTimestamp" in pod["metadata"] and job["spec"]["podReplacementPolicy"] == "TerminatingOrFailed"


def _set_counts(status: Object, active: list[Object], alive: list[Object]) -> None:
    ready = [pod for pod in active if has_condition(pod, "Ready")]
    status |= {"active": len(active), "ready": len(ready), "terminating": len(alive) - len(active)}
    if not active:
        del status["active"]
    status["terminating"] = max(0, status["terminating"])
    status.setdefault("uncountedTerminatedPods", {})


def pod_failure_action(job: Object, pod: Object) -> tuple[str, str]:
    """Return what the Job's podFailurePolicy says of a failed pod, and a message: the first rule that fits decides."""
    for number, rule in enumerate(job["spec"].get("podFailurePolicy", {}).get("rules", [])):
        if _fits(rule, pod):
            name = pod["metadata"]["name"]
            return rule[
                "action"
            ], f"Pod {pod['metadata']['namespace']}/{name} matching {rule['action']} rule at index {number}"
    return "Count", ""


def _fits(rule: Object, pod: Object) -> bool:
    conditions = {(item["type"], item["status"]) for item in pod["status"].get("conditions", [])}
    if "onPodConditions" in rule:
        return any((wanted["type"], wanted["status"]) in conditions for wanted in rule["onPodConditions"])
    wanted = rule["onExitCodes"]
    for status in pod["status"].get("containerStatuses", []):
        code = status["state"].get("terminated", {}).get("exitCode", 0)
        if wanted.get("containerName", status["name"]) == status["name"] and code != 0:
            return bool((code in wanted["values"]) == (wanted["operator"] == "In"))
    return False
