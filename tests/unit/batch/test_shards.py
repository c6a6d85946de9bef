"""Rows that are paid for: none lost, none twice, none under another's key."""

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tasks.batch import rows as rows_module
from tasks.batch.rows import Outcome, RowStore, ShardRef, Slice, read_slice, shard_rows, slice_rows, writable
from tasks.batch.shards import ShardWorker, Tally, TooManyFailures, merge_shards, settle
from tasks.errors import PreflowError
from tasks.store import local
from tasks.store.storage import Stat
from tasks.store.workspace import PromptsRef, Row, Workspace, digest
from tests.deployed import until


def make_source(folder: Path, count: int, first: int = 0) -> PromptsRef:
    store = Workspace(folder)
    with store.writing(store.uri(f"rows-{first}-{count}.jsonl")) as out:
        for number in range(first, first + count):
            out.write_row({"id": digest(number), "number": number, "text": "é" * (number % 7)})
    return PromptsRef(uri=store.uri(f"rows-{first}-{count}.jsonl"), **out.facts())


def load(path: str | Path) -> bytes:
    return Path(path).read_bytes()


def save(path: str | Path, content: bytes) -> None:
    Path(path).write_bytes(content)


def journals(folder: Path) -> list[Path]:
    return list(folder.rglob("*.partial.jsonl"))


class Maker:
    """Makes units and remembers which; numbers in `bad` fail for good, those in `broken` raise."""

    def __init__(self, bad: Iterable[int] = (), broken: Iterable[int] = (), final: bool = False) -> None:
        self.bad, self.broken, self.final = set(bad), set(broken), final or None
        self.made: Counter[int] = Counter()

    async def work(self, row: Row) -> Outcome:
        self.made[row["number"]] += 1
        await asyncio.sleep(random.random() / 1000)
        if row["number"] in self.broken:
            raise ConnectionError(f"broken at {row['number']}")
        if row["number"] in self.bad:
            return Outcome(final=self.final, error={"id": row["id"], "reason": "bad"}, usage={"requests": 1})
        return Outcome(row={"id": row["id"], "square": row["number"] ** 2}, usage={"requests": 1})


def unit(row: Row) -> dict[str, Row]:
    return {row["id"]: row}


async def ready() -> None:
    return None


def make_worker(folder: Path, maker: Maker, rows: int, **more: Any) -> ShardWorker:
    tally = Tally(rows=rows, allowed=more.pop("allowed", 1.0))
    return ShardWorker(
        rows=RowStore(str(folder), "squares", "key"), units_of=more.pop("units_of", unit), tally=tally,
        work=more.pop("work", maker.work), concurrency=more.pop("concurrency", 4), prepare=more.pop("prepare", ready),
        **more,
    )  # fmt: skip


async def run_all(folder: Path, maker: Maker, source: PromptsRef, size: int = 10, **more: Any) -> list[ShardRef]:
    slices = slice_rows(Workspace(folder), source, size)
    worker = make_worker(folder, maker, source.rows, **more)
    return await worker.run_all(slices, worker.run)


def merged(folder: Path, source: PromptsRef, shards: list[ShardRef], size: int = 10) -> list[tuple[int, Any]]:
    slices = slice_rows(Workspace(folder), source, size)
    rows = RowStore(str(folder), "squares", "key")
    return [
        (row["number"], outcomes[0].row["square"] if outcomes[0].row else None)
        for row, outcomes in merge_shards(slices, shards, rows, unit)
    ]


# ---- cutting


