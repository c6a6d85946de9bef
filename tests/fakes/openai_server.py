"""A fault-injecting OpenAI-compatible server.

Start it with `python -m tests.fakes.openai_server --port 0 --plan plan.json --log requests.jsonl`.

Bare asyncio, because it must break connections in the middle of a response and serve some thousand requests a second.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.models import JUDGES, sample, spoil, verdict
from tests.fakes.plan import Plan

CHAT = "/v1/chat/completions"


@dataclass
class Request:
    """One HTTP request."""

    method: str
    path: str
    headers: dict[str, str]
    content: bytes
    body: dict[str, Any] = field(default_factory=dict)
    sha: str = ""
    attempt: int = 0
    fault: str | None = None


@dataclass
class Reply:
    """One HTTP response, and what happens on its way."""

    status: int
    body: dict[str, Any] | str
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    fault: str | None = None

    def encode(self) -> bytes:
        """Return the bytes of the whole response."""
        text = self.body if isinstance(self.body, str) else json.dumps(self.body)
        if self.fault == "broken_json":
            text = text[: len(text) // 2]
        content = text.encode()
        kind = "text/plain" if isinstance(self.body, str) else "application/json"
        lines = [f"HTTP/1.1 {self.status} Fake", f"content-type: {kind}", f"content-length: {len(content)}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def error(status: int, message: str, code: str | None = None, wait: float | None = None) -> Reply:
    """Return an error in OpenAI's form; `wait` is the Retry-After in seconds."""
    headers = {} if wait is None else {"retry-after": f"{wait:.3f}"}
    return Reply(status, {"error": {"message": message, "type": "fake", "param": None, "code": code}}, headers)


