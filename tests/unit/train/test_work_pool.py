"""Waiting for the Prefect server: an outage is waited out and said once, a refusal is not an outage."""

import asyncio
import logging
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx
import pytest

from tasks.demo.services import free_port
from tasks.train import work_pool as remote


class Api(BaseHTTPRequestHandler):
    """Answers with the status that the path names, and the first time with 503."""

    asked = 0

    def do_GET(self) -> None:
        Api.asked += 1
        self.send_response(503 if Api.asked == 1 else int(self.path[1:]))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


async def ask(url: str) -> int:
    async with httpx.AsyncClient() as client:
        return (await client.get(url)).raise_for_status().status_code


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "OUTAGE_SECONDS", 0.01)
    Api.asked = 0


async def test_an_outage_is_waited_out_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tasks.train.work_pool")
    port = free_port()
    asked = asyncio.create_task(remote.retry_while_api_is_down(ask, f"http://127.0.0.1:{port}/200"))
    while not caplog.records:  # noqa: ASYNC110  the record is written in a call that nobody else sees
        await asyncio.sleep(0.05)
    server = ThreadingHTTPServer(("127.0.0.1", port), Api)
    Thread(target=server.serve_forever, daemon=True).start()
    assert await asyncio.wait_for(asked, 30) == 200
    server.shutdown()
    assert Api.asked == 2, "a 503 is an outage, too"
    # Prefect's settings of the logs can show a record to two handlers.
    records = {id(record): record for record in caplog.records if record.name == "tasks.train.work_pool"}
    said = [record.message for record in records.values()]
    assert len(said) == 2
    assert said[0].startswith("the Prefect server does not answer")
    assert said[1].startswith("the Prefect server answers again")


async def test_a_refusal_is_not_waited_for() -> None:
    Api.asked = 1
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        await remote.retry_while_api_is_down(ask, f"http://127.0.0.1:{server.server_port}/403")
    server.shutdown()
    assert Api.asked == 2