@pytest.mark.parametrize("total", [1, 7, 8, 15, 127, 128, 1021, 10_028, 100_000, 999_999, 5_000_000])
def test_shards_are_neither_too_many_nor_too_few(total: int) -> None:
    size = shard_rows(total, None)
    count = -(-total // size)
    assert 1 <= size <= 1000
    assert count >= min(8, total)
    assert count <= 1000 or size == 1000
    assert size >= 64 or count <= 8 + 7
    assert shard_rows(total, 3) == 3, "a wanted size is taken"


def test_slices_are_the_whole_file_in_order_and_one_that_changed_is_refused(tmp_path: Path) -> None:
    source, store = make_source(tmp_path, 103), Workspace(tmp_path)
    slices = slice_rows(store, source, 10)
    assert [part.rows for part in slices] == [10] * 10 + [3]
    assert [row["number"] for part in slices for row in read_slice(store, part)] == list(range(103))
    assert len({part.sha256 for part in slices}) == 11
    save(source.uri, load(source.uri).replace(b'"number": 15', b'"number": 51'))
    with pytest.raises(PreflowError, match="changed while it was being read"):
        read_slice(store, slices[1])


class Stragglers(Maker):
    """Makes each tenth unit only once all `others` are made."""

    def __init__(self, others: int) -> None:
        super().__init__()
        self._others, self.go_on = others, asyncio.Event()

    async def work(self, row: Row) -> Outcome:
        if row["number"] % 10 == 5:
            await self.go_on.wait()
        outcome = await super().work(row)
        if len(self.made) == self._others:
            self.go_on.set()
        return outcome


async def test_the_window_is_full_however_long_single_units_take(tmp_path: Path) -> None:
    source = make_source(tmp_path, 60)
    async with asyncio.timeout(20):
        await run_all(tmp_path, Stragglers(others=54), source)


async def test_no_more_shards_are_open_than_memory_allows(tmp_path: Path) -> None:
    source, opened, maker = make_source(tmp_path, 200), list[int](), Stragglers(others=200)
    slices = slice_rows(Workspace(tmp_path), source, 10)
    worker = make_worker(tmp_path, maker, 200)

    async def run_one(part: Slice) -> ShardRef:
        opened.append(part.index)
        return await worker.run(part)

    running = asyncio.create_task(worker.run_all(slices, run_one))
    await asyncio.to_thread(until, lambda: len(opened) >= 6)
    await asyncio.sleep(0.3)
    assert opened == list(range(6)), "8 windows of 4 units are 4 shards, and two for the ends"
    maker.go_on.set()
    await running
    assert opened == list(range(20))


# ---- making and finding again


async def test_every_row_is_made_once_and_joined_to_its_own_input(tmp_path: Path) -> None:
    source, maker = make_source(tmp_path, 97), Maker()
    shards = await run_all(tmp_path, maker, source)
    assert merged(tmp_path, source, shards) == [(n, n * n) for n in range(97)]
    assert set(maker.made.values()) == {1}
    assert not journals(tmp_path), "journals go when their shard is finished"


@pytest.mark.parametrize("torn", [0, 20])
async def test_what_was_finished_before_an_error_is_not_made_again(tmp_path: Path, torn: int) -> None:
    source, maker = make_source(tmp_path, 60), Maker(broken={17, 42})
    with pytest.raises(ConnectionError, match="broken at"):
        await run_all(tmp_path, maker, source)
    finished = {number for number in maker.made if number not in maker.broken}
    assert len(finished) > 30
    for journal in journals(tmp_path):
        save(journal, load(journal)[: -torn or None])
    again, lost = Maker(), len(journals(tmp_path)) if torn else 0
    shards = await run_all(tmp_path, again, source)
    assert len(finished & set(again.made)) == lost, "a torn last line costs one row, and nothing else is made again"
    assert merged(tmp_path, source, shards) == [(n, n * n) for n in range(60)]


async def test_a_retry_in_the_same_process_sees_the_journal_and_counts_each_unit_once(tmp_path: Path) -> None:
    source, maker = make_source(tmp_path, 10), Maker(broken={5})
    worker = make_worker(tmp_path, maker, 10)
    (part,) = slice_rows(Workspace(tmp_path), source, 10)
    with pytest.raises(ConnectionError):
        await worker.run(part)
    maker.broken.clear()
    shard = await worker.run(part)
    worker.tally.take(part, shard)
    assert maker.made == Counter({**dict.fromkeys(range(10), 1), 5: 2})
    assert (worker.tally.done, worker.tally.total) == (10, 10)


async def test_another_shard_size_and_added_rows_repeat_nothing(tmp_path: Path) -> None:
    await run_all(tmp_path, Maker(), make_source(tmp_path, 50), size=10)
    more, maker = make_source(tmp_path, 80), Maker()
    shards = await run_all(tmp_path, maker, more, size=13)
    assert sorted(maker.made) == list(range(50, 80))
    assert merged(tmp_path, more, shards, 13) == [(n, n * n) for n in range(80)]


@pytest.mark.parametrize("seed", range(6))
async def test_damaged_rows_are_made_again_and_never_wrong(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    source = make_source(tmp_path, 40)
    (shard,) = await run_all(tmp_path, Maker(), source, size=40)
    content = bytearray(load(shard.uri))
    if seed % 2:
        del content[rng.randrange(len(content)) :]
    for _ in range(5):
        if content:
            content[rng.randrange(len(content))] = rng.randrange(256)
    save(shard.uri, bytes(content))
    maker = Maker()
    shards = await run_all(tmp_path, maker, source, size=40)
    assert maker.made, "nothing was noticed"
    assert merged(tmp_path, source, shards, 40) == [(n, n * n) for n in range(40)]


async def test_many_damaged_shards_take_each_file_to_be_read_a_few_times_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local, "SETTLED_SECONDS", -1.0)
    source, count = make_source(tmp_path, 80), 40
    for shard in await run_all(tmp_path, Maker(), source, size=2):
        save(shard.uri, load(shard.uri).replace(b'"square"', b'"squore"', 1))
    read, lines = Counter[str](), Workspace.lines
    monkeypatch.setattr(Workspace, "lines", lambda self, uri, *part: read.update([uri]) or lines(self, uri, *part))
    maker = Maker()
    shards = await run_all(tmp_path, maker, source, size=2, concurrency=1)
    assert maker.made.total() == count
    del read[source.uri]
    assert max(read[shard.uri] for shard in shards) <= 3
    assert read.total() < 5 * count, "whatever is read again for each damaged shard is read a thousand times"
    assert caplog.text.count("damaged or gone") == count
    assert merged(tmp_path, source, shards, 2) == [(n, n * n) for n in range(80)]


async def test_a_row_moved_under_another_key_is_not_believed(tmp_path: Path) -> None:
    source = make_source(tmp_path, 2)
    (shard,) = await run_all(tmp_path, Maker(), source, size=2)
    content = load(shard.uri)
    a, b = digest(0).encode(), digest(1).encode()
    save(shard.uri, content.replace(b'{"key":"' + a, b'{"key":"' + b, 1))
    maker = Maker()
    shards = await run_all(tmp_path, maker, source, size=2)
    assert maker.made
    assert merged(tmp_path, source, shards, 2) == [(0, 0), (1, 1)]


async def test_on_a_bucket_a_unit_is_kept_after_seconds_though_the_next_one_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "SEGMENT_SECONDS", 0.05)
    source, maker = make_source(tmp_path, 3), Maker()
    worker = make_worker(tmp_path, maker, 3)
    worker.rows.store.is_local = False  # as a bucket's, whose files are written whole
    (part,) = slice_rows(Workspace(tmp_path), source, 3)
    kept: list[set[str]] = []

    def both() -> set[str]:
        found = RowStore(str(tmp_path), "squares", "key").known(map(digest, range(3)))
        return found if len(found) == 2 else set()

    async def work(row: Row) -> Outcome:
        if row["number"] == 2:
            kept.append(await asyncio.to_thread(until, both))
        return await maker.work(row)

    worker.work = work
    await worker.run(part)
    assert kept == [{digest(0), digest(1)}]
    assert not journals(tmp_path)


