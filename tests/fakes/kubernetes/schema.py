"""What an object must look like: Kubernetes' own schema, the rules behind it for Jobs and pods, and the defaults."""

import copy
import json
import re
from functools import cache
from importlib import resources
from typing import Any

import kubernetes_validate

from tests.fakes.kubernetes.store import JOBS, ApiError, Object, Resource

KUBERNETES = "1.33"
NAME = re.compile(r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")
LABEL = re.compile(r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")
ENVIRONMENT = re.compile(r"^[-._a-zA-Z][-._a-zA-Z0-9]*$")
ON_EXIT_CODES = {"In", "NotIn"}
ACTIONS = {"FailJob", "FailIndex", "Ignore", "Count"}


@cache
def _definitions() -> dict[str, Any]:
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{KUBERNETES}.0-local-strict"
    found: dict[str, Any] = json.loads((folder / "_definitions.json").read_text())["$defs"]
    return found


def prune(resource: Resource, item: Object) -> list[str]:
    """Take out the fields that Kubernetes does not know and the nulls, as the server does; return the fields' paths."""
    folder = {"batch": "io.k8s.api.batch.v1"}.get(resource.group, "io.k8s.api.core.v1")
    unknown: list[str] = []
    _prune(_definitions()[f"{folder}.{resource.kind}"], item, "", unknown)
    return unknown


def _prune(schema: dict[str, Any], value: Any, path: str, unknown: list[str]) -> None:
    if "$ref" in schema:
        schema = _definitions()[schema["$ref"].rsplit("/", 1)[1]]
    if isinstance(value, list):
        for number, item in enumerate(value):
            _prune(schema.get("items", {}), item, f"{path}[{number}]", unknown)
    elif isinstance(value, dict):
        known = schema.get("properties")
        for name in list(value):
            field = f"{path}.{name}".lstrip(".")
            if known is not None and name not in known:
                unknown.append(field)
                del value[name]
            elif value[name] is None:
                del value[name]
            else:
                _prune((known or {}).get(name) or schema.get("additionalProperties") or {}, value[name], field, unknown)


def check(resource: Resource, item: Object) -> None:
    """Refuse an object that the API would refuse.

    Raises:
        ApiError: 400 for a wrong type, 422 for a value or a combination that is not allowed.
    """
    try:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        path = ".".join(str(part) for part in error.absolute_path)
        if error.validator == "required":
            raise invalid(resource, item, f"{path}: {error.message}") from error
        raise ApiError(
            400, "BadRequest", f'{resource.kind} in version "v1" cannot be handled as a {resource.kind}: {path}: '
            f"{error.message}",
        ) from error  # fmt: skip
    problems = _metadata_problems(item["metadata"], "metadata")
    if resource is JOBS:
        problems += _job_problems(item["spec"])
    if resource.kind == "Pod":
        problems += _pod_problems(item["spec"], "spec")
    if problems:
        raise invalid(resource, item, *problems)


def invalid(resource: Resource, item: Object, *problems: str) -> ApiError:
    """Return a 422 that names every problem."""
    name = item["metadata"].get("name") or item["metadata"].get("generateName", "")
    text = problems[0] if len(problems) == 1 else f"[{', '.join(problems)}]"
    causes = [{"message": problem, "field": problem.split(":")[0]} for problem in problems]
    return ApiError(422, "Invalid", f'{resource.kind}{"." + resource.group if resource.group else ""} "{name}" is '
                    f"invalid: {text}", causes)  # fmt: skip


def _metadata_problems(metadata: Object, path: str) -> list[str]:
    problems = []
    name = metadata.get("name") or metadata.get("generateName", "a") + "b"
    if not NAME.match(name):
        problems.append(f"{path}.name: Invalid value: {name!r}: a lowercase RFC 1123 subdomain must consist of lower "
                        "case alphanumeric characters, '-' or '.'")  # fmt: skip
    for key, value in metadata.get("labels", {}).items():
        if not LABEL.match(value) or not LABEL.match(key.rsplit("/", 1)[-1]):
            problems.append(
                f"{path}.labels: Invalid value: {key}={value!r}: a valid label must be 63 characters or less"
            )
    return problems


def _job_problems(spec: Object) -> list[str]:
    pod = spec["template"].get("spec", {})
    problems = [
        f"spec.{field}: Invalid value: {spec[field]}: must be greater than or equal to 0"
        for field in ("backoffLimit", "parallelism", "completions", "activeDeadlineSeconds", "ttlSecondsAfterFinished")
        if spec.get(field, 0) < 0
    ]
    if pod.get("restartPolicy") not in ("Never", "OnFailure"):
        problems.append('spec.template.spec.restartPolicy: Required value: valid values: "OnFailure", "Never"')
    if "podFailurePolicy" in spec:
        problems += _policy_problems(spec, pod)
    if spec.get("podReplacementPolicy", "Failed") not in ("Failed", "TerminatingOrFailed"):
        problems.append(
            'spec.podReplacementPolicy: Unsupported value: supported values: "Failed", "TerminatingOrFailed"'
        )
    problems += _metadata_problems(spec["template"].get("metadata", {}), "spec.template.metadata")
    return problems + _pod_problems(pod, "spec.template.spec")


def _policy_problems(spec: Object, pod: Object) -> list[str]:
    problems = []
    if pod.get("restartPolicy") != "Never":
        problems.append("spec.template.spec.restartPolicy: Invalid value: only \"Never\" is supported when "
                        "podFailurePolicy is specified")  # fmt: skip
    if spec.get("podReplacementPolicy", "Failed") != "Failed":
        problems.append('spec.podReplacementPolicy: Unsupported value: only "Failed" with a podFailurePolicy')
    for number, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        path = f"spec.podFailurePolicy.rules[{number}]"
        if rule["action"] not in ACTIONS:
            problems.append(f"{path}.action: Unsupported value: {rule['action']!r}")
        if ("onExitCodes" in rule) == ("onPodConditions" in rule):
            problems.append(f"{path}: Invalid value: specifying one of OnExitCodes and OnPodConditions is required")
        if "onExitCodes" in rule and rule["onExitCodes"]["operator"] not in ON_EXIT_CODES:
            problems.append(f"{path}.onExitCodes.operator: Unsupported value")
    return problems


def _pod_problems(pod: Object, path: str) -> list[str]:
    problems = []
    names = [volume["name"] for volume in pod.get("volumes", [])]
    problems += [f"{path}.volumes: Duplicate value: {name!r}" for name in set(names) if names.count(name) > 1]
    for number, container in enumerate(pod.get("containers", [])):
        where = f"{path}.containers[{number}]"
        if not container.get("image"):
            problems.append(f"{where}.image: Required value")
        problems += [
            f"{where}.volumeMounts: Not found: {mount['name']!r}"
            for mount in container.get("volumeMounts", [])
            if mount["name"] not in names
        ]
        problems += [
            f"{where}.env.name: Invalid value: {entry['name']!r}"
            for entry in container.get("env", [])
            if not ENVIRONMENT.match(entry["name"])
        ]
    return problems


# The volumes that the standard `restricted` allows.
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


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


def fill_in(resource: Resource, item: Object) -> None:
    """Add the defaults that the API adds on creation; the uid is there already."""
    if resource is JOBS:
        _job_defaults(item)
    if resource.kind == "Pod":
        _pod_defaults(item["spec"])
        item.setdefault("status", {"phase": "Pending"})
    if resource.kind == "Secret":
        _encode(item)


def _job_defaults(job: Object) -> None:
    spec, metadata = job["spec"], job["metadata"]
    policy = "Failed" if "podFailurePolicy" in spec else "TerminatingOrFailed"
    for field, value in {
        "parallelism": 1, "completions": 1, "backoffLimit": 6, "completionMode": "NonIndexed", "suspend": False,
        "podReplacementPolicy": policy, "manualSelector": False,
    }.items():  # fmt: skip
        spec.setdefault(field, value)
    owner = {"batch.kubernetes.io/controller-uid": metadata["uid"], "batch.kubernetes.io/job-name": metadata["name"],
             "controller-uid": metadata["uid"], "job-name": metadata["name"]}  # fmt: skip
    spec["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": metadata["uid"]}}
    spec["template"].setdefault("metadata", {}).setdefault("labels", {}).update(owner)
    metadata.setdefault("labels", {})
    for rule in spec.get("podFailurePolicy", {}).get("rules", []):
        for condition in rule.get("onPodConditions", []):
            condition.setdefault("status", "True")
    _pod_defaults(spec["template"]["spec"])
    job.setdefault("status", {})


def _pod_defaults(pod: Object) -> None:
    for field, value in {
        "restartPolicy": "Always", "terminationGracePeriodSeconds": 30, "dnsPolicy": "ClusterFirst",
        "schedulerName": "default-scheduler", "securityContext": {},
    }.items():  # fmt: skip
        pod.setdefault(field, copy.copy(value))
    for container in pod["containers"]:
        for field, value in {
            "imagePullPolicy": "IfNotPresent", "resources": {}, "terminationMessagePath": "/dev/termination-log",
            "terminationMessagePolicy": "File",
        }.items():  # fmt: skip
            container.setdefault(field, copy.copy(value))


def _encode(secret: Object) -> None:
    import base64

    data = secret.setdefault("data", {})
    for key, value in secret.pop("stringData", {}).items():
        data[key] = base64.b64encode(value.encode()).decode()
    secret.setdefault("type", "Opaque")
