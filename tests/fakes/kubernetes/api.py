"""The API over HTTP.

Requests carry `Authorization: Bearer USER`; who has a role in infra/k8s/base/accounts.yaml may do what that grants and
no more, others may do all. What is asked is kept.
"""

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

from tests.fakes.kubernetes import jobs
from tests.fakes.kubernetes.kubelet import Kubelet
from tests.fakes.kubernetes.store import KINDS, NAMESPACE, ApiError, Object, Selector, Store
from tests.fakes.process import ROOT

WORKER, FLOWS = "prefect-worker", "preflow-flow"
VERBS = {"POST": "create", "DELETE": "delete"}
BOOKMARK_SECONDS = 5.0
SUCCESS = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}


@cache
def granted() -> dict[str, set[tuple[str, str, str]]]:
    """Return verb, group and resource of everything that infra/k8s/base/accounts.yaml grants, by the role's name."""
    items = yaml.safe_load_all((ROOT / "infra" / "k8s" / "base" / "accounts.yaml").read_text())
    return {
        item["metadata"]["name"]: {
            (verb, group, resource)
            for rule in item["rules"] for group in rule["apiGroups"] for resource in rule["resources"]
            for verb in rule["verbs"]
        }
        for item in items if item["kind"] == "Role"
    }  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """One request, taken apart; `what` is the resource as roles name it."""

    user: str
    verb: str
    group: str
    namespace: str
    plural: str
    name: str
    what: str
    query: dict[str, str]

    @classmethod
    def of(cls, request: web.Request) -> "Asked":
        """Read /api/v1/namespaces/NAMESPACE/PLURAL/NAME/SUBRESOURCE, or /apis/batch/v1/...

        Raises:
            ApiError: 404: there is no such path.
        """
        parts = request.path.strip("/").split("/")
        group, rest = ("", parts[2:]) if parts[0] == "api" else (parts[1], parts[3:])
        _, namespace, plural, name, subresource = [*rest, "", "", "", "", ""][:5]
        if rest == ["namespaces"]:
            raise ApiError(403, "Forbidden", "a role of one namespace cannot list namespaces at the cluster scope")
        if rest[:1] != ["namespaces"] or KINDS.get(plural, (None,))[0] != group or namespace != NAMESPACE:
            raise ApiError(404, "NotFound", f"the server could not find the requested resource {request.path}")
        user = request.headers.get("Authorization", "").removeprefix("Bearer ")
        watched = request.query.get("watch", "").lower() == "true"
        verb = VERBS.get(request.method, "get" if name else "watch" if watched else "list")
        what = f"{plural}/{subresource}".rstrip("/")
        return cls(user, verb, group, namespace, plural, name, what, dict(request.query))

    def selector(self) -> Selector:
        """Read the label selector: name or name=value, joined by commas.

        Raises:
            ApiError: 400: another selector, which this double does not know.
        """
        parts = [part for part in self.query.get("labelSelector", "").split(",") if part]
        if "fieldSelector" in self.query or any(set("!()") & set(part) for part in parts):
            raise ApiError(400, "BadRequest", f"this double does not know the selector of {self.query}")

        def check(item: Object) -> bool:
            labels = item["metadata"].get("labels", {})
            return all(part in labels or tuple(part.split("=", 1)) in labels.items() for part in parts)

        return check