@pytest.mark.parametrize(("other", "times", "shards"), [(("another key", ""), 2, 1), (("key", "variant"), 1, 2)])
async def test_unequal_settings_share_nothing_and_variants_all_but_their_shards(
    tmp_path: Path, other: tuple[str, str], times: int, shards: int
) -> None:
    source, maker = make_source(tmp_path, 5), Maker()
    await run_all(tmp_path, maker, source)
    worker = make_worker(tmp_path, maker, 5)
    worker.rows = RowStore(str(tmp_path), "squares", *other)
    await worker.run(slice_rows(Workspace(tmp_path), source, 10)[0])
    assert set(maker.made.values()) == {times}
    assert len(os.listdir(tmp_path / "rows" / "squares" / other[0])) == shards


# ---- merging


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shard, other: other, "lacks 1 of its rows"),
        (lambda shard, other: shard + other[: other.index(b"\n") + 1], "holds 1 rows of others"),
        (lambda shard, other: shard.replace(b'"square": 81', b'"square": 82'), r":10: damaged"),
    ],
    ids=["of other rows", "more than its rows", "damaged"],
)
async def test_a_shard_that_is_not_its_slice_s_is_refused(
    tmp_path: Path, change: Callable[[bytes, bytes], bytes], message: str
) -> None:
    source = make_source(tmp_path, 10)
    (shard,) = await run_all(tmp_path, Maker(), source)
    (other,) = await run_all(tmp_path, Maker(), make_source(tmp_path, 10, first=10))
    save(shard.uri, change(load(shard.uri), load(other.uri)))
    with pytest.raises(PreflowError, match=message):
        merged(tmp_path, source, [shard])


