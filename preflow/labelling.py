"""The page on which a person judges comparisons: on this machine only, one answer at a time, each kept as it comes."""

import socket
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import uvicorn
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from tasks.errors import PreflowError
from tasks.evaluate.labels import Choice, Labelling

HOST = "127.0.0.1"
# Nothing from elsewhere, and no other page may show this one.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "frame-ancestors 'none'"
)


class Answer(BaseModel):
    """What a person says of one pair."""

    number: int
    choice: Choice


def make_app(labelling: Labelling, finished: Callable[[], None]) -> Starlette:
    """Return the page and what it asks; `finished` is called when the last pair has its answer.

    Requests under another host's name are refused, and answers that are not JSON: another site that is open in the
    same browser can neither read a pair nor send an answer.
    """

    def following() -> dict[str, Any]:
        missing = labelling.missing
        if missing:
            return labelling.show(missing[0])
        finished()
        return {"number": None, "done": labelling.total, "total": labelling.total}

    async def page(_: Request) -> Response:
        text = files("preflow").joinpath("label.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY})

    async def pairs(request: Request) -> Response:
        number = request.path_params.get("number")
        if number is not None and number >= labelling.total:
            return Response(f"there is no pair {number}", 404)
        return JSONResponse(following() if number is None else labelling.show(number))

    async def answers(request: Request) -> Response:
        if request.headers.get("content-type") != "application/json":
            return Response("an answer is JSON", 415)
        try:
            answer = Answer.model_validate_json(await request.body())
        except ValidationError as error:
            return Response(f"not an answer: {error.errors()[0]['msg']}", 422)
        if not 0 <= answer.number < labelling.total:
            return Response(f"there is no pair {answer.number}", 404)
        labelling.answer(answer.number, answer.choice)
        return JSONResponse(following())

    routes = [
        Route("/", page),
        Route("/pairs", pairs),
        Route("/pairs/{number:int}", pairs),
        Route("/answers", answers, methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])])


def serve(labelling: Labelling, port: int, started: Callable[[str], None]) -> None:
    """Serve the page until every pair has an answer, or Ctrl-C; `started` is told the address.

    Raises:
        PreflowError: the port is taken.
    """
    listener = socket.socket()
    try:
        listener.bind((HOST, port))
    except OSError as error:
        raise PreflowError(
            f"port {port} cannot be used: {error.strerror}; give another --port, or 0 for any"
        ) from error
    with listener:

        def finished() -> None:
            server.should_exit = True

        server = uvicorn.Server(uvicorn.Config(make_app(labelling, finished), log_level="warning"))
        listener.listen()
        started(f"http://{HOST}:{listener.getsockname()[1]}/")
        server.run(sockets=[listener])
