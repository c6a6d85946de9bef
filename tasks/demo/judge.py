"""A judge that costs nothing: an OpenAI-compatible server whose taste is `tasks.demo.rules`.

Run as `python -m tasks.demo.judge PORT LOG`; where the environment has DEMO_JUDGE_KEY, requests need it as their bearer
token.
"""

import json
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tasks.demo.rules import score

MODEL = "demo-judge"
KEY_VARIABLE = "DEMO_JUDGE_KEY"
# A text between two lines of one label and nonce; what stands in it, such as lines of another nonce, is part of it.
BLOCK = re.compile(r"^<<<(SCENE|COMPLETION \d+) ([0-9a-f]+)>>>\n(.*?)\n?^<<<END \1 \2>>>$", re.MULTILINE | re.DOTALL)
# Score gaps between best and worst at which the confidence rises to 2, 3, 4 and 5.
CONFIDENCE_STEPS = (0.03, 0.08, 0.15, 0.25)
CHARACTERS_PER_TOKEN = 4


class UnreadablePrompt(ValueError):
    """The prompt is not in the form that the judge knows."""


def parse_prompt(text: str) -> tuple[str, list[str]]:
    """Return a judge prompt's scene and completions, in the order shown; raise UnreadablePrompt for any other text."""
    blocks = BLOCK.findall(text)
    labels = [label for label, _, _ in blocks]
    count = len(labels) - 1
    if count < 2 or labels != ["SCENE", *(f"COMPLETION {number}" for number in range(1, count + 1))]:
        raise UnreadablePrompt(f"a scene and two or more completions are needed, each whole; found: {labels or 'none'}")
    if len(re.findall(rf"^<<<COMPLETION \d+ {blocks[1][1]}>>>$", text, re.MULTILINE)) > count:
        raise UnreadablePrompt(f"completion {count + 1} has no end line")
    return blocks[0][2], [shown for _, _, shown in blocks[1:]]


def verdict(scene: str, completions: Sequence[str], scored: bool = False) -> dict[str, int]:
    """Return the 1-based positions of best and worst and a confidence from 1 to 5; ties go to the lower position.

    The worst is looked for among the others, so that best and worst differ even where all are equal. With scores, a
    completion gets 1 to 10 by its own marks.
    """
    marks = [score(scene, completion) for completion in completions]
    best = max(range(len(marks)), key=lambda i: (marks[i], -i))
    worst = min((i for i in range(len(marks)) if i != best), key=lambda i: (marks[i], i))
    gap = marks[best] - marks[worst]
    scores = {f"score_{number}": 1 + round(9 * mark) for number, mark in enumerate(marks, 1)} if scored else {}
    return {
        **scores,
        "best": best + 1,
        "worst": worst + 1,
        "confidence": 1 + sum(gap >= step for step in CONFIDENCE_STEPS),
    }


def create_app(log: Path | None = None, key: str | None = None) -> Starlette:
    """Return the judge as an ASGI application; `log` gets one JSON line for each chat request."""

    def refused(request: Request) -> JSONResponse | None:
        if key is None or request.headers.get("authorization") == f"Bearer {key}":
            return None
        return _error(401, f"Missing or wrong API key; the server took its own from {KEY_VARIABLE}.", "invalid_api_key")

    async def models(request: Request) -> JSONResponse:
        entry = {"id": MODEL, "object": "model", "owned_by": "preflow"}
        return refused(request) or JSONResponse({"object": "list", "data": [entry]})

    async def chat(request: Request) -> JSONResponse:
        raw = await request.body()
        response, note = (denied, {}) if (denied := refused(request)) else _answer(raw)
        if log is not None:
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time.time(), "status": response.status_code, **note}) + "\n")
        return response

    routes = [Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])]
    return Starlette(routes=routes)


def _answer(raw: bytes) -> tuple[JSONResponse, dict[str, object]]:
    """Return the response and what the log says about it."""
    try:
        body = json.loads(raw)
        if body["model"] != MODEL:
            message = f"The model {body['model']!r} does not exist; this server has {MODEL!r}."
            return _error(404, message, "model_not_found"), {"model": body["model"]}
        scene, completions = parse_prompt(str(body["messages"][-1]["content"]))
    except UnreadablePrompt as problem:
        return _error(400, f"The demo judge cannot read this prompt: {problem}.", "invalid_prompt"), {}
    except (ValueError, LookupError, TypeError) as problem:
        return _error(400, f"This is not a chat completion request: {problem!r}.", "invalid_request"), {}
    decision = verdict(scene, completions, scored='"score_1"' in str(body["messages"][0]["content"]))
    content = f"```json\n{json.dumps(decision)}\n```"
    texts = ("".join(str(message["content"]) for message in body["messages"]), content)
    asked, answered = (max(1, round(len(text) / CHARACTERS_PER_TOKEN)) for text in texts)
    usage = {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}
    said = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": "stop"}
    completion = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time())}
    response = JSONResponse({**completion, "model": MODEL, "choices": [choice], "usage": usage})
    return response, {**decision, "completions": len(completions), "usage": usage}


def _error(status: int, message: str, code: str) -> JSONResponse:
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status_code=status)


if __name__ == "__main__":
    sockets = [socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=1024)]
    app = create_app(Path(sys.argv[2]), os.environ.get(KEY_VARIABLE) or None)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=sockets)
