"""What shows a stage's progress is not worth the stage: it may fail, is heard, and goes on."""

import asyncio
import logging
from typing import Any
from uuid import uuid4

import pytest

from tasks.batch import progress
from tasks.batch.progress import Monitor
from tasks.batch.shards import Tally
from tasks.config import EndpointConfig
from tasks.llm.client import Stats
from tasks.llm.responses import EndpointDown


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


async def test_progress_goes_on_after_a_note_that_could_not_be_written(
    shown: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    notes = Notes()
    with caplog.at_level(logging.WARNING):
        async with monitor(notes).showing():
            await asyncio.sleep(0.3)
    assert notes.written >= 4
    assert len(shown) >= 4
    assert "could not be written (OSError('the disk is full'))" in caplog.text


async def test_a_last_note_that_fails_does_not_hide_what_ended_the_stage(shown: list[float]) -> None:
    with pytest.raises(EndpointDown, match="gone"):
        async with monitor(Notes()).showing():
            raise EndpointDown("gone")
    assert shown
