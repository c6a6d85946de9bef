"""Rows that are paid for one by one: kept as they arrive, found again by key, put together in input order.

A stage's rows lie in `<workspace>/rows/<stage>/<settings key>/`. While a shard runs, each finished row is appended to
a journal of its own; a finished shard is one file named by the digest of its input, and its journals go. Whoever needs
a row looks it up by its key in all of these files: a killed run, a changed shard size or added prompts repeat nothing.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import posixpath
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tasks.errors import PreflowError
from tasks.storage import DigestWriter, Reference, Workspace

logger = logging.getLogger(__name__)

MIN_SHARDS, MAX_SHARDS, MIN_ROWS, MAX_ROWS = 8, 1000, 16, 1000
SEGMENT_SECONDS = 5.0

Row = dict[str, Any]


class Slice(BaseModel):
    """A run of consecutive rows of a JSONL artifact: bytes `start` to `end`, with the digest of just these bytes."""

    model_config = ConfigDict(frozen=True)

    index: int
    uri: str
    start: int
    end: int
    rows: int
    sha256: str


class ShardRef(Reference):
    """One finished shard of rows."""

    kind: Literal["shard"] = "shard"


class Outcome(BaseModel):
    """What became of one input row: the output row, or why there is none, and what it used."""

    row: Row | None = None
    error: dict[str, Any] | None = None
    usage: dict[str, int] = {}


def shard_rows(total: int, wanted: int | None) -> int:
    """Return the rows of a shard: `wanted`, or such that there are 8 to about 1000 shards of 16 to 1000 rows."""
    if wanted:
        return wanted
    fair = -(-total // MAX_SHARDS)
    return max(1, min(max(fair, MIN_ROWS), MAX_ROWS, -(-total // MIN_SHARDS)))


def slice_rows(store: Workspace, source: Reference, wanted: int | None = None) -> list[Slice]:
    """Cut a JSONL artifact into slices, reading it once."""
    size = shard_rows(source.rows, wanted)
    slices: list[Slice] = []
    start = position = rows = 0
    content = hashlib.sha256()
    for line in store.lines(source.uri):
        content.update(line)
        position, rows = position + len(line), rows + 1
        if rows == size or position == source.size:
            slices.append(
                Slice(index=len(slices), uri=source.uri, start=start, end=position, rows=rows,
                      sha256=content.hexdigest())
            )
            start, rows, content = position, 0, hashlib.sha256()
    return slices


def read_slice(store: Workspace, part: Slice) -> list[Row]:
    """Return a slice's rows.

    Raises:
        PreflowError: the artifact has changed since it was sliced.
    """
    lines = list(store.lines(part.uri, part.start, part.end))
    if hashlib.sha256(b"".join(lines)).hexdigest() != part.sha256:
        raise PreflowError(f"{part.uri}: changed while it was being read (bytes {part.start}-{part.end}); run again")
    return [json.loads(line) for line in lines]


# One stored row is {"key":"<64 hex>","sha256":"<64 hex>","outcome":{...}}: the head has a fixed width, so that an index
# is built without parsing, and the digest tells a torn or altered row from a whole one.
_HEAD = len(b'{"key":"') + 64 + len(b'","sha256":"') + 64 + len(b'","outcome":')


def _encode(key: str, outcome: Outcome) -> bytes:
    body = json.dumps(outcome.model_dump(exclude_none=True), ensure_ascii=False).encode()
    return b'{"key":"%s","sha256":"%s","outcome":%s}\n' % (
        key.encode(), hashlib.sha256(body).hexdigest().encode(), body,
    )


def _decode(line: bytes) -> tuple[str, Outcome] | None:
    body = line[_HEAD:-2]
    if not line.endswith(b"}\n") or hashlib.sha256(body).hexdigest().encode() != line[84:148]:
        return None
    return line[8:72].decode(), Outcome.model_validate_json(body)


class RowStore:
    """The rows of one stage under one set of settings."""

    def __init__(self, workspace: str, stage: str, settings_key: str) -> None:
        self.store = Workspace(workspace)
        self.folder = self.store.uri("rows", stage, settings_key)
        self._index: dict[bytes, tuple[str, int, int]] | None = None

    def shard_uri(self, part: Slice) -> str:
        """Return where the finished shard of `part` lies."""
        return posixpath.join(self.folder, f"{part.sha256}.jsonl")

    def lacks(self, slices: Iterable[Slice]) -> bool:
        """Tell whether a finished shard of `slices` is not there."""
        return not all(self.store.exists(self.shard_uri(part)) for part in slices)

    def find(self, keys: Sequence[str]) -> dict[str, Outcome]:
        """Return the outcomes already known under `keys`; damaged rows count as unknown."""
        if self._index is None:
            self._index = self._build_index()
        found = {}
        for key in keys:
            place = self._index.get(bytes.fromhex(key))
            if place is None:
                continue
            uri, start, end = place
            decoded = _decode(b"".join(self.store.lines(uri, start, end))) if self.store.exists(uri) else None
            if decoded is not None and decoded[0] == key:
                found[key] = decoded[1]
            else:
                logger.warning("%s: the row at byte %d is damaged or gone and will be made again", uri, start)
        return found

    def _build_index(self) -> dict[bytes, tuple[str, int, int]]:
        index: dict[bytes, tuple[str, int, int]] = {}
        for uri in self.store.list(self.folder):
            position = 0
            for line in self.store.lines(uri):
                if line.startswith(b'{"key":"') and line.endswith(b"}\n") and len(line) > _HEAD:
                    try:
                        index.setdefault(bytes.fromhex(line[8:72].decode()), (uri, position, position + len(line)))
                    except ValueError:
                        logger.warning("%s: the row at byte %d is damaged and will be made again", uri, position)
                position += len(line)
        return index

    @asynccontextmanager
    async def journal(self, part: Slice) -> AsyncIterator["Journal"]:
        """Keep rows as they finish; what was appended stays, however the block ends."""
        journal = Journal(self.store, posixpath.join(self.folder, f"{part.sha256}.{uuid.uuid4().hex[:12]}.partial"))
        try:
            yield journal
        except BaseException:
            self._index = None  # built before these rows were kept: a retry must see them
            raise
        finally:
            journal.close()

    def commit(self, part: Slice, keys: Sequence[str], outcomes: dict[str, Outcome]) -> ShardRef:
        """Write the finished shard, rows in input order, and drop its journals."""
        uri = self.shard_uri(part)
        with self.store.writing(uri) as out:
            for key in keys:
                out.write(_encode(key, outcomes[key]))
        for file in self.store.list(self.folder):
            if posixpath.basename(file).startswith(f"{part.sha256}.") and ".partial" in file:
                self.store.delete(file)
        return ShardRef(uri=uri, **out.facts())

    def read_shard(self, shard: ShardRef) -> Iterator[tuple[str, Outcome]]:
        """Yield a shard's rows in order.

        Raises:
            PreflowError: a row is damaged.
        """
        for number, line in enumerate(self.store.lines(shard.uri), 1):
            decoded = _decode(line)
            if decoded is None:
                raise PreflowError(f"{shard.uri}:{number}: damaged; delete this file and run again")
            yield decoded


class Journal:
    """Append-only rows of a running shard: a local file, or on GCS an object every few seconds.

    A killed process loses, locally, nothing that was appended; on GCS at most SEGMENT_SECONDS of rows.
    """

    def __init__(self, store: Workspace, stem: str) -> None:
        self._store, self._stem = store, stem
        self._file: Any = None
        self._pending: list[bytes] = []
        self._segments = 0
        self._flushed = time.monotonic()

    def append(self, key: str, outcome: Outcome) -> None:
        """Keep one row."""
        line = _encode(key, outcome)
        if not self._store.is_local:
            self._pending.append(line)
            if time.monotonic() - self._flushed > SEGMENT_SECONDS:
                self._flush_segment()
            return
        if self._file is None:
            self._file = self._open_file()
        self._file.write(line)

    def _open_file(self) -> Any:
        path = Path(f"{self._stem}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab", buffering=0)

    def _flush_segment(self) -> None:
        if self._pending:
            self._store.write_bytes(f"{self._stem}-{self._segments:05d}.jsonl", b"".join(self._pending))
            self._segments += 1
        self._pending, self._flushed = [], time.monotonic()

    def close(self) -> None:
        """Flush what is pending and close the file."""
        self._flush_segment()
        if self._file is not None:
            self._file.close()


@dataclass
class Tally:
    """How far a stage is: rows done in all, and of these those made by this process and those that failed."""

    total: int
    done: int = 0
    made: int = 0
    failed: int = 0

    def add(self, outcomes: Iterable[Outcome], made: bool) -> None:
        """Count finished rows."""
        for outcome in outcomes:
            self.done += 1
            self.made += made
            self.failed += outcome.row is None


@dataclass
class ShardWorker:
    """Makes a stage's shards: where its rows lie, what identifies a row, and what makes one."""

    rows: RowStore
    key_of: Callable[[Row], str]
    work: Callable[[Row], Awaitable[Outcome]]
    tally: Tally

    async def run(self, part: Slice) -> ShardRef:
        """Make the rows of one slice that are not known yet, and commit the shard.

        Raises:
            Exception: the first error of `work`; rows that others finished meanwhile are kept.
        """
        source = await asyncio.to_thread(read_slice, self.rows.store, part)
        keyed = {self.key_of(row): row for row in source}
        outcomes = await asyncio.to_thread(self.rows.find, list(keyed))
        self.tally.add(outcomes.values(), made=False)
        async with self.rows.journal(part) as journal:

            async def make(key: str, row: Row) -> None:
                outcome = await self.work(row)
                journal.append(key, outcome)
                outcomes[key] = outcome
                self.tally.add([outcome], made=True)

            await settle(make(key, row) for key, row in keyed.items() if key not in outcomes)
        return await asyncio.to_thread(self.rows.commit, part, list(keyed), outcomes)