class Api:
    """The API server with its controllers; `requests` is what was asked, in order."""

    def __init__(self, folder: Path, haste: float) -> None:
        self.store = Store()
        self.kubelet = Kubelet(self.store, folder)
        self.jobs = jobs.JobController(self.store, self.kubelet, haste)
        self._runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=0.5)
        self.requests: list[dict[str, Any]] = []

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=4 * 2**20)
        for path in ("/version", "/api", "/apis", "/api/v1", "/apis/batch/v1"):
            application.router.add_get(path, _discover)
        application.router.add_post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", _allow)
        application.router.add_route("*", "/{path:.*}", self._serve)
        return application

    async def start(self) -> str:
        """Serve on a free port; return the address."""
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self._controller = asyncio.create_task(self.jobs.work())
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """End everything; raises what went wrong in the double itself."""
        if self._controller.done():
            await self._controller
        self._controller.cancel()
        await self.kubelet.close()
        await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        try:
            asked = Asked.of(request)
            role = granted().get(asked.user)
            allowed = role is None or (asked.verb, asked.group, asked.what) in role
            row = {"user": asked.user, "verb": asked.verb, "group": asked.group, "resource": asked.what}
            self.requests.append({**row, "namespace": asked.namespace, "code": 200 if allowed else 403})
            if not allowed:
                raise ApiError(403, "Forbidden", f'User "{asked.user}" cannot {asked.verb} resource "{asked.what}"')
            return await self._answer(request, asked)
        except ApiError as error:
            return web.json_response(error.status, status=error.code)

    async def _answer(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        if asked.verb == "watch":
            return await self._watch(request, asked)
        if asked.verb == "list":
            items = self.store.all(asked.plural, asked.selector())
            metadata = {"resourceVersion": str(self.store.version)}
            return web.json_response({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items})
        body = await request.json() if request.can_read_body else {}
        if asked.verb == "create" and not asked.name:
            given = jobs.admit(body) if asked.plural == "jobs" else body
            return web.json_response(self.store.create(asked.plural, given), status=201)
        item = self.store.get(asked.plural, asked.name)
        match asked.what, asked.verb:
            case "pods/exec", _:
                return await self._execute(request, item)
            case "pods/eviction", "create":
                self.kubelet.evict(item, (body.get("deleteOptions") or {}).get("gracePeriodSeconds"))
                return web.json_response(SUCCESS, status=201)
            case "pods/log", "get":
                return self._read_log(asked, item)
            case "pods", "delete":
                self.kubelet.delete(item, _grace(asked, body))
            case "jobs", "delete":
                policy = body.get("propagationPolicy") or asked.query.get("propagationPolicy")
                self.jobs.delete(item, policy == "Foreground", _grace(asked, body))
        return web.json_response(item)

    async def _watch(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        selector, since = asked.selector(), int(asked.query["resourceVersion"])
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        deadline = time.monotonic() + float(asked.query.get("timeoutSeconds", 1800))
        with suppress(ConnectionResetError):
            while time.monotonic() < deadline:
                for change in self.store.since(since, asked.plural):
                    since = change.version
                    if selector(change.object):
                        event = {"type": change.type, "object": change.object}
                        await response.write(json.dumps(event).encode() + b"\n")
                await self.store.wait(BOOKMARK_SECONDS)
        return response

    async def _execute(self, request: web.Request, pod: Object) -> web.StreamResponse:
        """Run the one command that is asked for in a container: killing what runs there."""
        if request.query.getall("command") != ["sh", "-c", "kill -KILL -1"]:
            raise ApiError(400, "BadRequest", "this container has no such command")
        stream = web.WebSocketResponse(protocols=["v4.channel.k8s.io"])
        await stream.prepare(request)
        self.kubelet.kill(pod, reason="Error")
        await stream.close()
        return stream

    def _read_log(self, asked: Asked, pod: Object) -> web.Response:
        if asked.query.get("previous", "").lower() == "true":
            raise ApiError(400, "BadRequest", "previous terminated container not found")
        return web.Response(text=self.kubelet.container(pod).log.read_text(errors="replace"))


def _grace(asked: Asked, body: Object) -> float | None:
    seconds = body.get("gracePeriodSeconds", asked.query.get("gracePeriodSeconds"))
    return None if seconds is None else float(seconds)


async def _allow(request: web.Request) -> web.Response:
    return web.json_response({"spec": {}, "status": {"allowed": True}}, status=201)


async def _discover(request: web.Request) -> web.Response:
    version = {"groupVersion": "batch/v1", "version": "v1"}
    batch = {"name": "batch", "versions": [version], "preferredVersion": version}
    group = "batch" if "batch" in request.path else ""
    served = [
        {
            "name": plural, "kind": kind, "singularName": kind.lower(), "namespaced": True,
            "verbs": ["create", "delete", "get", "list", "watch"],
        }
        for plural, (where, kind) in KINDS.items() if where == group
    ]  # fmt: skip
    if not group:  # the worker's observer begins when it knows them, though it may not read them
        namespaces = {"name": "namespaces", "kind": "Namespace", "singularName": "namespace", "namespaced": False}
        served.append({**namespaces, "verbs": ["list", "watch"]})
    answers: dict[str, Object] = {
        "/version": {"major": "1", "minor": "33", "gitVersion": "v1.33.0-double"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "groups": [batch]},
    }
    resources = {"kind": "APIResourceList", "groupVersion": f"{group}/v1".lstrip("/"), "resources": served}
    return web.json_response(answers.get(request.path, resources))
