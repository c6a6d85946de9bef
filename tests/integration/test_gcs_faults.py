"""A workspace on a bucket that fails in every way: what is written is whole, and nobody's update is lost."""

import hashlib
import random
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tasks.config import PromotionConfig
from tasks.errors import PreflowError
from tasks.promote.pointer import move_pointer, read_pointer
from tasks.store import gcs
from tasks.store.workspace import COMMITTED, AdapterRef, EvaluationRef, Workspace, folder_digest
from tests.fakes.gcs import BUCKET, FakeGcs
from tests.fakes.gcs_plan import FAULTS

ALL_FAULTS = dict.fromkeys(FAULTS, 0.05)
SLOW = {"slow_seconds": 0.2, "retry_after": 1}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeGcs]:
    with FakeGcs({"faults": ALL_FAULTS, **SLOW}, tmp_path_factory.mktemp("gcs")) as fake:
        yield fake


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the waits between attempts, those that the bucket asks for too; their growth stays."""
    monkeypatch.setitem(gcs.POLICY, "retry", gcs.RETRY.with_delay(initial=0.02, maximum=1.0))
    monkeypatch.setattr(gcs, "LONGEST_RETRY_AFTER", 0.1)


@pytest.fixture
def store(faulty: FakeGcs) -> Workspace:
    return Workspace(f"gs://{BUCKET}/{uuid.uuid4().hex}")


def put(faulty: FakeGcs, store: Workspace, name: str, content: bytes) -> None:
    """Bring an object there as `gcloud storage cp` would: without our metadata."""
    params = {"uploadType": "media", "name": f"{store.root.removeprefix(f'gs://{BUCKET}/')}/{name}"}
    url = f"{faulty.healthy}/upload/storage/v1/b/{BUCKET}/o"
    httpx.post(url, params=params, content=content).raise_for_status()


def make_folder(folder: Path, files: int) -> dict[str, bytes]:
    rng = random.Random(7)
    contents = {f"part-{number:02d}.bin": rng.randbytes(rng.randint(0, 40_000)) for number in range(files)}
    contents["nested/deep file é.json"] = b"{}\r\n--==0==\r\n"
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return contents


def test_what_goes_up_comes_down_whatever_goes_wrong(faulty: FakeGcs, tmp_path: Path) -> None:
    # What goes wrong is drawn by the objects' names: under these every kind does.
    store = Workspace(f"gs://{BUCKET}/every-fault-5")
    contents = make_folder(tmp_path / "local", 40)
    before = len(faulty.requests())
    store.commit_folder(tmp_path / "local", store.uri("folder"))
    store.verify_folder(store.uri("folder"))
    fetched = store.fetch_folder(store.uri("folder"), tmp_path / "fetched")
    assert {name: (fetched / name).read_bytes() for name in contents} == contents
    met = {row["fault"] for row in faulty.requests()[before:]}
    assert {"unavailable", "error_500", "rate_limit", "cut_upload", "cut_download", "lost_reply"} <= met
    store.delete_folder(store.uri("folder"))
    assert faulty.objects(store.root.removeprefix(f"gs://{BUCKET}/")) == {}


def test_lines_and_parts_are_read_whole_in_spite_of_cuts(store: Workspace) -> None:
    rows = [f"row {number} \r {'x' * (number % 300)}\n".encode() for number in range(3000)]
    store.write_bytes(store.uri("rows"), b"".join(rows))
    for _ in range(5):
        assert list(store.lines(store.uri("rows"))) == rows
    starts = [sum(map(len, rows[:number])) for number in range(0, 3000, 500)]
    for number, start in enumerate(starts):
        row = rows[number * 500]
        assert list(store.lines(store.uri("rows"), start, start + len(row) + 3)) == [row, b"row"]
        assert store.read_bytes(store.uri("rows"), start, start + 10) == b"".join(rows)[start : start + 10]
    assert store.read_bytes(store.uri("rows"), 10**9, 10**9 + 5) == b""


def test_digests_come_with_the_objects_and_are_read_once_where_they_do_not(
    store: Workspace, faulty: FakeGcs, tmp_path: Path
) -> None:
    make_folder(tmp_path, 2)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    put(faulty, store, "adapter_model.safetensors", b"weights")

    def downloads() -> int:
        rows = [row for row in faulty.requests() if row["operation"] == "download"]
        return sum(row["name"].startswith(store.root.rpartition("/")[2]) and row["fault"] is None for row in rows)

    expected = folder_digest(str(tmp_path))
    assert [folder_digest(store.root) for _ in range(3)] == [expected] * 3
    assert downloads() == 1
    store.write_bytes(store.uri("adapter_model.safetensors"), b"weights")
    assert folder_digest(store.root) == expected
    assert downloads() == 1
    put(faulty, store, "adapter_model.safetensors", b"others!")
    assert folder_digest(store.root) != expected


def test_a_damaged_object_is_noticed(store: Workspace, faulty: FakeGcs, tmp_path: Path) -> None:
    make_folder(tmp_path / "local", 3)
    store.commit_folder(tmp_path / "local", store.uri("folder"))
    content = bytearray((tmp_path / "local" / "part-01.bin").read_bytes())
    content[0] ^= 1
    put(faulty, store, "folder/part-01.bin", bytes(content))
    with pytest.raises(PreflowError, match=r"part-01\.bin: damaged"):
        store.verify_folder(store.uri("folder"))
    with pytest.raises(PreflowError, match=r"part-01\.bin: damaged"):
        store.fetch_folder(store.uri("folder"), tmp_path / "fetched")
    store.delete(store.uri("folder", "part-01.bin"))
    with pytest.raises(PreflowError, match=r"part-01\.bin: missing"):
        store.fetch_folder(store.uri("folder"), tmp_path / "fetched again")


def test_an_upload_that_is_altered_on_its_way_is_refused(store: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_bytes(store.uri("file"), b"old")
    with store.writing(store.uri("fine")) as out:
        out.write(b"fine")
    with monkeypatch.context() as patch:
        patch.setattr("google.cloud.storage._media._helpers.prepare_checksum_digest", lambda _: "AAAAAA==")
        with pytest.raises(OSError, match=r"CRC32C doesn't match"):
            store.write_bytes(store.uri("file"), b"new")
    assert store.read_bytes(store.uri("file")) == b"old"


def evaluation(of: AdapterRef) -> EvaluationRef:
    return EvaluationRef(
        uri="win_rate.json", sha256="0" * 64, size=1, rows=800, adapter_sha256=of.sha256, win_rate=0.6, lower=0.55,
        upper=0.7,
    )  # fmt: skip


@pytest.mark.parametrize("place", ["local", "bucket"])
def test_of_many_movers_of_a_pointer_none_is_lost(place: str, request: Any, tmp_path: Path) -> None:
    workspace = str(tmp_path) if place == "local" else request.getfixturevalue("store").root
    promotion = PromotionConfig(name="mine", endpoint=None)

    def promote(number: int) -> str:
        adapter = AdapterRef(uri="elsewhere", sha256=hashlib.sha256(bytes([number])).hexdigest(), size=1, rows=1)
        made = move_pointer(adapter, evaluation(adapter), "installed", workspace, promotion)
        assert made.adapter_sha256 == adapter.sha256, "what another mover did was taken for this one's"
        return adapter.sha256

    with ThreadPoolExecutor(6) as pool:
        promoted = list(pool.map(promote, range(12)))
    pointer = read_pointer(workspace, "mine")
    assert pointer is not None
    stands = [pointer.current, *pointer.history]
    assert {entry.adapter_sha256 for entry in stands} == set(promoted)
    # On a bucket a move whose answer is lost, and which another one follows at once, is written down twice.
    assert len(stands) == len(promoted) if place == "local" else len(stands) >= len(promoted)


def test_a_swap_whose_answer_was_lost_still_counts(tmp_path: Path) -> None:
    """The second attempt meets the first one's object, with 412."""
    store = Workspace(f"gs://{BUCKET}/swaps")
    with FakeGcs({"faults": {"lost_reply": 0.4}}, tmp_path) as fake:
        for number in range(6):
            uri = store.uri(f"swap-{number}")
            first = store.swap(uri, b"one", store.storage.read_versioned(uri)[1])
            assert first is not None
            assert store.swap(uri, b"two", first) is not None
            assert store.swap(uri, b"three", first) is None
            assert store.storage.read_versioned(uri)[0] == b"two"
        assert any(row["fault"] == "lost_reply" for row in fake.requests() if row["conditional"])