# ---- failures, stopping, preparing


@pytest.mark.parametrize("final", [False, True])
async def test_a_failure_that_may_pass_is_made_again_at_the_next_start_and_a_final_one_when_it_is_forgotten(
    tmp_path: Path, final: bool
) -> None:
    source, maker = make_source(tmp_path, 30), Maker(bad={3, 4, 15}, final=final)
    shards = await run_all(tmp_path, maker, source)
    assert [(shard.failed, shard.passing) for shard in shards] == [(2, 2 * (not final)), (1, not final), (0, 0)]
    assert dict(merged(tmp_path, source, shards))[3] is None
    again = Maker()
    if final:
        await run_all(tmp_path, again, source)
        assert not again.made
        RowStore(str(tmp_path), "squares", "key").forget_failures()
    shards = await run_all(tmp_path, again, source)
    assert sorted(again.made) == [3, 4, 15]
    assert merged(tmp_path, source, shards) == [(n, n * n) for n in range(30)]


async def test_too_many_failures_stop_the_stage_early_and_a_few_do_not(tmp_path: Path) -> None:
    source, maker = make_source(tmp_path, 1000), Maker(bad=set(range(1000)))
    with pytest.raises(TooManyFailures, match="11 of 1000 failed for good"):
        await run_all(tmp_path, maker, source, size=100, allowed=0.01)
    assert maker.made.total() <= 11 + 2 * 4, "requests went on after the stop"
    shards = await run_all(tmp_path / "few", Maker(bad=set(range(10))), source, size=100, allowed=0.01)
    assert sum(shard.failed for shard in shards) == 10


async def test_preparation_comes_once_before_the_first_unit_and_only_if_there_is_one(tmp_path: Path) -> None:
    events: list[str] = []

    async def prepare() -> None:
        await asyncio.sleep(0.01)
        events.append("prepared")

    async def fail() -> None:
        events.append("tried")
        raise PreflowError("no such model")

    source, maker = make_source(tmp_path, 30), Maker()
    with pytest.raises(PreflowError, match="no such model"):
        await run_all(tmp_path, maker, source, prepare=fail)
    assert (events, maker.made.total()) == (["tried"], 0)
    await run_all(tmp_path, maker, source, prepare=prepare, watch=lambda: events.append("made"))
    assert events == ["tried", "prepared", *["made"] * 30]
    await run_all(tmp_path, maker, source, prepare=prepare)
    assert len(events) == 32
    assert events.count("prepared") == 1


