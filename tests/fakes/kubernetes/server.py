"""The API over HTTP: `python -m tests.fakes.kubernetes.server --config FILE` prints `listening on URL`.

Requests carry `Authorization: Bearer USER`; a user with a role may do what the role grants and no more. What is asked
goes to a log, one JSON object a line. Faults are ordered under /_control, which is no part of Kubernetes.
"""

import argparse
import asyncio
import json
import logging
import re
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

from tests.fakes.kubernetes import schema
from tests.fakes.kubernetes.jobs import Backoff, JobController
from tests.fakes.kubernetes.kubelet import Image, Kubelet, Timing
from tests.fakes.kubernetes.store import (
    JOBS,
    NAMESPACES,
    PODS,
    RESOURCES,
    ApiError,
    Change,
    Object,
    Resource,
    Selector,
    Store,
    now,
)  # fmt: skip

BOOKMARK_SECONDS = 5.0
VERBS = {"POST": "create", "DELETE": "delete"}


@dataclass(frozen=True)
class Config:
    """Settings of the double.

    Args:
        folder: for logs and volumes; requests are logged in its requests.jsonl.
        root: the checkout, which is the working directory of every container.
        namespace: one that exists.
        node_labels: of every node.
        roles: user name to a file of manifests with the ServiceAccount's Role of that name; other users may do all.
        backoff_seconds: delay after a Job's first failed pod.
        pod_security: whether the namespace enforces the standard `restricted`.
        timing: fields of `kubelet.Timing`.
    """

    folder: str
    root: str
    namespace: str = "preflow"
    node_labels: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    backoff_seconds: float = 10.0
    pod_security: bool = False
    timing: dict[str, float] = field(default_factory=dict)


def rules_of(file: Path, name: str) -> list[Object]:
    """Return the rules of the Role `name` in a file of manifests."""
    for item in yaml.safe_load_all(file.read_text()):
        if item and item["kind"] == "Role" and item["metadata"]["name"] == name:
            rules: list[Object] = item["rules"]
            return rules
    raise SystemExit(f"{file}: no Role {name}")


def grants(rules: list[Object], verb: str, group: str, resource: str) -> bool:
    """Tell whether one of the rules allows a verb on a resource or subresource."""
    return any(group in rule["apiGroups"] and resource in rule["resources"] and verb in rule["verbs"] for rule in rules)


@dataclass
class Asked:
    """One request, taken apart."""

    user: str
    verb: str
    resource: Resource
    namespace: str
    name: str
    subresource: str

    @property
    def what(self) -> str:
        """The resource as roles name it."""
        return f"{self.resource.plural}/{self.subresource}" if self.subresource else self.resource.plural


def is_set(request: web.Request, name: str) -> bool:
    """Read a flag of the query; clients write it in more than one way."""
    return request.query.get(name, "").lower() in ("true", "t", "1")


