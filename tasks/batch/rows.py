"""Rows that are paid for one by one: kept as they arrive, found again by key, put together in input order.

An input row is worth some units: its completions are one, its verdicts one for each order. The units of a stage lie
in `<workspace>/rows/<stage>/<settings key>/`. While a shard runs, each finished unit is appended to a journal of its
own; a finished shard is one file named by the digest of its input, and its journals go. Whoever needs a unit looks it
up by its key in all of these files: a killed run, a changed shard size or added prompts repeat nothing.
"""

import asyncio
import contextlib
import hashlib
import itertools
import json
import logging
import posixpath
import threading
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from tasks.errors import PreflowError
from tasks.store.storage import Stat
from tasks.store.workspace import Cost, Reference, Row, Workspace, digest

logger = logging.getLogger(__name__)

MIN_SHARDS, MAX_SHARDS, MAX_ROWS = 8, 1000, 1000
# A task run takes some 10 ms here and 30 on the server, which are 0.3 ms a row: hardly more than the row itself takes.
USUAL_ROWS = 128
# How often a bucket gets the units that have arrived.
SEGMENT_SECONDS = 5.0


class Slice(BaseModel, frozen=True):
    """A run of consecutive rows of a JSONL artifact: bytes `start` to `end`, with the digest of just these bytes."""

    index: int
    uri: str
    start: int
    end: int
    rows: int
    sha256: str


class ShardRef(Reference):
    """One finished shard; `rows` counts its units, `failed` those that failed, `passing` those of them not `final`."""

    kind: Literal["shard"] = "shard"
    failed: int = 0
    passing: int = 0


class Outcome(BaseModel):
    """What became of one unit: its output, or why there is none, what it used, and which settings were `refused`.

    A failure is `final` if the unit alone is to blame and would fail again; others are asked again at the next start.
    """

    # First, because a stored failure is known by its first bytes.
    final: bool | None = None
    error: Row | None = None
    row: Row | None = None
    usage: Cost = Cost()
    refused: tuple[str, ...] = ()


def writable(text: str) -> str:
    """Return `text` with what UTF-8 cannot hold (lone surrogates, which JSON can carry) replaced."""
    return text.encode("utf-8", "replace").decode()


