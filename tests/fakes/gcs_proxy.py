"""A fault-injecting reverse proxy before fake-gcs-server, and what that lacks of Google Cloud Storage.

Start it with `python -m tests.fakes.gcs_proxy --upstream URL --plan plan.json --log requests.jsonl`.

Preconditions (ifGenerationMatch) are fake-gcs-server's own. Added here: an upload whose declared crc32c is not its
content's is refused, as the real one does; and an upload of many parts is one request to the log.
"""

import argparse
import asyncio
import base64
import json
import os
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote

import aiohttp
import google_crc32c
from aiohttp import web
from yarl import URL

from tests.fakes.gcs_plan import GcsPlan

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-encoding", "content-length", "host", "date"}
REFUSALS = {
    "unavailable": (503, "backendError"), "error_500": (500, "internalError"), "rate_limit": (429, "rateLimitExceeded"),
}  # fmt: skip


class Cut(Exception):
    """The connection is to be broken here."""


@dataclass
class Call:
    """One request, as the plan and the log see it.

    `operation` is upload, download, stat, list, delete, bucket or other; `name` the object's or the listed prefix.
    """

    method: str
    path: str
    query: dict[str, list[str]]
    body: bytes = b""
    fault: str | None = None
    status: int = 0
    sent: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def operation(self) -> str:
        """What the request is about."""
        if self.path.startswith("/upload/"):
            return "upload"
        if "/o/" in self.path:
            if self.method == "DELETE":
                return "delete"
            return "download" if self.path.startswith("/download/") or self.query.get("alt") == ["media"] else "stat"
        if self.path.endswith("/o"):
            return "list"
        return "bucket" if re.search(r"/b/?[^/]*$", self.path) else "other"

    @property
    def name(self) -> str:
        """The object or prefix that the request is about."""
        if self.operation == "list":
            return self.query.get("prefix", [""])[0]
        if self.operation != "upload":
            return unquote(self.path.partition("/o/")[2])
        if named := self.query.get("name"):
            return named[0]
        found = re.search(rb'"name": ?"((?:[^"\\]|\\.)*)"', self.body)
        return str(json.loads(b'"' + found.group(1) + b'"')) if found else ""

    @property
    def is_conditional(self) -> bool:
        """Tell whether it is to succeed only at a certain generation."""
        return "ifGenerationMatch" in self.query