def take_apart(request: web.Request) -> Asked:
    """Read verb, resource and names from a request.

    Raises:
        ApiError: 404, there is no such path.
    """
    parts = [part for part in request.path.split("/") if part]
    group = "" if parts[0] == "api" else parts[1]
    rest = parts[2:] if parts[0] == "api" else parts[3:]
    namespace = ""
    if len(rest) > 2 and rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    found = [resource for resource in RESOURCES if rest and (resource.group, resource.plural) == (group, rest[0])]
    if not found:
        raise ApiError(404, "NotFound", "the server could not find the requested resource")
    name, subresource = [*rest, "", ""][1:3]
    if subresource and subresource not in found[0].subresources:
        raise ApiError(404, "NotFound", "the server could not find the requested resource")
    watch = is_set(request, "watch")
    verb = VERBS.get(request.method, "get" if name else "watch" if watch else "list")
    if request.method == "DELETE" and not name:
        raise ApiError(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
    user = request.headers.get("Authorization", "").removeprefix("Bearer ")
    return Asked(user, verb, found[0], namespace, name, subresource)


def label_selector(text: str) -> Selector:
    """Read a label selector: name, !name, name=value, name!=value, name in (a,b), joined by commas.

    Raises:
        ApiError: 400.
    """
    checks: list[Callable[[dict[str, str]], bool]] = []
    for part in _split(text):
        name, sign, value = (part, "", "")
        for candidate in ("!=", "==", "=", " in ", " notin "):
            if candidate in part:
                name, sign, value = (*part.partition(candidate)[:1], candidate, part.partition(candidate)[2])
                break
        checks.append(_check_of(name.strip(), sign.strip(), value.strip()))
    return lambda item: all(check(item["metadata"].get("labels", {})) for check in checks)


def _split(text: str) -> list[str]:
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def _check_of(name: str, sign: str, value: str) -> Callable[[dict[str, str]], bool]:
    values = [part.strip() for part in value.strip("()").split(",")]
    if sign in ("=", "==", "in"):
        return lambda labels: labels.get(name) in values
    if sign in ("!=", "notin"):
        return lambda labels: labels.get(name) not in values
    if name.startswith("!"):
        return lambda labels: name[1:] not in labels
    return lambda labels: name in labels


def field_selector(text: str) -> Selector:
    """Read a field selector of the form path=value, joined by commas.

    Raises:
        ApiError: 400: not one of the fields that the API supports.
    """
    wanted = dict(part.split("=", 1) for part in text.replace("==", "=").split(",") if part)
    unknown = set(wanted) - {"metadata.name", "metadata.namespace", "status.phase", "spec.nodeName"}
    if unknown:
        raise ApiError(400, "BadRequest", f"field label not supported: {', '.join(unknown)}")

    def check(item: Object) -> bool:
        return all(item.get(path.split(".")[0], {}).get(path.split(".")[1]) == value for path, value in wanted.items())

    return check


class Api:
    """The API server with its controllers."""

    def __init__(self, config: Config) -> None:
        folder = Path(config.folder)
        self.store = Store()
        self.kubelet = Kubelet(
            self.store, folder, Image(Path(config.root)), config.node_labels, Timing(**config.timing)
        )
        self._jobs = JobController(self.store, self.kubelet, Backoff(config.backoff_seconds), config.pod_security)
        self._rules = {user: rules_of(Path(file), user) for user, file in config.roles.items()}
        self._log = (folder / "requests.jsonl").open("a", buffering=1)
        self.store.create(NAMESPACES, "", {"metadata": {"name": config.namespace}, "status": {"phase": "Active"}})
        self._controller: asyncio.Task[None] | None = None

    def application(self) -> web.Application:
        """Return the routes."""
        application = web.Application(client_max_size=4 * 2**20)
        application.router.add_post("/_control/{fault}", self._control)
        application.router.add_get("/_control/{fault}", self._control)
        application.router.add_get("/version", self._discover)
        application.router.add_get("/healthz", self._discover)
        for path in ("/api", "/apis", "/api/v1", "/apis/batch/v1"):
            application.router.add_get(path, self._discover)
        application.router.add_route("*", "/{path:(api|apis)/.*}", self._serve)
        application.on_startup.append(self._start)
        application.on_cleanup.append(self._stop)
        return application

    async def _start(self, _: web.Application) -> None:
        self._controller = asyncio.create_task(self._jobs.work())
        self._controller.add_done_callback(_complain)

    async def _stop(self, _: web.Application) -> None:
        if self._controller is not None:
            self._controller.cancel()
        await self.kubelet.close()

    # Requests.

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        asked = None
        try:
            asked = take_apart(request)
            self._authorize(asked)
            self._note(asked, 200)
            return await self._answer(request, asked)
        except ApiError as error:
            if asked is not None:
                self._note(asked, error.code)
            return web.json_response(error.status, status=error.code)

    def _authorize(self, asked: Asked) -> None:
        rules = self._rules.get(asked.user)
        if not asked.user:
            raise ApiError(401, "Unauthorized", "Unauthorized")
        if rules is not None and not (asked.namespace and grants(rules, asked.verb, asked.resource.group, asked.what)):
            raise ApiError(
                403, "Forbidden", f'{asked.resource.name} is forbidden: User "{asked.user}" cannot {asked.verb} '
                f'resource "{asked.what}" in API group "{asked.resource.group}" in the namespace "{asked.namespace}"',
            )  # fmt: skip

    def _note(self, asked: Asked, code: int) -> None:
        row = {"time": time.time(), "user": asked.user, "verb": asked.verb, "group": asked.resource.group,
               "resource": asked.what, "namespace": asked.namespace, "name": asked.name, "code": code}  # fmt: skip
        self._log.write(json.dumps(row) + "\n")

    async def _answer(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        if asked.what == "pods/log":
            return await self._send_log(request, asked)
        if asked.what == "pods/exec":
            return await self._execute(request, asked)
        if asked.verb == "watch":
            return await self._watch(request, asked)
        answers: dict[str, Callable[[web.Request, Asked], Awaitable[web.Response]]] = {
            "list": self._list, "get": self._get, "create": self._create, "delete": self._delete,
        }  # fmt: skip
        return await answers[asked.verb](request, asked)

    async def _get(self, request: web.Request, asked: Asked) -> web.Response:
        return web.json_response(self.store.get(asked.resource, asked.namespace, asked.name))

    async def _list(self, request: web.Request, asked: Asked) -> web.Response:
        items = self.store.all(asked.resource, asked.namespace, self._selector(request))
        metadata = {"resourceVersion": str(self.store.version)}
        page = [{key: value for key, value in item.items() if key not in ("kind", "apiVersion")} for item in items]
        kind = asked.resource.kind + "List"
        return web.json_response(
            {"kind": kind, "apiVersion": asked.resource.api_version, "metadata": metadata, "items": page}
        )

    @staticmethod
    def _selector(request: web.Request) -> Selector:
        labels = label_selector(request.query.get("labelSelector", ""))
        fields = field_selector(request.query.get("fieldSelector", ""))
        return lambda item: labels(item) and fields(item)

    async def _create(self, request: web.Request, asked: Asked) -> web.Response:
        given = await self._body(request)
        if asked.what == "pods/eviction":
            grace = (given.get("deleteOptions") or {}).get("gracePeriodSeconds")
            self.kubelet.evict(
                self.store.get(PODS, asked.namespace, asked.name), None if grace is None else float(grace)
            )
            success = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}
            return web.json_response(success, status=201)
        if asked.resource.namespaced:
            self.store.get(NAMESPACES, "", asked.namespace)
        warnings = self._admit(request, asked, given)
        created = self.store.create(
            asked.resource, asked.namespace, given, lambda item: schema.fill_in(asked.resource, item)
        )
        if asked.resource is PODS:
            self.kubelet.accept(created)
        return web.json_response(created, status=201, headers=warnings)

    @staticmethod
    async def _body(request: web.Request) -> Object:
        try:
            body = await request.json()
        except ValueError as error:
            raise ApiError(400, "BadRequest", f"the body is no JSON: {error}") from error
        if not isinstance(body, dict):
            raise ApiError(400, "BadRequest", "the body is no object")
        return body

    @staticmethod
    def _admit(request: web.Request, asked: Asked, given: Object) -> dict[str, str]:
        """Check an object, take out unknown fields, and return the warnings about them as headers."""
        for name, value in (("kind", asked.resource.kind), ("apiVersion", asked.resource.api_version)):
            if given.setdefault(name, value) != value:
                raise ApiError(400, "BadRequest", f"the object has {name} {given[name]}, the address says {value}")
        if given.setdefault("metadata", {}).get("namespace") not in (None, asked.namespace):
            raise ApiError(400, "BadRequest", "the namespace of the provided object does not match the namespace sent "
                           "on the request")  # fmt: skip
        for name in ("uid", "resourceVersion", "creationTimestamp", "generation", "managedFields"):
            given["metadata"].pop(name, None)
        given.pop("status", None)
        unknown = [f'unknown field "{path}"' for path in schema.prune(asked.resource, given)]
        if unknown and request.query.get("fieldValidation") == "Strict":
            raise ApiError(400, "BadRequest", f"strict decoding error: {', '.join(unknown)}")
        schema.check(asked.resource, given)
        return {"Warning": ", ".join(f"299 - {json.dumps(text)}" for text in unknown)} if unknown else {}

    async def _delete(self, request: web.Request, asked: Asked) -> web.Response:
        item = self.store.get(asked.resource, asked.namespace, asked.name)
        options = json.loads(await request.text() or "{}") or {}
        grace = options.get("gracePeriodSeconds", request.query.get("gracePeriodSeconds"))
        policy = options.get("propagationPolicy", request.query.get("propagationPolicy", "Background"))
        if asked.resource is PODS:
            return web.json_response(self.kubelet.delete(item, None if grace is None else float(grace)))
        if asked.resource is JOBS:
            return web.json_response(self._delete_job(item, policy))
        self.store.delete(asked.resource, asked.namespace, asked.name)
        return web.json_response({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})

    def _delete_job(self, job: Object, policy: str) -> Object:
        job["metadata"]["deletionTimestamp"] = now()
        if policy == "Foreground":
            job["metadata"]["finalizers"] = ["foregroundDeletion"]
        return self.store.update(JOBS, job)

    # Streams.

    async def _watch(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        selector, query = self._selector(request), request.query
        seconds = float(query.get("timeoutSeconds", 1800))
        since, initial = self._beginning(query.get("resourceVersion", ""), asked, selector)
        response = await _open_stream(request, "application/json")
        watch = Watch(self.store, asked, selector, since, response)
        deadline = time.monotonic() + seconds
        with suppress(ConnectionResetError):
            await watch.send_initial(initial, is_set(request, "sendInitialEvents"))
            while time.monotonic() < deadline and await watch.send_changes():
                await self.store.wait(min(BOOKMARK_SECONDS, deadline - time.monotonic()))
                if is_set(request, "allowWatchBookmarks"):
                    await watch.send_bookmark()
        return response

    def _beginning(self, version: str, asked: Asked, selector: Selector) -> tuple[int, list[Object]]:
        if version in ("", "0"):
            return self.store.version, self.store.all(asked.resource, asked.namespace, selector)
        self.store.since(int(version), asked.resource, asked.namespace)
        return int(version), []

    async def _execute(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        """Run the one command that is asked for in a container: killing what runs there."""
        if request.query.getall("command") != ["sh", "-c", "kill -KILL -1"]:
            raise ApiError(400, "BadRequest", "this container has no such command")
        stream = web.WebSocketResponse(protocols=["v4.channel.k8s.io"])
        await stream.prepare(request)
        self.kubelet.kill(self.store.get(PODS, asked.namespace, asked.name), reason="Error")
        await stream.close()
        return stream

    async def _send_log(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        pod = self.store.get(PODS, asked.namespace, asked.name)
        container = pod["spec"]["containers"][0]["name"]
        try:
            log = self.kubelet.log_of(pod)
        except ApiError:
            raise ApiError(
                400, "BadRequest", f'container "{container}" in pod "{asked.name}" is waiting to start'
            ) from None
        text = log.read_bytes()
        position = len(text)
        response = await _open_stream(request, "text/plain")
        if text:  # an empty chunk would end the stream
            await response.write(text)
        if is_set(request, "follow"):
            await self._follow_log(response, log, pod, position)
        return response

    async def _follow_log(self, response: web.StreamResponse, log: Path, pod: Object, position: int) -> None:
        over = False
        with suppress(ConnectionResetError):
            while not over:
                over = self.kubelet.is_over(pod)
                text = log.read_bytes()[position:]
                position += len(text)
                if text:
                    await response.write(text)
                await asyncio.sleep(0.1)

    # What is there, and what goes wrong.

    async def _discover(self, request: web.Request) -> web.StreamResponse:
        answers: dict[str, Object] = {
            "/healthz": {},
            "/version": {"major": "1", "minor": "33", "gitVersion": "v1.33.0-double"},
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group("batch")]},
        }
        if request.path in answers:
            return web.json_response(answers[request.path])
        group = "batch" if "batch" in request.path else ""
        version = "batch/v1" if group else "v1"
        return web.json_response(
            {"kind": "APIResourceList", "groupVersion": version, "resources": list(_served(group))}
        )

    async def _control(self, request: web.Request) -> web.Response:
        """Order a fault: preempt, kill, lose-node, give-node-up; or read the pids of a pod: processes."""
        given = dict(request.query)
        fault = request.match_info["fault"]
        try:
            return web.json_response(self._on_pod(fault, given))
        except ApiError as error:
            return web.json_response(error.status, status=error.code)

    def _on_pod(self, fault: str, given: dict[str, str]) -> Any:
        pod = self.store.get(PODS, given["namespace"], given["pod"])
        if fault == "processes":
            return self.kubelet.processes(pod)
        if fault == "preempt":
            self.kubelet.preempt(pod, float(given.get("grace", 15)))
        elif fault == "kill":
            self.kubelet.kill(pod)
        elif fault == "lose-node":
            self.kubelet.lose_node(pod)
        elif fault == "give-node-up":
            self.kubelet.give_node_up(pod)
        else:
            raise ApiError(404, "NotFound", f"no such fault: {fault}")
        return {}


@dataclass
class Watch:
    """One client's stream of events; `since` is the version it has seen."""

    store: Store
    asked: Asked
    selector: Selector
    since: int
    response: web.StreamResponse

    async def send_initial(self, items: list[Object], bookmark: bool) -> None:
        """Send what is there, and a bookmark that says so where that was asked for."""
        for item in items:
            await self._send("ADDED", item)
        if bookmark:
            await self.send_bookmark({"k8s.io/initial-events-end": "true"})

    async def send_changes(self) -> bool:
        """Send what is new; tell whether the watch can go on."""
        try:
            changes = self.store.since(self.since, self.asked.resource, self.asked.namespace)
        except ApiError as error:
            await self._send("ERROR", error.status)
            return False
        for change in changes:
            kind = self._kind(change)
            if kind is not None:
                await self._send(kind, change.object)
            self.since = change.version
        return True

    def _kind(self, change: Change) -> str | None:
        """Return the event as this watch's selector sees it: what stops to fit is gone, what begins to fit is new."""
        was = change.before is not None and self.selector(change.before)
        fits = change.type != "DELETED" and self.selector(change.object)
        return {(True, True): "MODIFIED", (True, False): "DELETED", (False, True): "ADDED"}.get((was, fits))

    async def send_bookmark(self, annotations: dict[str, str] | None = None) -> None:
        """Tell the client which version it has seen."""
        resource = self.asked.resource
        metadata: Object = {"resourceVersion": str(self.since), "creationTimestamp": None}
        if annotations:
            metadata["annotations"] = annotations
        await self._send("BOOKMARK", {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata})

    async def _send(self, kind: str, item: Object) -> None:
        await self.response.write(json.dumps({"type": kind, "object": item}).encode() + b"\n")


async def _open_stream(request: web.Request, kind: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": kind})
    response.enable_chunked_encoding()
    await response.prepare(request)
    return response


def _group(name: str) -> Object:
    version = {"groupVersion": f"{name}/v1", "version": "v1"}
    return {"name": name, "versions": [version], "preferredVersion": version}


def _served(group: str) -> list[Object]:
    found = []
    for resource in RESOURCES:
        if resource.group != group:
            continue
        verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
        entry: Object = {
            "singularName": resource.kind.lower(),
            "namespaced": resource.namespaced,
            "kind": resource.kind,
        }
        found.append({**entry, "name": resource.plural, "verbs": verbs})
        found += [{**entry, "name": f"{resource.plural}/{name}", "verbs": ["get"]} for name in resource.subresources]
    return found


def _complain(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and task.exception() is not None:
        logging.error("the Job controller failed", exc_info=task.exception())


async def serve(config: Config, port: int) -> None:
    """Serve until SIGTERM, or the end of standard input."""
    runner = web.AppRunner(Api(config).application(), access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    print(f"listening on http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    asyncio.get_running_loop().add_reader(0, stop.set)  # standard input ends with the tests, however they end
    await stop.wait()
    asyncio.get_running_loop().remove_reader(0)
    await runner.cleanup()


def main() -> None:
    """Read the settings and serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(serve(Config(**json.loads(arguments.config.read_text())), arguments.port))


if __name__ == "__main__":
    main()