def shard_rows(total: int, wanted: int | None) -> int:
    """Return the rows of a shard: `wanted`, or such that there are 8 to about 1000 shards of up to 1000 rows."""
    if wanted:
        return wanted
    fewest = -(-total // MAX_SHARDS)
    return max(1, min(max(fewest, USUAL_ROWS), MAX_ROWS, -(-total // MIN_SHARDS)))


def slice_rows(store: Workspace, source: Reference, wanted: int | None = None) -> list[Slice]:
    """Cut a JSONL artifact into slices, reading it once."""
    size = shard_rows(source.rows, wanted)
    slices: list[Slice] = []
    start, lines = 0, store.lines(source.uri)
    while taken := list(itertools.islice(lines, size)):
        content = b"".join(taken)
        end, sha256 = start + len(content), hashlib.sha256(content).hexdigest()
        slices.append(Slice(index=len(slices), uri=source.uri, start=start, end=end, rows=len(taken), sha256=sha256))
        start = end
    return slices


def read_slice(store: Workspace, part: Slice) -> list[Row]:
    """Return a slice's rows; raises `PreflowError` if the artifact has changed since it was sliced."""
    lines = list(store.lines(part.uri, part.start, part.end))
    if hashlib.sha256(b"".join(lines)).hexdigest() != part.sha256:
        raise PreflowError(f"{part.uri}: changed while it was being read (bytes {part.start}-{part.end}); run again")
    return [json.loads(line) for line in lines]


# One stored unit is {"key":"<64 hex>","sha256":"<64 hex>","outcome":{...}}: the head has a fixed width, so that an
# index is built without parsing, and the digest tells a torn or altered unit from a whole one.
_HEAD = len(b'{"key":"') + 64 + len(b'","sha256":"') + 64 + len(b'","outcome":')


def _encode(key: str, outcome: Outcome) -> bytes:
    body = json.dumps(outcome.model_dump(exclude_none=True, exclude_defaults=True), ensure_ascii=False).encode()
    checksum = hashlib.sha256(key.encode() + body).hexdigest()
    return b'{"key":"%s","sha256":"%s","outcome":%s}\n' % (key.encode(), checksum.encode(), body)


def _decode(line: bytes) -> tuple[str, Outcome] | None:
    key, body = line[8:72], line[_HEAD:-2]
    if not line.endswith(b"}\n") or hashlib.sha256(key + body).hexdigest().encode() != line[84:148]:
        return None
    return key.decode(), Outcome.model_validate_json(body)


def _may_pass(line: bytes) -> bool:
    """Tell whether a unit failed for a reason that may pass."""
    return line.startswith(b'{"error"', _HEAD)


Place = tuple[str, int, int]


class RowStore:
    """The units of one stage under one set of settings.

    Args:
        workspace: where everything is kept.
        stage: names a folder.
        settings_key: names a folder; all stages under equal settings share its units.
        variant: tells shards of the same input rows apart that hold other units of them.
    """

    def __init__(self, workspace: str, stage: str, settings_key: str, variant: str = "") -> None:
        self.store = Workspace(workspace)
        self._settings_key, self._variant = settings_key, variant
        self.folder = self.store.uri("rows", stage, settings_key)
        self._index: dict[bytes, Place] = {}
        self._indexed_files: dict[str, Stat] = {}
        self._is_current = False
        self._indexing = threading.Lock()
        self._journals: dict[str, set[str]] = {}

    def shard_uri(self, part: Slice) -> str:
        """Return where the finished shard of `part` lies."""
        return posixpath.join(self.folder, f"{self._name(part)}.jsonl")

    def shard_key(self, part: Slice) -> str:
        """Return the content key of the finished shard of `part`."""
        return digest([self._settings_key, self._name(part)])[:32]

    def _name(self, part: Slice) -> str:
        return digest([part.sha256, self._variant])[:32]

    def _new_journal(self, name: str) -> str:
        return posixpath.join(self.folder, f"{name}.{uuid.uuid4().hex[:12]}.partial")

    def lacks(self, slices: Iterable[Slice]) -> bool:
        """Tell whether a finished shard of `slices` is not there."""
        return not {self.shard_uri(part) for part in slices} <= set(self.store.list(self.folder))

    def known(self, keys: Iterable[str]) -> set[str]:
        """Return those of `keys` under which something is kept, without reading what; a damaged outcome counts too."""
        index = self._indexed()
        return {key for key in keys if bytes.fromhex(key) in index}

    def was_kept(self, key: str) -> bool:
        """Tell whether something is kept under `key`, as far as that is known without looking into files."""
        return bytes.fromhex(key) in self._index

    def find(self, keys: Sequence[str]) -> dict[str, Outcome]:
        """Return the outcomes already known under `keys`; damaged ones count as unknown."""
        found, moved = self._find(keys, self._indexed())
        if moved:  # another run has finished a shard since, or made one again: look where its units are now
            found, moved = self._find(keys, self._indexed(again=True))
        with self._indexing:
            for key, place in moved.items():
                logger.warning("%s: the row at byte %d is damaged or gone and will be made again", *place[:2])
                if self._index.get(bytes.fromhex(key)) == place:  # and not made by another shard meanwhile
                    del self._index[bytes.fromhex(key)]
        return found

    def _find(self, keys: Sequence[str], index: dict[bytes, Place]) -> tuple[dict[str, Outcome], dict[str, Place]]:
        """Return what is found under `keys` where the index has it, and the places where something else is."""
        places = sorted((place, key) for key in keys if (place := index.get(bytes.fromhex(key))))
        found: dict[str, Outcome] = {}
        moved: dict[str, Place] = {}
        for uri, of_file in itertools.groupby(places, key=lambda place: place[0][0]):
            wanted = [(start, end, key) for (_, start, end), key in of_file]
            first = wanted[0][0]
            try:
                content = self.store.read_bytes(uri, first, wanted[-1][1])
            except FileNotFoundError:
                content = b""
            for start, end, key in wanted:
                decoded = _decode(content[start - first : end - first])
                if decoded is not None and decoded[0] == key:
                    found[key] = decoded[1]
                else:
                    moved[key] = (uri, start, end)
        return found, moved

    def _indexed(self, again: bool = False) -> dict[bytes, Place]:
        """Return where each unit is; `again` reads the files that are new or have changed since they were read."""
        with self._indexing:
            is_whole, self._is_current = self._is_current and not again, True
            try:
                while not is_whole:
                    # Another run may finish a shard meanwhile: then its journals are gone, and its file is found next.
                    files, _ = self.store.storage.scan(self.folder)
                    new = [stat for stat in files.values() if not stat.is_same(self._indexed_files.get(stat.uri))]
                    is_whole = all(self._add_to_index(stat) for stat in new)
            except BaseException:
                self._is_current = False  # what was not read would be paid for again
                raise
            return self._index

    def _add_to_index(self, stat: Stat) -> bool:
        """Add a file's units to the index; tell whether the file was still there."""
        uri = stat.uri
        part, _, rest = posixpath.basename(uri).partition(".")
        if "partial" in rest:
            self._journals.setdefault(part, set()).add(uri)
        position = 0
        try:
            for line in self.store.lines(uri):
                whole = line.startswith(b'{"key":"') and line.endswith(b"}\n") and len(line) > _HEAD
                if whole and not _may_pass(line):
                    with contextlib.suppress(ValueError):  # a damaged key is nobody's: its unit is made again
                        self._index[bytes.fromhex(line[8:72].decode())] = (uri, position, position + len(line))
                position += len(line)
        except FileNotFoundError:
            return False
        self._indexed_files[uri] = stat
        return True

    @asynccontextmanager
    async def journal(self, part: Slice) -> AsyncIterator["Journal"]:
        """Keep units as they finish; what was appended stays, however the block ends."""
        name = self._name(part)
        journal = Journal(self.store, self._new_journal(name), self._journals.setdefault(name, set()))
        try:
            yield journal
        except BaseException:
            self._is_current = False  # a retry must see what was kept
            raise
        finally:
            await journal.close()

    def commit(self, part: Slice, keys: Sequence[str], outcomes: dict[str, Outcome]) -> ShardRef:
        """Write the finished shard, units in input order, and drop its journals."""
        uri, position = self.shard_uri(part), 0
        places: dict[bytes, Place] = {}
        with self.store.writing(uri) as out:
            for key in keys:
                line = _encode(key, outcomes[key])
                if not _may_pass(line):
                    places[bytes.fromhex(key)] = (uri, position, position + len(line))
                position += len(line)
                out.write(line)
        with self._indexing:
            self._index.update(places)  # later shards with an equal unit find it here
        for file in self._journals.pop(self._name(part), set()):
            self.store.delete(file)
        failures = [outcomes[key] for key in keys if outcomes[key].error is not None]
        passing = sum(not outcome.final for outcome in failures)
        return ShardRef(uri=uri, failed=len(failures), passing=passing, **out.facts())

    def read_shard(self, shard: ShardRef) -> Iterator[tuple[str, Outcome]]:
        """Yield a shard's units in order; raises `PreflowError` if one is damaged."""
        for number, line in enumerate(self.store.lines(shard.uri), 1):
            decoded = _decode(line)
            if decoded is None:
                raise PreflowError(f"{shard.uri}:{number}: damaged; delete this file and run again")
            yield decoded

    def forget_failures(self) -> None:
        """Drop what failed for good, so that the next run tries it again; what succeeded stays."""
        for uri in self.store.list(self.folder):
            lines = list(self.store.lines(uri))
            kept = [line for line in lines if not (_may_pass(line) or line.startswith(b'{"final"', _HEAD))]
            if len(kept) == len(lines):
                continue
            part = posixpath.basename(uri).partition(".")[0]
            if kept:
                self.store.write_bytes(f"{self._new_journal(part)}.jsonl", b"".join(kept))
            self.store.delete(uri)
        self._index, self._indexed_files, self._is_current = {}, {}, False


class Journal:
    """Append-only units of a running shard: a local file, or on GCS an object every few seconds.

    A killed process loses, locally, nothing that was appended; on GCS at most SEGMENT_SECONDS of units.
    """

    def __init__(self, store: Workspace, stem: str, files: set[str]) -> None:
        self._store, self._stem, self._files = store, stem, files
        self._file: Any = None
        self._pending: list[bytes] = []
        self._segments = 0
        self._writing, self._ending = asyncio.Lock(), asyncio.Event()
        self._flushing: asyncio.Task[None] | None = None

    async def append(self, key: str, outcome: Outcome) -> None:
        """Keep one unit; raises `PreflowError` if it cannot be written, which a full disk is the usual reason for."""
        line = _encode(key, outcome)
        try:
            if self._store.is_local:
                self._append_line(line)
                return
            self._pending.append(line)
            if self._flushing is None or self._flushing.done():
                if self._flushing is not None:
                    self._flushing.result()  # raises what the bucket said
                self._flushing = asyncio.create_task(self._flush_regularly())
        except OSError as error:
            raise PreflowError(
                f"{self._stem}: an answer could not be written ({error}), so no more are asked for. All before it are "
                "kept: make room there and run again."
            ) from error

    def _append_line(self, line: bytes) -> None:
        if self._file is None:
            path = Path(f"{self._stem}.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            self._files.add(str(path))
        written = self._file.write(line)
        if written != len(line):
            raise OSError(f"{written} of {len(line)} bytes written: the disk is full")

    async def _flush_regularly(self) -> None:
        """Write what is pending some seconds after it came, also where nothing comes after it."""
        while self._pending:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), SEGMENT_SECONDS)
            await self._flush_segment()

    async def _flush_segment(self) -> None:
        """Write what is pending, in a thread: a bucket that is slow must not hold up the requests in flight."""
        async with self._writing:
            pending, self._pending = self._pending, []
            if not pending:
                return
            uri = f"{self._stem}-{self._segments:05d}.jsonl"
            self._segments += 1
            try:
                await asyncio.to_thread(self._store.write_bytes, uri, b"".join(pending))
            except BaseException:
                self._pending = pending + self._pending
                raise
            self._files.add(uri)

    @asynccontextmanager
    async def replaced(self) -> AsyncIterator[None]:
        """Write nothing during the block, after which a committed shard holds what is not written yet."""
        async with self._writing:
            yield
            self._pending = []

    async def close(self) -> None:
        """Write what is pending and close the file."""
        self._ending.set()
        if self._flushing is not None:
            await asyncio.gather(self._flushing, return_exceptions=True)
        await self._flush_segment()
        if self._file is not None:
            self._file.close()
