"""A provider's batch API: requests that are answered within a day, at half of the price.

A batch is an uploaded file of requests and comes back as files of answers, in any order, perhaps not all of them
(https://platform.openai.com/docs/guides/batch). Callers hand in one request each and wait for its line: requests are
gathered until no more come. What a batch asks is written down before it is sent, so a process that was killed finds
its batches again, and nothing is paid for twice.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar, overload

from openai import APIConnectionError, APIError, APIStatusError, AsyncOpenAI
from openai.types import Batch, FileObject
from pydantic import BaseModel

from tasks.errors import PreflowError
from tasks.llm.dialect import Body
from tasks.llm.responses import StageStopped, Transient, classify
from tasks.store.refs import digest
from tasks.store.workspace import Workspace

# At OpenAI a file holds 50,000 requests and 200 MB at most.
MOST_REQUESTS = 20_000
MOST_BYTES = 150_000_000
# No request for so long: no more are coming.
QUIET_SECONDS = 5.0
FIRST_POLL_SECONDS, LONGEST_POLL_SECONDS = 5.0, 60.0
# A process that need not wait for a batch looks for so long, and then leaves.
PATIENCE_SECONDS = 120.0
ENDED = frozenset({"completed", "failed", "expired", "cancelled", "canceled"})
logger = logging.getLogger(__name__)
Result = TypeVar("Result")
Call: TypeAlias = Callable[[], Awaitable[Result]]
Awaited: TypeAlias = "asyncio.Task[dict[str, Line]]"


class BatchPending(PreflowError):
    """A batch is not answered yet, and nobody needs to wait for it here."""


class Record(BaseModel, frozen=True):
    """What was handed in as one batch, without the settings that the endpoint had `refused` by then.

    Without an id, the process ended before the answer that tells it. `source` tells what the questions are about.
    """

    name: str
    requests: list[str]
    batch: str | None = None
    refused: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Line:
    """The answer to one request of a batch: what the endpoint would have sent for it alone, and what was left out."""

    status: int
    body: Any
    refused: tuple[str, ...] = ()


class _Open:
    """Requests that wait for others: until no more have come for a while, or the file is full."""

    def __init__(self) -> None:
        self.bodies: dict[str, Body] = {}
        self.refused: set[str] = set()
        self.closed = asyncio.Event()
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, name: str, body: Body, refused: Iterable[str]) -> None:
        self.bodies[name] = body
        self.refused.update(refused)
        self._size += len(json.dumps(body))
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(QUIET_SECONDS, self.closed.set)
        if len(self.bodies) >= MOST_REQUESTS or self._size >= MOST_BYTES:
            self.closed.set()


class Batches:
    """The batches of one model under one key.

    Args:
        client: where they go.
        store: the workspace.
        folder: where they are written down.
        wait_seconds: how long an endpoint that does not answer is waited for.
        conceal: takes out of what came back what no message may show.
        source: what the questions are about: only batches about it are waited for at a start.
        may_leave: whether to raise `BatchPending` rather than to wait for hours.
    """

    def __init__(
        self, client: AsyncOpenAI, store: Workspace, folder: str, wait_seconds: float,
        conceal: Callable[[bytes], bytes], source: str = "", may_leave: bool = False,
    ) -> None:  # fmt: skip
        self._client, self._store, self._folder = client, store, folder
        self._wait_seconds, self._conceal, self._source, self._may_leave = wait_seconds, conceal, source, may_leave
        self._earlier: dict[str, Record] = {}
        self._lines: dict[str, Awaited] = {}
        self._open: tuple[_Open, Awaited] | None = None
        self._found: asyncio.Task[None] | None = None

    async def has(self, name: str) -> bool:
        """Tell whether an earlier process has handed in the request `name`."""
        self._found = self._found or asyncio.create_task(self._find_earlier())
        await asyncio.shield(self._found)
        return name in self._earlier

    async def ask(self, name: str, body: Body, refused: Iterable[str]) -> Line | None:
        """Return the answer to a chat request; None if its batch ended without one.

        Args:
            name: tells the request from others; the same in every process.
            body: of the request, as the endpoint takes it.
            refused: what was left out for that.

        Raises:
            PreflowError: the endpoint takes no batches, or this one.
            BatchPending: it is not answered yet, and the process may leave.
        """
        is_known = await self.has(name)
        if name not in self._lines and is_known:
            self._begin_taking_up(self._earlier[name])
        elif name not in self._lines:
            if self._open is None or self._open[0].closed.is_set():
                group = _Open()
                self._open = group, asyncio.create_task(self._run(group))
            group, self._lines[name] = self._open
            group.add(name, body, refused)
        return (await asyncio.shield(self._lines[name])).pop(name, None)

    async def check_pending(self) -> None:
        """Raise `BatchPending` if the process may leave and what an earlier one handed in is not answered."""
        if not self._may_leave:
            return
        await self.has("")
        for record in {record.name: record for record in self._earlier.values()}.values():
            batch = await self._retrieve(record) if record.source == self._source else None
            if batch and batch.status.lower() not in ENDED:
                self._begin_taking_up(record)
        for failure in await asyncio.gather(*set(self._lines.values()), return_exceptions=True):
            if isinstance(failure, BaseException):
                raise failure

    def _begin_taking_up(self, record: Record) -> None:
        self._lines |= dict.fromkeys(record.requests, asyncio.create_task(self._take_up(record)))

    async def close(self) -> None:
        """Leave the batches to the next process, which finds them."""
        for task in filter(None, (self._found, *self._lines.values())):
            task.cancel()
        await self._client.close()

    async def _run(self, group: _Open) -> dict[str, Line]:
        await group.closed.wait()
        requests = sorted(group.bodies)
        name, refused = digest([requests, time.time_ns()])[:32], tuple(sorted(group.refused))
        record = Record(name=name, requests=requests, refused=refused, source=self._source)
        self._write(record)
        batch = await self._create(record, group.bodies)
        group.bodies.clear()
        self._write(record.model_copy(update={"batch": batch.id}))
        logger.info("batch %s: %d requests handed in; answers come within a day", batch.id, len(requests))
        return await self._collect(record, batch)

    async def _create(self, record: Record, bodies: dict[str, Body]) -> Batch:
        lines = [
            json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body})
            for name, body in bodies.items()
        ]
        named = f"{record.name}.jsonl", "".join(f"{line}\n" for line in lines).encode()
        file: FileObject = await self._try(partial(self._client.files.create, file=named, purpose="batch"))

        async def create() -> Batch:
            # An answer that was lost on its way may have made it.
            return await self._find(record.name) or await self._client.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h",
                metadata={"preflow": record.name},
            )  # fmt: skip

        return await self._try(create)

    async def _collect(self, record: Record, batch: Batch) -> dict[str, Line]:
        wait, started = FIRST_POLL_SECONDS, time.monotonic()
        while batch.status.lower() not in ENDED:
            if self._may_leave and time.monotonic() - started > PATIENCE_SECONDS:
                counts = batch.request_counts
                done = counts.completed + counts.failed if counts else 0
                raise BatchPending(f"batch {batch.id}: {done} of {len(record.requests)} questions are answered")
            await asyncio.sleep(wait)
            wait = min(LONGEST_POLL_SECONDS, wait * 1.5)
            before = batch.request_counts
            batch = await self._try(partial(self._client.batches.retrieve, batch.id))
            if (counts := batch.request_counts) and counts != before:
                logger.info("batch %s: %d of %d answered", batch.id, counts.completed + counts.failed, counts.total)
        if batch.status.lower() == "failed":
            self._store.delete(f"{self._folder}/{record.name}.json")
            causes = "; ".join(str(error.message) for error in (batch.errors and batch.errors.data) or ())
            raise PreflowError(
                f"batch {batch.id} was refused: {causes or 'no reason was given'}. Nothing of it was asked: set "
                "judging.batch to false to ask the normal way, or run again when the cause is gone."
            )
        files = filter(None, (batch.output_file_id, batch.error_file_id))
        lines = {name: line for file in files for name, line in (await self._download(file, record.refused)).items()}
        if missing := len(set(record.requests) - lines.keys()):
            logger.warning("batch %s %s: %d requests go the normal way", batch.id, batch.status, missing)
        return lines

    async def _download(self, file: str, refused: tuple[str, ...]) -> dict[str, Line]:
        """Return the lines of a file of answers; what is no line of it counts as not answered, as a lost file does."""
        found, lines = None, {}
        for pause in (0.0, FIRST_POLL_SECONDS, 4 * FIRST_POLL_SECONDS):  # a new file may not be known everywhere yet
            await asyncio.sleep(pause)
            if found := await self._try(partial(self._client.files.content, file), may_be_gone=True):
                break
        for text in (found.content if found else b"").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                row = json.loads(text)
                answer = row["response"]
                lines[str(row["custom_id"])] = Line(int(answer.get("status_code") or 200), answer.get("body"), refused)
        return lines

    async def _find_earlier(self) -> None:
        """Take up what an earlier process has handed in."""
        for uri in self._store.list(self._folder):
            record = Record.model_validate(self._store.read_json(uri))
            batch = None if record.batch else await self._try(partial(self._find, record.name))
            if record.batch is None and batch is None:
                self._store.delete(uri)
                continue
            if batch is not None:
                record = record.model_copy(update={"batch": batch.id})
                self._write(record)
            self._earlier |= dict.fromkeys(record.requests, record)

    async def _take_up(self, record: Record) -> dict[str, Line]:
        batch = await self._retrieve(record)
        if batch is None:
            logger.warning(
                "batch %s of an earlier start is not known at %s: its %d requests go the normal way", record.batch,
                self._client.base_url, len(record.requests),
            )  # fmt: skip
            return {}
        logger.info("batch %s of an earlier start: %s", batch.id, batch.status)
        return await self._collect(record, batch)

    async def _retrieve(self, record: Record) -> Batch | None:
        """Return a batch; None if it is not known here: forgotten after months, or handed in elsewhere."""
        return await self._try(partial(self._client.batches.retrieve, str(record.batch)), may_be_gone=True)

    async def _find(self, name: str) -> Batch | None:
        """Return the batch that was handed in under `name`."""
        async for batch in self._client.batches.list(limit=100):
            if (batch.metadata or {}).get("preflow") == name:
                return batch
        return None

    def _write(self, record: Record) -> None:
        self._store.write_json(f"{self._folder}/{record.name}.json", record.model_dump())

    @overload
    async def _try(self, call: Call[Result]) -> Result: ...

    @overload
    async def _try(self, call: Call[Result], may_be_gone: bool) -> Result | None: ...

    async def _try(self, call: Call[Result], may_be_gone: bool = False) -> Result | None:
        """Await a call until it is answered; what `may_be_gone` is None where the provider has it no longer.

        Raises `PreflowError`: it is refused, or there has been no answer for too long.
        """
        until = time.monotonic() + self._wait_seconds
        while True:
            try:
                found = await call()
                if not isinstance(found, str):
                    return found
                failure: Exception = Transient("the answer is a page")
            except APIStatusError as error:
                answer = error.response
                if may_be_gone and answer.status_code == 404:
                    return None
                failure = classify(answer.status_code, answer.headers, self._conceal(answer.content))
            except APIError as error:
                failure = Transient(str(error)) if isinstance(error, APIConnectionError) else error
            if isinstance(failure, StageStopped):
                raise failure
            if not isinstance(failure, Transient) or time.monotonic() > until:
                raise PreflowError(
                    f"{self._client.base_url}: no batch could be handed in or fetched: {failure}. What was handed in "
                    "is found again: run again later, or set judging.batch to false where there is no batch API."
                )
            await asyncio.sleep(FIRST_POLL_SECONDS)
