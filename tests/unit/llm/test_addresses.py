"""Addresses and lists of models as people and providers have them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tasks.config import EndpointConfig
from tasks.errors import PreflowError
from tasks.llm import retries
from tasks.llm.client import Endpoint
from tasks.llm.responses import RequestRefused

KEY, HEADER = "sk-very-secret", "header/secret"
HELLO = [{"role": "user", "content": "Hello"}]
ANSWER = {"choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}]}


async def say(request: web.Request) -> web.Response:
    return web.json_response(ANSWER)


async def list_bare(request: web.Request) -> web.Response:
    """Together's form."""
    return web.json_response([{"id": "other"}, {"id": "m", "context_length": 4096}])


async def send_on(request: web.Request) -> web.Response:
    raise web.HTTPMovedPermanently(f"https://api.example{request.path}")


@asynccontextmanager
async def endpoint_of(routes: list[web.RouteDef], path: str = "/v1", outage: int = 0) -> AsyncIterator[Endpoint]:
    application = web.Application()
    application.add_routes(routes)
    async with TestServer(application) as server:
        config = EndpointConfig(endpoint=str(server.make_url(path)), model="m", max_outage_seconds=outage)
        async with Endpoint(config, KEY, {"api-key": HEADER}) as endpoint:
            yield endpoint


def always(status: int, body: Any) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def respond(request: web.Request) -> web.Response:
        return web.json_response(body, status=status)

    return respond


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/chat/completions", "/v1/chat/completions?api-version=1"])
async def test_an_address_as_pages_show_it_and_a_list_without_a_name(path: str) -> None:
    async with endpoint_of([web.get("/v1/models", list_bare), web.post("/v1/chat/completions", say)], path) as endpoint:
        assert (await endpoint.check_model()).max_model_len == 4096
        answer = await endpoint.chat(HELLO)
        assert answer.choices[0].text == "x"


async def test_an_address_that_has_moved_is_named_before_anything_is_asked() -> None:
    async with endpoint_of([web.route("*", "/v1/{rest:.*}", send_on)], "/v1") as endpoint:
        with pytest.raises(PreflowError, match=r"moved to https://api\.example/v1/models: set endpoint to where that"):
            await endpoint.check_model()


async def test_a_model_that_neither_is_listed_nor_answers_is_named_before_anything_is_asked() -> None:
    async with endpoint_of([]) as endpoint:
        with pytest.raises(
            PreflowError, match=r"does not serve the model 'm'.*does not list its models \(is the address right"
        ):
            await endpoint.check_model()


@pytest.mark.parametrize(
    "listed",
    [{"data": None}, {"data": []}, [], {"data": ["n", "o"]}, {"data": [{"name": "n", "max_model_len": "8k"}]}],
)
async def test_a_model_that_is_not_listed_is_asked_in_the_words_that_it_takes(listed: Any) -> None:
    asked = []

    async def want_new_names(request: web.Request) -> web.Response:
        asked.append(await request.json())
        if "max_completion_tokens" in asked[-1]:
            return web.json_response(ANSWER)
        text = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
        return web.json_response({"error": {"message": text, "param": "max_tokens"}}, status=400)

    routes = [web.get("/v1/models", always(200, listed)), web.post("/v1/chat/completions", want_new_names)]
    async with endpoint_of(routes) as endpoint:
        assert (await endpoint.check_model()).id == "m"
    assert ["max_completion_tokens" in body for body in asked] == [False, True]


async def test_an_answer_may_hold_what_a_header_says() -> None:
    choice = {"message": {"content": f"It is {HEADER}."}, "finish_reason": "stop"}
    async with endpoint_of([web.post("/v1/chat/completions", always(200, {"choices": [choice]}))]) as endpoint:
        assert (await endpoint.chat(HELLO)).choices[0].text == f"It is {HEADER}."


