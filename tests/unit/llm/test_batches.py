"""Batches of a process that need not wait for them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from tasks.llm import batches
from tasks.llm.batches import Batches, BatchPending, Line
from tasks.store.workspace import Workspace, digest
from tests.fakes.batches import FakeBatches

BODY: dict[str, Any] = {"model": "judge-hash", "messages": [{"role": "user", "content": "ping"}]}
NAME = digest(BODY)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "PATIENCE_SECONDS", 0.2)
    for name in ("QUIET_SECONDS", "FIRST_POLL_SECONDS"):
        monkeypatch.setattr(batches, name, 0.05)


@asynccontextmanager
async def process(fake: FakeBatches, folder: Path, source: str = "prompts") -> AsyncIterator[Batches]:
    client = AsyncOpenAI(base_url=fake.url, api_key="none", max_retries=0)
    made = Batches(client, Workspace(str(folder)), str(folder / "batches"), 1.0, bytes, source, may_leave=True)
    try:
        yield made
    finally:
        await made.close()


async def test_a_batch_is_left_and_taken_up_by_whoever_looks_when_it_is_answered(tmp_path: Path) -> None:
    with FakeBatches(late=3600) as fake:
        async with process(fake, tmp_path) as first:
            with pytest.raises(BatchPending, match="batch batch-0: 0 of 1 questions are answered"):
                await first.ask(NAME, BODY, ["temperature"])
        async with process(fake, tmp_path) as second:
            assert await second.has(NAME)
            with pytest.raises(BatchPending, match="batch batch-0"):
                await second.check_pending()
        async with process(fake, tmp_path, "other prompts") as other:
            await other.check_pending()
        fake.batches["batch-0"]["due"], fake.pages = 0.0, 1
        async with process(fake, tmp_path) as third:
            async with asyncio.timeout(20):
                await third.check_pending()
                line = await third.ask(NAME, BODY, ())
        assert isinstance(line, Line)
        assert (line.status, line.refused) == (200, ("temperature",))
        assert fake.asked == [NAME]


@pytest.mark.parametrize("lost", ["batch", "file", "line"])
async def test_what_the_provider_has_forgotten_or_broken_holds_up_nothing(tmp_path: Path, lost: str) -> None:
    with FakeBatches(late=0.0) as fake:
        async with process(fake, tmp_path) as first:
            await first.ask(NAME, BODY, ())
        fake.loud = True
        if lost == "batch":
            fake.batches.clear()
        elif lost == "file":
            fake.files.clear()
        else:
            fake.files[fake.batches["batch-0"]["output_file_id"]] = b'\n{"custom_id": 1}\n[]\n{"resp'
        async with process(fake, tmp_path) as second:
            async with asyncio.timeout(20):
                await second.check_pending()
                assert await second.ask(NAME, BODY, ()) is None, "it goes the normal way"


class LateFiles(dict[str, bytes]):
    """Files of which one is known only from the second time on that it is asked for."""

    def __init__(self, files: dict[str, bytes], late: bytes) -> None:
        super().__init__(files)
        self.late, self.asked = late, 0

    def get(self, name: str, default: Any = None) -> Any:
        self.asked += name not in self
        return self.late if self.asked > 1 else super().get(name, default)


async def test_a_file_that_is_not_known_at_once_is_asked_for_again_and_its_answers_are_not_paid_twice(
    tmp_path: Path,
) -> None:
    with FakeBatches(late=0.0) as fake:
        async with process(fake, tmp_path) as first:
            line = await first.ask(NAME, BODY, ())
        late = fake.files.pop(fake.batches["batch-0"]["output_file_id"])
        fake.files = LateFiles(fake.files, late)
        async with process(fake, tmp_path) as second:
            assert await second.ask(NAME, BODY, ()) == line
