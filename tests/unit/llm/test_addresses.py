"""Addresses and lists of models as people and providers have them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tasks.config import EndpointConfig
from tasks.errors import PreflowError
from tasks.llm.client import Endpoint

ANSWER = {"choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}]}


async def say(request: web.Request) -> web.Response:
    return web.json_response(ANSWER)


async def list_bare(request: web.Request) -> web.Response:
    """Together's form."""
    return web.json_response([{"id": "other"}, {"id": "m", "context_length": 4096}])


async def send_on(request: web.Request) -> web.Response:
    raise web.HTTPMovedPermanently(f"https://api.example{request.path}")


@asynccontextmanager
async def endpoint_of(routes: list[web.RouteDef], path: str) -> AsyncIterator[Endpoint]:
    application = web.Application()
    application.add_routes(routes)
    async with TestServer(application) as server:
        config = EndpointConfig(endpoint=str(server.make_url(path)), model="m")
        async with await Endpoint.connect(config, "judging") as endpoint:
            yield endpoint


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/chat/completions", "/v1/chat/completions?api-version=1"])
async def test_an_address_as_pages_show_it_and_a_list_without_a_name(path: str) -> None:
    async with endpoint_of([web.get("/v1/models", list_bare), web.post("/v1/chat/completions", say)], path) as endpoint:
        assert (await endpoint.check_model()).max_model_len == 4096
        answer = await endpoint.chat([{"role": "user", "content": "Hello"}])
        assert answer.choices[0].text == "x"


async def test_an_address_that_has_moved_is_named_before_anything_is_asked() -> None:
    async with endpoint_of([web.route("*", "/v1/{rest:.*}", send_on)], "/v1") as endpoint:
        with pytest.raises(PreflowError, match=r"moved to https://api\.example/v1/models: set endpoint to where that"):
            await endpoint.check_model()