async def test_a_full_disk_stops_the_stage_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, append = list[bytes](), rows_module.Journal._append_line

    def append_until_full(self: Any, line: bytes) -> None:
        written.append(line)
        if len(written) > 15:
            raise OSError(28, "No space left on device")
        append(self, line)

    monkeypatch.setattr(rows_module.Journal, "_append_line", append_until_full)
    source, maker = make_source(tmp_path, 200), Maker()
    with pytest.raises(PreflowError, match=r"No space left on device.*All before it are kept: make room"):
        await run_all(tmp_path, maker, source, size=50)
    assert maker.made.total() <= 15 + 2 * 4
    monkeypatch.undo()
    again = Maker()
    shards = await run_all(tmp_path, again, source, size=50)
    assert len(again.made) == 200 - 15
    assert merged(tmp_path, source, shards, 50) == [(n, n * n) for n in range(200)]


@pytest.mark.parametrize(("window", "rows", "size", "wanted"), [(4, 200, 50, 8), (100, 100, 100, 99)])
async def test_units_under_way_are_twice_the_window_and_only_the_first_is_made_alone(
    tmp_path: Path, window: int, rows: int, size: int, wanted: int
) -> None:
    """Those that wait while the first one is made go on together, or a large window would begin one by one."""
    running = most = begun = 0
    full = asyncio.Event()

    async def work(row: Row) -> Outcome:
        nonlocal running, most, begun
        running, begun = running + 1, begun + 1
        most = max(most, running)
        if most >= wanted:
            full.set()
        if begun > 1:
            await asyncio.wait_for(full.wait(), 30)
        for _ in range(20):  # one too many would begin meanwhile
            await asyncio.sleep(0)
        running -= 1
        return Outcome(row={"id": row["id"]})

    await run_all(tmp_path, Maker(), make_source(tmp_path, rows), size=size, concurrency=window, work=work)
    assert most == wanted


async def test_after_an_error_nothing_new_starts_and_what_runs_goes_on_to_its_end() -> None:
    ended: list[int] = []

    async def run(number: int) -> None:
        await asyncio.sleep(0.01 * (number + 1))
        if number == 0:
            raise ValueError("first")
        ended.append(number)

    with pytest.raises(ValueError, match="first"):
        await settle((run(number) for number in range(10)), limit=3)
    assert ended == [1, 2]


def test_text_that_no_file_can_hold_is_replaced() -> None:
    assert writable("a\ud800b é") == "a?b é"
    json.dumps(writable("\udfff"), ensure_ascii=False).encode()


# ---- equal units


def unit_of_three(row: Row) -> dict[str, Row]:
    return {digest(f"kind {row['number'] % 3}"): {**row, "number": row["number"] % 3}}


@pytest.mark.parametrize("size", [1, 4, 25])
async def test_equal_units_are_made_once_and_every_row_gets_them(tmp_path: Path, size: int) -> None:
    source, maker = make_source(tmp_path, 25), Maker()
    slices = slice_rows(Workspace(tmp_path), source, size)
    for _ in range(2):  # the second time nothing is left to make
        worker = make_worker(tmp_path, maker, 25, units_of=unit_of_three)
        shards: list[ShardRef] = await settle((worker.run(part) for part in slices), 3)
    assert maker.made == {0: 1, 1: 1, 2: 1}
    rows = RowStore(str(tmp_path), "squares", "key")
    found = list(merge_shards(slices, shards, rows, unit_of_three, lambda row, outcome: Outcome(
        row={"number": row["number"], **(outcome.row or {})}, usage=outcome.usage)))  # fmt: skip
    assert [row["number"] for row, _ in found] == list(range(25))
    assert all(made[0].row and made[0].row["square"] == (row["number"] % 3) ** 2 for row, made in found)
    assert sum(made[0].usage.requests for _, made in found) == 3