def test_a_reader_never_sees_a_folder_that_is_not_whole(store: Workspace, tmp_path: Path) -> None:
    make_folder(tmp_path / "local", 30)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(store.commit_folder, tmp_path / "local", store.uri("folder"))
        while not writing.done():
            if store.exists(store.uri("folder", COMMITTED)):
                store.verify_folder(store.uri("folder"))
            time.sleep(0.01)
    assert writing.result() == store.sha256(store.uri("folder", COMMITTED))


def test_a_bucket_that_is_not_there_is_named(faulty: FakeGcs) -> None:
    with pytest.raises(PreflowError, match=r"gs://no-such-bucket/ws: cannot be written .*no such object or bucket"):
        Workspace("gs://no-such-bucket/ws").check_writable()


def test_a_bucket_that_stays_down_is_given_up(faulty: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setitem(gcs.POLICY, "retry", gcs.RETRY.with_timeout(1.0))
    with pytest.raises(OSError, match="the bucket did not do it"):
        Workspace(f"gs://{BUCKET}/x").exists(f"gs://{BUCKET}/x/file")


def test_what_is_listed_is_what_is_there(store: Workspace) -> None:
    for name in ("a/one", "a/two", "a/b/three", "ab/four"):
        store.write_bytes(store.uri(name), name.encode())
    assert store.list(store.uri("a")) == [store.uri("a/one"), store.uri("a/two")]
    assert store.folders(store.uri("a")) == ["b"]
    assert store.folders(store.root) == ["a", "ab"]
    assert store.storage.stat(store.uri("a")) is None
    stat = store.storage.stat(store.uri("a/one"))
    assert stat is not None
    assert (stat.uri, stat.size, stat.sha256) == (store.uri("a/one"), 5, hashlib.sha256(b"a/one").hexdigest())
    with suppress(RuntimeError), store.writing(stat.uri) as out:
        out.write(b"half")
        raise RuntimeError("half way")
    assert store.read_bytes(stat.uri) == b"a/one"
    store.delete(stat.uri)
    assert not store.exists(stat.uri)
