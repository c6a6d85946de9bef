"""A judge behind a batch API: answers late, in another order, in part, or not at all; it outlives its clients."""

import json
import random
import time
from contextlib import ExitStack
from typing import Any, Self

from aiohttp import web

from tests.fakes.http import served
from tests.fakes.models import verdict

Body = dict[str, Any]


class FakeBatches:
    """A running endpoint; use as a context manager.

    A batch is answered after `late` seconds; a share of its lines is `lost` (it has `expired` then), another `failed`
    with a 500. `refused` is why batches fail as a whole; `swallow` so many answers to the creation of one get lost.
    """

    def __init__(
        self, late: float = 0.3, lost: float = 0.0, failed: float = 0.0, refused: str = "", swallow: int = 0,
        has_batches: bool = True,
    ) -> None:  # fmt: skip
        self.late, self.lost, self.failed, self.refused, self.swallow = late, lost, failed, refused, swallow
        self._has_batches = has_batches
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, Body] = {}
        self.asked: list[str] = []  # custom ids of all batches
        self.direct = self.pages = 0  # chat requests; batches that are yet to be shown as a page
        self.loud = False  # whether it says COMPLETED
        self.url = ""

    def __enter__(self) -> Self:
        application = web.Application(client_max_size=1 << 28)
        application.router.add_get("/v1/models", self._models)
        application.router.add_post("/v1/chat/completions", self._chat)
        if self._has_batches:
            application.router.add_post("/v1/files", self._upload)
            application.router.add_get("/v1/files/{file}/content", self._download)
            application.router.add_post("/v1/batches", self._create)
            application.router.add_get("/v1/batches", self._list)
            application.router.add_get("/v1/batches/{batch}", self._retrieve)
        self._open = ExitStack()
        self.url = f"{self._open.enter_context(served(application))}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "judge-hash", "object": "model"}]})

    async def _chat(self, request: web.Request) -> web.Response:
        self.direct += 1
        return web.json_response(_answer(await request.json()))

    async def _upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        uploaded = form["file"]
        assert isinstance(uploaded, web.FileField)
        assert form["purpose"] == "batch"
        return web.json_response(self._keep(uploaded.file.read()))

    def _keep(self, content: bytes) -> Body:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        return {"id": name, "object": "file", "bytes": len(content), "created_at": 0, "filename": name,
                "purpose": "batch", "status": "processed"}  # fmt: skip

    async def _download(self, request: web.Request) -> web.Response:
        content = self.files.get(request.match_info["file"])
        return web.Response(body=content) if content is not None else _absent("file")

    async def _create(self, request: web.Request) -> web.Response:
        asked = await request.json()
        lines = [json.loads(line) for line in self.files[asked["input_file_id"]].splitlines()]
        batch = {
            "id": f"batch-{len(self.batches)}", "object": "batch", "created_at": 0, "status": "in_progress", **asked,
            "request_counts": {"completed": 0, "failed": 0, "total": len(lines)}, "due": time.monotonic() + self.late,
        }  # fmt: skip
        self.batches[batch["id"]] = batch
        if not self.refused:
            self.asked += [line["custom_id"] for line in lines]
        if self.swallow:
            self.swallow -= 1
            assert request.transport is not None
            request.transport.abort()
        return web.json_response(batch)

    async def _list(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": list(self.batches.values()), "has_more": False})

    async def _retrieve(self, request: web.Request) -> web.Response:
        if self.pages:
            self.pages -= 1
            return web.Response(text="<html>One moment, please", content_type="text/html")
        batch = self.batches.get(request.match_info["batch"])
        if batch is None:
            return _absent("batch")
        if batch["status"] == "in_progress" and time.monotonic() > batch["due"]:
            self._finish(batch)
        return web.json_response({**batch, "status": batch["status"].upper()} if self.loud else batch)

    def _finish(self, batch: Body) -> None:
        if self.refused:
            batch |= {"status": "failed", "errors": {"object": "list", "data": [{"message": self.refused}]}}
            return
        chance = random.Random(5)
        rows = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        chance.shuffle(rows)
        answered, errors = [], []
        for row in rows:
            draw, answer = chance.random(), {"id": "r", "custom_id": row["custom_id"], "response": None, "error": None}
            if draw < self.lost:
                errors.append({**answer, "error": {"code": "batch_expired", "message": "not in time"}})
            elif draw < self.lost + self.failed:
                body = {"error": {"message": "the fake has failed"}}
                errors.append({**answer, "response": {"status_code": 500, "request_id": "q", "body": body}})
            else:
                answered.append({**answer, "response": {"status_code": 200, "body": _answer(row["body"])}})
        batch["status"] = "expired" if self.lost else "completed"
        for name, lines in (("output_file_id", answered), ("error_file_id", errors)):
            if lines:
                batch[name] = self._keep("\n".join(map(json.dumps, lines)).encode())["id"]


def _absent(what: str) -> web.Response:
    return web.json_response({"error": {"message": f"No {what} found", "code": None}}, status=404)


def _answer(body: Body) -> Body:
    prompt = body["messages"][-1]["content"]
    found = verdict(body["model"], prompt, "ORACLE")
    message = {"role": "assistant", "content": json.dumps(found) if found else "pong"}
    return {
        "id": "c", "object": "chat.completion", "created": 0, "model": body["model"],
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": len(prompt) // 4, "completion_tokens": 20, "total_tokens": len(prompt) // 4 + 20},
    }  # fmt: skip
