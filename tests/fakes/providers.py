"""Ten providers as they answer in 2026: what they take, in which form they answer, and how they fail.

Each is a few lines of script over one honest model: samples say which prompt and seed they are of, and the judge
prefers the longer text. `Provider.serve` runs one in a thread, with a share of requests failing as that provider fails.
"""

import contextlib
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.fakes.http import served
from tests.fakes.models import read_completions

Body = dict[str, Any]
Reply = tuple[Any, ...]  # status, body, and headers if there are any
ANSWER = "answer"


def sample(prompt: str, seed: int | None, place: int) -> str:
    """Return the model's text: of its prompt, and different from seed to seed."""
    which = "?" if seed is None else str(seed)
    length = 1 + int(hashlib.sha256(f"{prompt}:{which}:{place}".encode()).hexdigest(), 16) % 17
    return f"{ANSWER} to <{prompt}> " + " ".join(f"w{number}" for number in range(length))


def judge(texts: list[str]) -> str:
    """Return the verdict of a judge without position bias: the longer text is better."""
    order = sorted(range(len(texts)), key=lambda place: (len(texts[place]), texts[place]))
    return json.dumps({"best": str(order[-1] + 1), "worst": str(order[0] + 1), "confidence": "4"})


def answer(body: Body, n: int | None = None) -> Body:
    """Return an honest chat completion, with `n` choices if the provider heeds no `n`."""
    shown = body["messages"][-1]["content"]
    texts = read_completions(shown)
    count = n or body.get("n") or 1
    seed = body.get("seed")
    contents = [
        judge(texts) if texts else sample(shown, None if seed is None else seed + place, place)
        for place in range(count)
    ]
    choices = [
        {"index": place, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        for place, content in enumerate(contents)
    ]
    prompt, completion = len(shown) // 4, 12 * count
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {"id": "x", "object": "chat.completion", "model": body["model"], "choices": choices, "usage": usage}


def refuse(
    message: str, param: str | None = None, code: str | None = "unsupported_parameter", status: int = 400
) -> Reply:
    """Return an error in OpenAI's form."""
    return status, {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


@dataclass
class Provider:
    """One provider: `script` answers a request that does not fail, `failures` are what others get.

    `refused` are the settings that it does not take, and that an answer is made without.
    """

    name: str
    quirks: str
    script: Callable[[Body], Reply]
    failures: list[Reply]
    refused: tuple[str, ...] = ()
    models: tuple[str, ...] = ("m",)
    path: str = "/v1"
    query: str = ""
    header: tuple[str, str] | None = None
    share: float = 0.3
    answered: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    failed: int = 0

    @contextlib.contextmanager
    def serve(self) -> Iterator[str]:
        """Yield the base URL of a server that is this provider."""
        self.answered, self.requests, self.failed, self._draw = Counter(), 0, 0, random.Random(self.name)
        application = web.Application()
        application.router.add_post(f"{self.path}/chat/completions", self._chat)
        application.router.add_get(f"{self.path}/models", self._list)
        with served(application) as address:
            yield f"{address}{self.path}{self.query}"

    async def _list(self, request: web.Request) -> web.Response:
        return _respond(200, {"object": "list", "data": [{"id": name} for name in self.models]})

    async def _chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests += 1
        if self.header and request.headers.get(self.header[0]) != self.header[1]:
            return _respond(401, {"error": {"code": "401", "message": "Access denied due to invalid subscription key"}})
        if self.query and request.query_string != self.query.removeprefix("?"):
            return _respond(404, {"error": {"code": "404", "message": "Resource not found"}})
        if self.failures and self._draw.random() < self.share:
            self.failed += 1
            return _respond(*self._draw.choice(self.failures))
        status, content = self.script(body)
        if status == 200 and not (isinstance(content, dict) and "error" in content):
            key = json.dumps([body["messages"], body.get("seed")], sort_keys=True)
            self.answered[key] += 1
        return _respond(status, content)


def _respond(status: int, content: Any, headers: dict[str, str] | None = None) -> web.Response:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return web.Response(body=raw, status=status, headers=headers, content_type="application/json")


# ---- the ten


def _google(code: int, status: str, message: str, details: list[Any] | None = None) -> Reply:
    return code, [{"error": {"code": code, "status": status, "message": message, "details": details or []}}]


def _gemini(body: Body) -> Reply:
    for name in ("seed", "frequency_penalty"):
        if name in body:
            return _google(
                400, "INVALID_ARGUMENT", f'Invalid JSON payload received. Unknown name "{name}": Cannot find field.'
            )
    schema = json.dumps(body.get("response_format", ""))
    if '"enum": [1' in schema:
        return _google(400, "INVALID_ARGUMENT", "Invalid value at 'response_schema.enum' (TYPE_STRING), 1")
    found = answer(body)
    found["usage"]["total_tokens"] += 150  # thinking shows in the total only
    return 200, found


GEMINI_LIMIT = _google(
    429, "RESOURCE_EXHAUSTED", "You exceeded your current quota, please check your plan and billing details.",
    [{"violations": [{"quotaId": "GenerateRequestsPerMinutePerProjectPerModel", "quotaValue": "10"}]},
     {"@type": "RetryInfo", "retryDelay": "0.05s"}],
)  # fmt: skip


def _gpt5(body: Body) -> Reply:
    if "max_tokens" in body:
        return refuse("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", "max_tokens")
    if body.get("temperature", 1) != 1:
        return refuse(
            "Unsupported value: 'temperature' does not support 0.9 with this model.", "temperature", "unsupported_value"
        )
    for name in ("top_p", "frequency_penalty"):
        if name in body:
            return refuse(f"Unsupported parameter: '{name}' is not supported with this model.", name)
    found = answer(body)
    found["usage"]["completion_tokens_details"] = {"reasoning_tokens": 8}
    return 200, found


def _anthropic(body: Body) -> Reply:
    if (body.get("n") or 1) > 1:
        return 400, {"type": "error", "error": {"type": "invalid_request_error", "message": "n: must be 1"}}
    return 200, answer(body)


def _anthropic_error(status: int, kind: str) -> Reply:
    return status, {"type": "error", "error": {"type": kind, "message": kind}}, {"retry-after": "0"}


def _mistral(body: Body) -> Reply:
    for name in ("seed", "frequency_penalty"):
        if name in body:
            detail = {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted"}
            return 422, {"detail": [{**detail, "input": body[name]}]}
    found = answer(body)
    for choice in found["choices"]:
        thinking = {"type": "thinking", "thinking": [{"type": "text", "text": '{"best": 1, "worst": 2}'}]}
        choice["message"]["content"] = [thinking, {"type": "text", "text": choice["message"]["content"]}]
    return 200, found


def _deepseek(body: Body) -> Reply:
    found = answer(body, n=1)
    message = found["choices"][0]["message"]
    message["reasoning_content"] = "Hm."
    if ANSWER not in message["content"]:
        message["content"] = f'The form is {{"best": 1, "worst": 2}}.\n</think>\n\n{message["content"]}'
    found["usage"]["completion_tokens"] = -35
    return 200, b"\n\n\n" + json.dumps(found).encode()  # blanks keep the connection open


def _openrouter(body: Body) -> Reply:
    if "response_format" in body:
        return 200, {"error": {"message": "Provider returned error", "code": 400}}
    return 200, answer(body)


BROKEN_OFF = {
    "index": 0, "message": {"role": "assistant", "content": "answer to"}, "finish_reason": "error",
    "error": {"code": 502, "message": "Provider disconnected"},
}  # fmt: skip


def _inside(code: int, message: str) -> Reply:
    return 200, {"error": {"code": code, "message": message}}


def _azure(body: Body) -> Reply:
    found = answer(body)
    for choice in found["choices"]:
        choice["content_filter_results"] = {"hate": {"filtered": False, "severity": "safe"}}
    return 200, {**found, "prompt_filter_results": []}


def _llama_cpp(body: Body) -> Reply:
    if "response_format" in body:
        return 500, {"error": {"code": 500, "message": "Failed to initialize samplers: failed to parse grammar"}}
    return 200, answer(body, n=1)


def _litellm(body: Body) -> Reply:
    if body["messages"][0]["role"] == "system":
        return refuse("litellm.BadRequestError: System role not supported", None, "400")
    if "frequency_penalty" in body:
        text = "litellm.UnsupportedParamsError: openai does not support parameters: ['frequency_penalty']"
        return refuse(text, "None", "400")
    found = answer(body)
    found["usage"] = {"prompt_tokens": 9, "completion_tokens": None, "total_tokens": "n/a"}
    return 200, found


PROVIDERS = [
    Provider("Gemini", "no seed, string enums only, hidden thinking, 429 names a billing page", _gemini,
             [GEMINI_LIMIT, _google(503, "UNAVAILABLE", "The model is overloaded."),
              _google(500, "INTERNAL", "An internal error has occurred.")],
             ("frequency_penalty", "seed"), ("models/m",)),
    Provider("GPT-5-like", "max_completion_tokens, temperature 1 only, no top_p, no penalty", _gpt5,
             [refuse("Rate limit reached. Please try again in 50ms.", None, "rate_limit_exceeded", 429),
              refuse("The server had an error", None, "server_error", 500)],
             ("frequency_penalty", "temperature", "top_p")),
    Provider("Anthropic's layer", "n must be 1, names not listed", _anthropic,
             [_anthropic_error(529, "overloaded_error"), _anthropic_error(429, "rate_limit_error"),
              _anthropic_error(500, "api_error")], models=("m-20260101",)),
    Provider("Mistral", "content in parts with thinking, extra fields refused", _mistral,
             [(429, {"message": "Requests rate limit exceeded"}), (503, b"<html>upstream</html>")],
             ("frequency_penalty", "seed")),
    Provider("DeepSeek, Qwen", "one choice, thinking with a closing tag alone, blanks, negative usage", _deepseek,
             [(503, {"error": {"message": "Service is too busy"}}), (200, b"\n\n")]),
    Provider("OpenRouter", "errors inside a 200, broken choices, schema refused without a name", _openrouter,
             [_inside(429, "Rate limit exceeded: free-models-per-min"), _inside(502, "Provider error"),
              (200, {"choices": [BROKEN_OFF]})],
             ("response_format",), ("m:free",)),
    Provider("Azure", "query in the address, key in a header of its own", _azure,
             [(429, {"error": {"code": "429", "message": "Please retry."}}, {"retry-after-ms": "50"}),
              (500, {"error": {"code": "InternalServerError", "message": "x"}})],
             path="/openai/deployments/m", query="?api-version=2026-01-01", header=("api-key", "azure-key"),
             models=("other",)),
    Provider("Ollama", "one choice whatever n, :latest implied", lambda body: (200, answer(body, n=1)),
             [(503, {"error": {"message": "server busy, please try again. maximum pending requests exceeded"}})],
             models=("m:latest",)),
    Provider("llama.cpp", "one choice, grammar fails with a 500", _llama_cpp,
             [(503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}})],
             ("response_format",)),
    Provider("LiteLLM", "no system role, wildcard names, usage that is none", _litellm,
             [refuse("litellm.RateLimitError: RateLimitError", None, "429", 429),
              refuse("litellm.InternalServerError: upstream", None, "500", 500),
              (408, {"error": {"message": "litellm.Timeout", "code": "408"}})],
             ("frequency_penalty", "system role"), ("openai/*",)),
]  # fmt: skip