class Proxy:
    """Passes requests on, or lets them fail as the plan says."""

    def __init__(self, upstream: str, plan: GcsPlan, log: Path, origin: str) -> None:
        self._upstream, self._plan, self._origin = upstream, plan, origin
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._attempts: Counter[tuple[str, str]] = Counter()
        self._in_a_row: Counter[tuple[str, str]] = Counter()
        self._session: aiohttp.ClientSession | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        call = Call(request.method, request.rel_url.raw_path, parse_qs(request.query_string, keep_blank_values=True))
        await asyncio.sleep(self._plan.latency_ms / 1000)
        try:
            return await self._answer(request, call)
        except Cut:
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=499)
        finally:
            self._note(call)

    async def _answer(self, request: web.Request, call: Call) -> web.StreamResponse:
        length = int(request.headers.get("content-length") or 0)
        if call.query.get("name") or call.operation != "upload":
            call.fault = self._draw(call)
        if call.fault == "cut_upload":
            await self._cut_upload(request, call, length)
        call.body = await request.read()
        if call.operation == "upload" and not call.query.get("name"):
            call.fault = self._draw(call)
        call.sent = len(call.body)
        if call.fault == "cut_upload":
            raise Cut
        if refusal := self._refuse(call):
            return refusal
        return await self._forward(request, call)

    async def _cut_upload(self, request: web.Request, call: Call, length: int) -> None:
        if length > 1:
            call.sent = len(await request.content.readexactly(length // 2))
        raise Cut

    def _draw(self, call: Call) -> str | None:
        key = (call.operation, call.name)
        fault = self._plan.fault(call.operation, call.name, self._attempts[key], self._in_a_row[key])
        self._attempts[key] += 1
        self._in_a_row[key] = self._in_a_row[key] + 1 if fault else 0
        return fault

    def _refuse(self, call: Call) -> web.Response | None:
        if call.fault in REFUSALS:
            status, reason = REFUSALS[call.fault]
            return refuse(call, status, reason, {"Retry-After": str(self._plan.retry_after)} if status == 429 else None)
        if call.operation == "upload" and not declared_crc32c_holds(call.body):
            return refuse(call, 400, "invalid: Provided CRC32C doesn't match calculated CRC32C")
        return None

    async def _forward(self, request: web.Request, call: Call) -> web.StreamResponse:
        if self._session is None:
            self._session = aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(total=120))
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        if call.fault == "slow":
            await asyncio.sleep(self._plan.slow_seconds)
        url = URL(self._upstream + request.rel_url.raw_path_qs, encoded=True)
        async with self._session.request(call.method, url, data=call.body, headers=headers) as reply:
            content = await reply.read()
            call.status = reply.status
            kept = [(name, value) for name, value in reply.headers.items() if name.lower() not in HOP_BY_HOP]
        kept = [(name, value.replace(self._upstream, self._origin)) for name, value in kept]
        if call.fault == "lost_reply":
            raise Cut
        if call.fault == "cut_download":
            return await self._cut_download(request, call, content, kept)
        return web.Response(status=call.status, body=content, headers=kept)

    async def _cut_download(
        self, request: web.Request, call: Call, content: bytes, headers: list[tuple[str, str]]
    ) -> web.StreamResponse:
        reply = web.StreamResponse(status=call.status, headers=headers)
        reply.content_length = len(content)
        await reply.prepare(request)
        await reply.write(content[: len(content) // 2])
        raise Cut

    def _note(self, call: Call) -> None:
        row = {
            "time": time.time(),
            "method": call.method,
            "operation": call.operation,
            "name": call.name,
            "status": 0 if call.fault in ("cut_upload", "lost_reply") else call.status,
            "fault": call.fault,
            "conditional": call.is_conditional,
            "bytes": call.sent,
            "seconds": round(time.monotonic() - call.started, 4),
        }
        os.write(self._log, json.dumps(row).encode() + b"\n")


def refuse(call: Call, status: int, reason: str, headers: dict[str, str] | None = None) -> web.Response:
    """Return an error in the form of the JSON API."""
    call.status = status
    errors = [{"domain": "global", "reason": reason, "message": reason}]
    return web.json_response(
        {"error": {"code": status, "message": reason, "errors": errors}}, status=status, headers=headers
    )


def declared_crc32c_holds(body: bytes) -> bool:
    """Tell whether the content of a multipart upload has the crc32c that its metadata declare, if they do."""
    found = re.match(rb"(--[^\r\n]+)\r\n[^{]*({.*?})\r\n\1\r\n", body, re.DOTALL)
    if found is None or "crc32c" not in json.loads(found.group(2)):
        return True
    content = body[found.end() : body.rindex(b"\r\n" + found.group(1))].partition(b"\r\n\r\n")[2]
    digest = google_crc32c.Checksum(content).digest()
    return bool(json.loads(found.group(2))["crc32c"] == base64.b64encode(digest).decode())


def main() -> None:
    """Read the command line and serve, until the process is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    arguments = parser.parse_args()
    plan = GcsPlan.model_validate_json(arguments.plan.read_bytes())
    proxy = Proxy(arguments.upstream, plan, arguments.log, f"http://127.0.0.1:{arguments.port}")
    app = web.Application(client_max_size=2**31)
    app.router.add_route("*", "/{path:.*}", proxy.handle)
    web.run_app(app, host="127.0.0.1", port=arguments.port, access_log=None, print=None, handle_signals=False)


if __name__ == "__main__":
    main()
