"""What shows a stage's progress is not worth the stage: it may fail, is heard, and goes on."""

import asyncio
from typing import Any
from uuid import uuid4

import pytest

from tasks.batch import progress
from tasks.batch.progress import Monitor
from tasks.batch.shards import Tally
from tasks.config import EndpointConfig
from tasks.llm.client import Stats
from tasks.llm.responses import EndpointDown
from tests.deployed import until


class Notes:
    """Stands in for the log of costs; every second note fails."""

    def __init__(self) -> None:
        self.written = 0

    def note(self, used: Any) -> None:
        self.written += 1
        if self.written % 2:
            raise OSError("the disk is full")


class Endpoint:
    """As much of an endpoint as is shown."""

    config = EndpointConfig()
    stats = Stats(sent=1)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    updates: list[float] = []

    async def create(**_: Any) -> Any:
        return uuid4()

    async def update(_: Any, progress: float, description: str) -> None:
        updates.append(progress)

    monkeypatch.setattr(progress, "acreate_progress_artifact", create)
    monkeypatch.setattr(progress, "aupdate_progress_artifact", update)
    monkeypatch.setattr(progress, "ARTIFACT_SECONDS", 0.02)
    return updates


def monitor(notes: Notes) -> Monitor:
    endpoint: Any = Endpoint()
    spending: Any = notes
    return Monitor("generate", Tally(rows=10), endpoint, spending)


async def test_progress_goes_on_after_a_note_that_could_not_be_written_and_hides_no_error(
    shown: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    notes = Notes()

    async def stage() -> None:
        async with monitor(notes).showing():
            await asyncio.to_thread(until, lambda: len(shown) >= 4)
            notes.written = 0  # so that the last one fails
            raise EndpointDown("gone")

    with pytest.raises(EndpointDown, match="gone"):
        await stage()
    assert len(shown) >= 4
    assert caplog.text.count("could not be written (OSError('the disk is full'))") >= 3