async def settle(coroutines: Iterable[Coroutine[Any, Any, Any]], limit: int | None = None) -> list[Any]:
    """Run coroutines, at most `limit` at once; after an error none is started, but those under way go on to their end.

    Unlike a bare `asyncio.gather`, an error does not abandon requests in flight that are already paid for.

    Raises:
        BaseException: the first error in time.
    """
    gate = asyncio.Semaphore(limit) if limit else contextlib.nullcontext()
    errors: list[BaseException] = []

    async def gated(coroutine: Coroutine[Any, Any, Any]) -> Any:
        async with gate:
            if errors:
                coroutine.close()
                return None
            try:
                return await coroutine
            except BaseException as error:
                errors.append(error)
                raise

    results = await asyncio.gather(*(gated(c) for c in coroutines), return_exceptions=True)
    if errors:
        raise errors[0]
    return results


def open_shards(max_concurrency: int, slices: Sequence[Slice]) -> int:
    """Return how many shards must be open at once to keep `max_concurrency` requests in flight, with one to spare."""
    smallest = min((part.rows for part in slices), default=1)
    return -(-max_concurrency // max(1, smallest)) + 1


class MergeCounts(BaseModel):
    """What a merge found."""

    rows: int = 0
    failed: int = 0
    usage: dict[str, int] = {}

    def add(self, outcome: Outcome) -> None:
        """Count one outcome."""
        self.rows += outcome.row is not None
        self.failed += outcome.error is not None
        for name, value in outcome.usage.items():
            self.usage[name] = self.usage.get(name, 0) + value


def merge_shards(
    source: Sequence[Slice], shards: Sequence[ShardRef], rows: RowStore, failures: DigestWriter
) -> Iterator[tuple[Row, Outcome]]:
    """Join shards to their input rows by id, in input order; failed rows go to `failures`, the others are yielded.

    Raises:
        PreflowError: a shard does not hold exactly its slice's ids.
    """
    for part, shard in zip(source, shards, strict=True):
        inputs = {row["id"]: row for row in read_slice(rows.store, part)}
        for _, outcome in rows.read_shard(shard):
            result = outcome.row if outcome.row is not None else outcome.error or {}
            row = inputs.pop(str(result.get("id")), None)
            if row is None:
                raise PreflowError(f"{shard.uri}: holds a row of another prompt; delete this file and run again")
            if outcome.row is None:
                failures.write_row(result)
            yield row, outcome
        if inputs:
            raise PreflowError(f"{shard.uri}: lacks {len(inputs)} of its prompts; delete this file and run again")