@pytest.mark.parametrize("status", [200, 400, 401, 429, 500])
@pytest.mark.parametrize("text", [f"bad key {KEY}", f"bad header {HEADER}", "bad header header\\/secret"])
async def test_no_secret_that_a_server_repeats_is_shown(status: int, text: str) -> None:
    async def repeat(request: web.Request) -> web.Response:
        content = f'{{"error": {{"message": "{text}", "code": {max(400, status)}}}}}'
        return web.Response(text=content, status=status, content_type="application/json")

    async with endpoint_of([web.post("/v1/chat/completions", repeat)]) as endpoint:
        with pytest.raises((PreflowError, RequestRefused)) as caught:
            await endpoint.chat(HELLO)
    assert "***" in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_a_proxy_is_taken_without_its_http_and_another_kind_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "socks5://user:secret@127.0.0.1:1080")
    config = EndpointConfig(endpoint="http://models.invalid/v1", model="m")
    with pytest.raises(PreflowError, match=r"names a socks5 proxy for models\.invalid.*no_proxy") as caught:
        async with Endpoint(config, None):
            pass
    assert "secret" not in str(caught.value)
    application = web.Application()
    application.add_routes([web.get("/{rest:.*}", list_bare)])
    async with TestServer(application) as proxy:
        monkeypatch.setenv("http_proxy", f"127.0.0.1:{proxy.port}")
        async with Endpoint(config, None) as endpoint:
            assert (await endpoint.check_model()).max_model_len == 4096
    monkeypatch.setenv("http_proxy", "127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    async with endpoint_of([web.get("/v1/models", list_bare)]) as endpoint:
        assert (await endpoint.check_model()).max_model_len == 4096, "no_proxy is heeded"


@pytest.mark.parametrize(
    ("for_good", "asked"), [(False, [True] * 3 + [False, True, True]), (True, [True] * 3 + [False, True, False])]
)
async def test_only_a_schema_that_goes_on_failing_is_left_out(
    for_good: bool, asked: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is down at the start fails with the schema, too."""
    monkeypatch.setattr(retries, "FIRST_BACKOFF_SECONDS", 0.01)
    has_schema: list[bool] = []

    async def respond(request: web.Request) -> web.Response:
        has_schema.append("response_format" in await request.json())
        is_down = has_schema[-1] if for_good else len(has_schema) <= 3
        return web.json_response({"error": "x"} if is_down else ANSWER, status=500 if is_down else 200)

    async with endpoint_of([web.post("/v1/chat/completions", respond)], outage=60) as endpoint:
        for _ in range(2):
            answer = await endpoint.chat(HELLO, response_format={"type": "json_object"})
            assert answer.refused == (("response_format",) if for_good else ())
    assert has_schema == asked


@pytest.mark.parametrize(("confirmed", "at_once"), [(500, 4), (402, 1), (429, 1)])
async def test_an_answer_without_the_schema_is_asked_and_paid_for_once(
    confirmed: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever becomes of asking again with it: the server's failure, its throttle, or an account that is empty."""
    monkeypatch.setattr(retries, "FIRST_BACKOFF_SECONDS", 0.01)
    plain: list[bool] = []

    async def respond(request: web.Request) -> web.Response:
        if "response_format" not in await request.json():
            plain.append(True)
            await asyncio.sleep(0.02 * len(plain))  # by when another one has found out that it is the schema
            return web.json_response(ANSWER)
        return web.json_response({"error": "x"}, status=confirmed if plain else 500)

    async with endpoint_of([web.post("/v1/chat/completions", respond)], outage=60) as endpoint:
        asked = (endpoint.chat(HELLO, response_format={"type": "json_object"}) for _ in range(at_once))
        for answer in await asyncio.gather(*asked):
            assert (answer.refused, answer.usage.requests) == (("response_format",), 1)
        assert len(plain) == at_once
        is_out = "response_format" in endpoint._dialect.dropped
        assert is_out == (confirmed == 500), "too many requests, and no credit, say nothing of the schema"
