"""A Hugging Face hub over HTTP, as its own client calls it: repositories, preupload, large files, commits; with faults.

Each status in `faults` is the answer to one request whose path holds the key, in order, before any is answered well.
"""

import base64
import hashlib
import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import yaml
from aiohttp import web

from tests.fakes.http import served

BLOB = "/blob/"


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: [hashlib.sha1(b"root").hexdigest()])


class FakeHub:
    """A running hub that knows one token; use as a context manager."""

    def __init__(self, token: str, owners: tuple[str, ...] = ("lab",)) -> None:
        self.token, self.owners = token, owners
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: dict[str, list[int]] = {}
        self.lost = 0  # commits that are made, and answered with a 504
        self.asked: list[tuple[str, str]] = []
        self.url = ""

    def __enter__(self) -> Self:
        application = web.Application(client_max_size=1 << 28)
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._open = ExitStack()
        self.url = self._open.enter_context(served(application))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    async def _handle(self, request: web.Request) -> web.Response:
        self.asked.append((request.method, request.path))
        status, value = self._decide(request, await request.read())
        return web.json_response(value, status=status)

    def _decide(self, request: web.Request, body: bytes) -> tuple[int, Any]:
        for part, statuses in self.faults.items():
            if part in request.path and statuses:
                return statuses.pop(0), {"error": "fault"}
        if request.path.startswith(BLOB):  # a signed address: no token
            oid = request.path.removeprefix(BLOB)
            if hashlib.sha256(body).hexdigest() != oid:
                return 400, {"error": "digest"}
            self.blobs[oid] = body
            return 200, {}
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        return self._route(request.method, request.path, body)

    def _route(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return _check_yaml(json.loads(body)["content"])
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._object(file) for file in json.loads(body)["objects"]]}
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        repo = self.repos.get(name)
        if repo is None:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            return 200, {"files": [_upload_mode(repo, file["path"]) for file in json.loads(body)["files"]]}
        if "/commit/" in path:
            return self._commit(repo, name, body)
        if method == "GET" and path.startswith("/api/models/"):
            return 200, {"id": name, "sha": repo.commits[-1], "private": repo.private, "siblings": []}
        return 404, {"error": f"no such call: {method} {path}"}

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] not in self.owners:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        address = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repos:
            return 409, {"error": "You already created this model repo", **address}
        private = wanted.get("private") is True or wanted.get("visibility") == "private"
        self.repos[name] = Repo(private=private)
        return 200, address

    def _object(self, file: dict[str, Any]) -> dict[str, Any]:
        upload = {"actions": {"upload": {"href": f"{self.url}{BLOB}{file['oid']}"}}}
        return {"oid": file["oid"], "size": file["size"], **({} if file["oid"] in self.blobs else upload)}

    def _commit(self, repo: Repo, name: str, body: bytes) -> tuple[int, Any]:
        files = {}
        for item in map(json.loads, body.splitlines()):
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.blobs:
                    return 400, {"error": f"LFS pointer pointed to a file that does not exist: {value['path']}"}
                files[value["path"]] = self.blobs[value["oid"]]
        oid = hashlib.sha1(body).hexdigest()
        repo.files |= files
        repo.commits.append(oid)
        if self.lost:
            self.lost -= 1
            return 504, {"error": "lost"}
        url = f"{self.url}/{name}/commit/{oid}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}


def _upload_mode(repo: Repo, path: str) -> dict[str, Any]:
    large, known = path.endswith(".safetensors"), repo.files.get(path)
    entry = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
    if known is None:
        return entry
    git = hashlib.sha1(b"blob %d\0" % len(known) + known)
    return {**entry, "oid": hashlib.sha256(known).hexdigest() if large else git.hexdigest()}


def _check_yaml(content: str) -> tuple[int, Any]:
    front = content.split("---\n")[1] if content.startswith("---\n") else ""
    try:
        found = yaml.safe_load(front)
    except yaml.YAMLError as error:
        return 400, {"errors": [{"message": str(error)}], "warnings": []}
    if not isinstance(found, dict):
        return 400, {"errors": [{"message": "no metadata"}], "warnings": []}
    return 200, {"errors": [], "warnings": []}
