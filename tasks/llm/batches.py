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

from pydantic import BaseModel, ValidationError

from tasks.errors import PreflowError
from tasks.llm.connection import Connection, Upload
from tasks.llm.dialect import Body
from tasks.llm.responses import RequestRefused, Transient
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
# For one call: a file of answers has many megabytes.
CALL_SECONDS = 600.0
ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
logger = logging.getLogger(__name__)
Result = TypeVar("Result")
Find: TypeAlias = Callable[[], Awaitable[Result | None]]
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


class Named(BaseModel):
    """What the API has made, by its id."""

    id: str


class Batch(Named):
    """A batch, as the API describes it."""

    status: str
    output_file_id: str | None = None
    error_file_id: str | None = None
    request_counts: dict[str, int] | None = None
    metadata: dict[str, Any] | None = None
    errors: Any = None

    @property
    def answered(self) -> int:
        """How many of its requests are done with, one way or the other."""
        counts = self.request_counts or {}
        return counts.get("completed", 0) + counts.get("failed", 0)


class Page(BaseModel):
    """A page of a list of batches."""

    data: list[Batch]
    has_more: bool = False


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
        connection: where they go.
        store: the workspace.
        folder: where they are written down.
        source: what the questions are about: only batches about it are waited for at a start.
        may_leave: whether to raise `BatchPending` rather than to wait for hours.
    """

    def __init__(
        self, connection: Connection, store: Workspace, folder: str, source: str = "", may_leave: bool = False
    ) -> None:
        self._connection, self._store, self._folder = connection, store, folder
        self._source, self._may_leave = source, may_leave
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
            if record.source != self._source:
                continue
            batch = await self._ask(f"batches/{record.batch}", Batch.model_validate_json)
            if batch and batch.status not in ENDED:
                self._begin_taking_up(record)
        for failure in await asyncio.gather(*set(self._lines.values()), return_exceptions=True):
            if isinstance(failure, BaseException):
                raise failure

    def _begin_taking_up(self, record: Record) -> None:
        self._lines |= dict.fromkeys(record.requests, asyncio.create_task(self._take_up(record)))

    def close(self) -> None:
        """Leave the batches to the next process, which finds them."""
        for task in filter(None, (self._found, *self._lines.values())):
            task.cancel()

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
        content = "".join(f"{line}\n" for line in lines).encode()
        file = await self._ask("files", Named.model_validate_json, Upload(f"{record.name}.jsonl", content, "batch"))
        asked = {
            "input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h",
            "metadata": {"preflow": record.name},
        }  # fmt: skip
        # An answer that was lost on its way may have made it.
        return await self._ask("batches", Batch.model_validate_json, asked, partial(self._find, record.name))

    async def _collect(self, record: Record, batch: Batch) -> dict[str, Line]:
        wait, started = FIRST_POLL_SECONDS, time.monotonic()
        while batch.status not in ENDED:
            if self._may_leave and time.monotonic() - started > PATIENCE_SECONDS:
                count = len(record.requests)
                raise BatchPending(f"batch {batch.id}: {batch.answered} of {count} questions are answered")
            await asyncio.sleep(wait)
            wait = min(LONGEST_POLL_SECONDS, wait * 1.5)
            before = batch.answered
            found = await self._ask(f"batches/{batch.id}", Batch.model_validate_json)
            batch = found or batch.model_copy(update={"status": "expired"})
            if batch.answered != before:
                logger.info("batch %s: %d of %d answered", batch.id, batch.answered, len(record.requests))
        if batch.status == "failed":
            self._store.delete(f"{self._folder}/{record.name}.json")
            errors = batch.errors.get("data") if isinstance(batch.errors, dict) else batch.errors
            causes = "; ".join(str(error.get("message")) for error in errors or () if isinstance(error, dict))
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
        lines = {}
        for text in (await self._ask(f"files/{file}/content", bytes) or b"").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                row = json.loads(text)
                answer = row["response"]
                lines[str(row["custom_id"])] = Line(int(answer.get("status_code") or 200), answer.get("body"), refused)
        return lines

    async def _find_earlier(self) -> None:
        """Take up what an earlier process has handed in."""
        for uri in self._store.list(self._folder):
            record = Record.model_validate(self._store.read_json(uri))
            batch = None if record.batch else await self._find(record.name)
            if record.batch is None and batch is None:
                self._store.delete(uri)
                continue
            if batch is not None:
                record = record.model_copy(update={"batch": batch.id})
                self._write(record)
            self._earlier |= dict.fromkeys(record.requests, record)

    async def _take_up(self, record: Record) -> dict[str, Line]:
        batch = await self._ask(f"batches/{record.batch}", Batch.model_validate_json)
        if batch is None:
            logger.warning(
                "batch %s of an earlier start is not known at %s: its %d requests go the normal way", record.batch,
                self._connection.base_url, len(record.requests),
            )  # fmt: skip
            return {}
        logger.info("batch %s of an earlier start: %s", batch.id, batch.status)
        return await self._collect(record, batch)

    async def _find(self, name: str) -> Batch | None:
        """Return the batch that was handed in under `name`."""
        after = ""
        while page := await self._ask(f"batches?limit=100{after}", Page.model_validate_json):
            if found := next((batch for batch in page.data if (batch.metadata or {}).get("preflow") == name), None):
                return found
            if not (page.has_more and page.data):
                break
            after = f"&after={page.data[-1].id}"
        return None

    def _write(self, record: Record) -> None:
        self._store.write_json(f"{self._folder}/{record.name}.json", record.model_dump())

    @overload
    async def _ask(self, path: str, read: Callable[[bytes], Result]) -> Result | None: ...

    @overload
    async def _ask(
        self, path: str, read: Callable[[bytes], Result], body: Body | Upload, find: Find[Result] | None = None
    ) -> Result: ...

    async def _ask(
        self, path: str, read: Callable[[bytes], Result], body: Body | Upload | None = None,
        find: Find[Result] | None = None,
    ) -> Result | None:  # fmt: skip
        """Ask until there is an answer; None for what the provider has no longer: it forgets after weeks.

        What `find` finds before an attempt was made by an earlier one. Raises `PreflowError` if it is refused, or there
        has been no answer for too long.
        """
        address, until = self._connection.base_url, time.monotonic() + self._connection.config.max_outage_seconds
        while True:
            failure: Transient | RequestRefused
            try:
                if find is not None and (found := await find()) is not None:
                    return found
                return read(await self._connection.call(f"{address}/{path}", body, CALL_SECONDS))
            except ValidationError:
                failure = Transient(f"the answer to {path} is not what was asked for")
            except RequestRefused as refused:
                if body is None and refused.status == 404:
                    return None
                failure = refused
            except Transient as failed:
                failure = failed
            if isinstance(failure, RequestRefused) or time.monotonic() > until:
                raise PreflowError(
                    f"{address}: no batch could be handed in or fetched: {failure}. What was handed in is found again: "
                    "run again later, or set judging.batch to false where there is no batch API."
                )
            await asyncio.sleep(FIRST_POLL_SECONDS)
