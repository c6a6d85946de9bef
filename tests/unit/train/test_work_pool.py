"""Waiting for the Prefect server: an outage is waited out and said once, a refusal is not an outage."""

import logging

import httpx
import pytest

from tasks.train import work_pool as remote


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "OUTAGE_SECONDS", 0.01)


def status(code: int) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError("no", request=httpx.Request("GET", "http://x"), response=httpx.Response(code))


async def ask(answers: list[Exception | int]) -> Exception | int:
    answer = answers.pop(0)
    if isinstance(answer, Exception):
        raise answer
    return answer


async def test_an_outage_is_waited_out_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tasks.train.work_pool")
    outage = [httpx.ConnectError("refused"), status(503), RuntimeError("Failed to reach API at http://x"), 200]
    assert await remote.retry_while_api_is_down(ask, outage) == 200
    # Prefect's settings of the logs can show a record to two handlers.
    records = {id(record): record for record in caplog.records if record.name == "tasks.train.work_pool"}
    first, last = (record.message for record in records.values())
    assert first.startswith("the Prefect server does not answer (refused)")
    assert last.startswith("the Prefect server answers again after")


@pytest.mark.parametrize("refusal", [status(403), RuntimeError("of another kind"), ValueError("no outage")])
async def test_a_refusal_is_not_waited_for(refusal: Exception) -> None:
    answers: list[Exception | int] = [status(503), refusal, 200]
    with pytest.raises(type(refusal)) as raised:
        await remote.retry_while_api_is_down(ask, answers)
    assert raised.value is refusal
    assert answers == [200]