async def test_a_unit_that_was_kept_since_its_shard_looked_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, maker = make_source(tmp_path, 6), Maker()
    worker = make_worker(tmp_path, maker, 6, units_of=unit_of_three)
    first, second = slice_rows(Workspace(tmp_path), source, 3)
    await worker.run(first)
    find, looks = worker.rows.find, list[int]()
    monkeypatch.setattr(worker.rows, "find", lambda keys: find(keys) if looks else looks.append(1) or {})
    await worker.run(second)
    assert maker.made == {0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize("looked_before", [False, True])
async def test_a_shard_that_another_run_finishes_while_its_files_are_read_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_before: bool
) -> None:
    """Runs on several machines sample parts of one file: the others' journals go at any moment."""
    source = make_source(tmp_path, 6)
    (part,) = slice_rows(Workspace(tmp_path), source, 6)
    other, keys = RowStore(str(tmp_path), "squares", "key"), list[str]()
    outcomes = {digest(number): Outcome(row={"square": number}) for number in range(3)}
    async with other.journal(part) as journal:
        for key, outcome in outcomes.items():
            await journal.append(key, outcome)
    mine = RowStore(str(tmp_path), "squares", "key")
    if looked_before:
        assert mine.known(outcomes) == outcomes.keys()
        other.commit(part, list(outcomes), outcomes)
        keys.extend(outcomes)
    scan = mine.store.storage.scan

    def scan_and_lose(folder: str) -> tuple[dict[str, Stat], list[str]]:
        found = scan(folder)
        if not keys:
            keys.extend(outcomes)
            other.commit(part, keys, outcomes)
        return found

    monkeypatch.setattr(mine.store.storage, "scan", scan_and_lose)
    assert mine.find(list(outcomes)) == outcomes


@pytest.mark.parametrize("broken", ["scan", "open"])
async def test_a_bucket_that_fails_while_the_files_are_read_loses_no_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    source = make_source(tmp_path, 6)
    await run_all(tmp_path, Maker(), source, size=2)
    again = RowStore(str(tmp_path), "squares", "key")
    with monkeypatch.context() as patch:
        patch.setattr(again.store.storage, broken, lambda *_: (_ for _ in ()).throw(ConnectionError("503")))
        with pytest.raises(ConnectionError):
            again.find([digest(0)])
    assert len(again.find([digest(number) for number in range(6)])) == 6


def test_a_shard_that_another_run_has_made_again_is_read_where_its_units_are_now(tmp_path: Path) -> None:
    (part,) = slice_rows(Workspace(tmp_path), make_source(tmp_path, 6), 6)
    mine, other = (RowStore(str(tmp_path), "squares", "key") for _ in range(2))
    outcomes = {digest(number): Outcome(row={"square": number}) for number in range(3)}
    other.commit(part, list(outcomes)[1:], outcomes)
    assert mine.known(list(outcomes)[1:])
    other.commit(part, list(outcomes), outcomes)
    assert mine.find(list(outcomes)[1:]) == dict(list(outcomes.items())[1:])


async def test_a_unit_that_fails_fails_for_the_shard_that_waits_for_it_too(tmp_path: Path) -> None:
    source, maker = make_source(tmp_path, 6), Maker(broken={0, 1, 2})
    worker = make_worker(tmp_path, maker, 6, units_of=unit_of_three)
    slices = slice_rows(Workspace(tmp_path), source, 3)
    results = await asyncio.gather(*(worker.run(part) for part in slices), return_exceptions=True)
    assert all(isinstance(result, ConnectionError) for result in results)
    maker.broken.clear()
    await settle(worker.run(part) for part in slices)
    assert journals(tmp_path) == []