class Server:
    """The state of the endpoint: what it has been asked how often, what it serves, and whether it is down."""

    def __init__(self, plan: Plan, log: Path | None) -> None:
        self.plan = plan
        self.adapters: dict[str, str] = {}
        self.connections: set[Connection] = set()
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else None
        self._seen, self._verdicts = Counter[str](), Counter[str]()
        self._recent: deque[float] = deque()
        self._chats = self._burst_left = self.in_flight = self.port = 0
        self._outage_until = 0.0
        self._listener: asyncio.Server | None = None
        self._away: asyncio.Future[None] | None = None

    async def listen(self, port: int) -> None:
        """Accept connections on 127.0.0.1; port 0 takes a free one."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(lambda: Connection(self), "127.0.0.1", port, backlog=4096)
        self.port = self._listener.sockets[0].getsockname()[1]

    def arrive(self, request: Request) -> Reply | None:
        """Return the reply to a request, or None if the connection is to be left hanging."""
        if request.path == CHAT:
            reply = self._arrive_chat(request)
        else:
            reply = self._refuse_key(request) or self._route(request)
        self._note(request, reply)
        return reply

    def _arrive_chat(self, request: Request) -> Reply | None:
        self._chats += 1
        request.sha = hashlib.sha256(request.content).hexdigest()
        request.attempt = self._seen[request.sha]
        self._seen[request.sha] += 1
        outage = self.plan.outage
        if outage is not None and self._chats == outage.after:
            self._outage_until = time.monotonic() + outage.seconds
            if outage.kind == "refuse":
                self._away = asyncio.ensure_future(self._go_away(outage.seconds))
        if outage is not None and time.monotonic() < self._outage_until:
            request.fault = "outage"
            return error(503, "the fake is down") if outage.kind == "503" else None
        reply = self._refuse_key(request) or self._limit() or self._fault(request)
        if request.fault == "hang":
            return None
        if reply is None:
            reply = self._chat(request)
            reply.fault = request.fault
        reply.delay = self.plan.latency(request.sha, request.attempt)
        if request.fault == "slow":
            reply.delay += self.plan.slow_seconds
        return reply

    async def _go_away(self, seconds: float) -> None:
        assert self._listener is not None
        self._listener.close()
        for connection in list(self.connections):
            connection.reset()
        await asyncio.sleep(seconds)
        await self.listen(self.port)

    def _refuse_key(self, request: Request) -> Reply | None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        is_right = self.plan.key in (None, given)
        return None if is_right else error(401, f"Incorrect API key provided: {given}.", "invalid_api_key")

    def _limit(self) -> Reply | None:
        plan, now = self.plan, time.monotonic()
        if plan.max_in_flight is not None and self.in_flight >= plan.max_in_flight:
            return error(503, "too many requests in flight")
        if plan.limit_requests is None:
            return None
        while self._recent and self._recent[0] <= now - plan.limit_seconds:
            self._recent.popleft()
        if len(self._recent) < plan.limit_requests:
            self._recent.append(now)
            return None
        wait = self._recent[0] + plan.limit_seconds - now
        return error(429, "too many requests a minute", "rate_limit_exceeded", wait)

    def _fault(self, request: Request) -> Reply | None:
        if self._burst_left:
            self._burst_left -= 1
            request.fault = "burst"
            return error(503, "the fake has too much to do")
        request.fault = self.plan.fault(request.sha, request.attempt)
        if request.fault is None:
            return None
        self._burst_left = self.plan.burst if request.fault == "unavailable" else 0
        errors = {
            "rate_limit": error(429, "slow down", "rate_limit_exceeded"),
            "rate_limit_after": error(429, "slow down", "rate_limit_exceeded", self.plan.retry_after),
            "error_500": error(500, "the fake has failed"),
            "unavailable": error(503, "the fake has too much to do"),
        }
        return errors.get(request.fault)

    def _refuse(self, request: Request, text: str) -> Reply | None:
        """Return the error that this request will always get, if it does."""
        body, plan, model = request.body, self.plan, str(request.body.get("model"))
        served, greedy = (*plan.samplers, *JUDGES, *self.adapters), body.get("temperature") == 0
        length = f"This model's maximum context length is {plan.max_model_len} tokens."
        rules = [
            (model not in served, 404, f"The model `{model}` does not exist.", "model_not_found"),
            (plan.context_marker in text, 400, length, "context_length_exceeded"),
            (plan.filter_marker in text, 400, "The prompt triggered the content management policy.", "content_filter"),
            (plan.poison_marker in text, 500, "the engine cannot digest this prompt", None),
            ((body.get("n") or 1) > 1 and greedy, 400, "n must be 1 when using greedy sampling", None),
        ]
        return next((error(status, message, code) for holds, status, message, code in rules if holds), None)

    def _chat(self, request: Request) -> Reply:
        model = str(request.body.get("model"))
        text = "\n".join(message.get("content") or "" for message in request.body.get("messages", []))
        if refused := self._refuse(request, text):
            request.fault = "poison" if refused.status == 500 else request.fault
            return refused
        texts = self._verdict(request) if model in JUDGES else self._samples(request.body)
        choices = [
            {"index": index, "message": {"role": "assistant", "content": content}, "finish_reason": reason}
            for index, (content, reason) in enumerate(texts)
        ]
        prompt, thinking = len(text) // 4 + 1, self.plan.thinking_tokens * len(texts)
        completion = (
            sum(len(content) for content, _ in texts) // 4 + 1 + thinking
        )  # thinking is part of it, as at OpenAI
        usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
        usage |= {"total_tokens": prompt + completion, "completion_tokens_details": {"reasoning_tokens": thinking}}
        head = {"id": f"fake-{request.sha[:12]}", "object": "chat.completion", "created": 0, "model": model}
        return Reply(200, {**head, "choices": choices, "usage": usage})

    def _samples(self, body: dict[str, Any]) -> list[tuple[str, str]]:
        plan, model = self.plan, body["model"]
        messages = json.dumps(body["messages"], sort_keys=True)
        identity = hashlib.sha256(f"{model}:{self.adapters.get(model, '')}:{messages}".encode()).hexdigest()
        first = body["seed"] if body.get("seed") is not None else random.getrandbits(31)
        choices = []
        for seed in range(first, first + (body.get("n") or 1)):
            marked = plan.oracle_every and (seed + int(identity[:8], 16)) % plan.oracle_every == 0
            text, limit = sample(identity, seed, plan.oracle_word if marked else None), self._limit_of(body) * 4
            choices.append((text[:limit], "length" if len(text) > limit else "stop"))
        return choices

    def _limit_of(self, body: dict[str, Any]) -> int:
        return int(body.get("max_tokens") or body.get("max_completion_tokens") or self.plan.max_model_len)

    def _verdict(self, request: Request) -> list[tuple[str, str]]:
        body, plan = request.body, self.plan
        found = verdict(body["model"], body["messages"][-1]["content"], plan.oracle_word)
        if found is None:
            return [("I see no completions to compare.", "stop")]
        if plan.thinking_tokens and self._limit_of(body) < plan.thinking_tokens + 20:
            return [("", "length")]
        number = self._verdicts[request.sha]
        self._verdicts[request.sha] += 1
        fault = plan.verdict_fault(request.sha, number)
        request.fault = request.fault or (fault and f"verdict_{fault}")
        return [spoil(found, fault)]

    def _route(self, request: Request) -> Reply:
        match request.path:
            case "/v1/models" if self.plan.list_models:
                return Reply(200, {"object": "list", "data": list(self._models())})
            case "/tokenize":
                tokens = self.plan.tokens(request.body)
                length = {"count": len(tokens), "max_model_len": self.plan.max_model_len}
                return Reply(200, {**length, "tokens": tokens})
            case "/v1/load_lora_adapter" if self.plan.runtime_lora:
                return self._load(request.body)
            case "/v1/unload_lora_adapter" if self.plan.runtime_lora:
                if self.adapters.pop(request.body["lora_name"], None) is None:
                    return error(404, f"The lora adapter '{request.body['lora_name']}' cannot be found.")
                return Reply(200, f"Success: LoRA adapter '{request.body['lora_name']}' removed successfully.")
            case "/health":
                return Reply(200, "")
        return Reply(404, {"detail": "Not Found"})

    def _models(self) -> Iterator[dict[str, Any]]:
        prefix = "models/" if self.plan.gemini_names else ""
        common = {"object": "model", "created": 0, "owned_by": "fake", "max_model_len": self.plan.max_model_len}
        for name in (*self.plan.samplers, *JUDGES):
            yield {**common, "id": prefix + name, "root": name, "parent": None}
        for name, path in self.adapters.items():
            yield {**common, "id": prefix + name, "root": path, "parent": self.plan.samplers[0]}

    def _load(self, body: dict[str, Any]) -> Reply:
        name, path = body["lora_name"], body["lora_path"]
        if name in self.plan.samplers[:1]:
            return error(400, f"The lora adapter '{name}' conflicts with a served base model.")
        if name in self.adapters and not body.get("load_inplace"):
            hint = "If you want to load the adapter in place, set 'load_inplace' to True."
            return error(400, f"The lora adapter '{name}' has already been loaded. {hint}")
        settings = self.plan.read_mounted(f"{path}/adapter_config.json")
        if settings is None:
            return error(404, f"Loading lora {name} failed: No adapter found for {path}")
        rank = json.loads(settings)["r"]
        if rank > self.plan.max_lora_rank:
            return error(500, f"LoRA rank {rank} is greater than max_lora_rank {self.plan.max_lora_rank}.")
        if self.plan.wants_weights and self.plan.read_mounted(f"{path}/adapter_model.safetensors") is None:
            return error(500, f"{path} doesn't contain tensors")
        self.adapters[name] = path
        return Reply(200, f"Success: LoRA adapter '{name}' added successfully.")

    def _note(self, request: Request, reply: Reply | None) -> None:
        if self._log is None:
            return
        body, messages = request.body, request.body.get("messages")
        row = {
            "time": time.time(), "method": request.method, "path": request.path, "sha": request.sha,
            "attempt": request.attempt, "prompt": prompt_id(messages) if messages else None,
            "model": body.get("model"), "n": body.get("n"), "seed": body.get("seed"),
            "status": reply.status if reply else 0, "fault": request.fault, "in_flight": self.in_flight,
            "usage": reply.body.get("usage") if reply and isinstance(reply.body, dict) else None,
        }  # fmt: skip
        os.write(self._log, json.dumps(row).encode() + b"\n")


def prompt_id(messages: list[dict[str, Any]]) -> str:
    """Return the sha256 of the canonical messages, as preflow names a prompt."""
    plain = [{"role": message.get("role"), "content": message.get("content")} for message in messages]
    canonical = json.dumps(plain, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class Connection(asyncio.Protocol):
    """One client connection: HTTP/1.1 with content-length, one request after the other."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._buffer = b""
        self._busy = False
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self._finish()

    def reset(self) -> None:
        """Break the connection off (RST)."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, separator, rest = self._buffer.partition(b"\r\n\r\n")
        if not separator or self._busy:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        if len(rest) < length:
            return
        self._buffer = rest[length:]
        method, path, _ = first.split(" ", 2)
        request = Request(method, path.partition("?")[0], headers, rest[:length])
        request.body = json.loads(request.content) if length else {}
        self._serve(request)

    def _serve(self, request: Request) -> None:
        self._busy = True
        reply = self._server.arrive(request)
        self._server.in_flight += 1
        if reply is None:
            return
        if reply.delay > 0:
            self._timer = asyncio.get_running_loop().call_later(reply.delay, self._send, reply)
        else:
            self._send(reply)

    def _send(self, reply: Reply) -> None:
        content = reply.encode()
        assert self._transport is not None
        if reply.fault in ("reset_headers", "reset_body"):
            end = 20 if reply.fault == "reset_headers" else content.index(b"\r\n\r\n") + 24
            self._transport.write(content[:end])
            asyncio.get_running_loop().call_later(0.01, self.reset)
            return
        self._transport.write(content)
        self._finish()

    def _finish(self) -> None:
        if self._busy:
            self._busy = False
            self._server.in_flight -= 1


async def main() -> None:
    """Read the command line and serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--log", type=Path)
    arguments = parser.parse_args()
    server = Server(Plan.model_validate_json(arguments.plan.read_bytes() if arguments.plan else b"{}"), arguments.log)
    _ = server.plan.tokenizer  # loaded now, if there is one: while it is, nobody would be answered
    await server.listen(arguments.port)
    print(f"listening on http://127.0.0.1:{server.port}/v1", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
