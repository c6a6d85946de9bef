"""One trainer at a time: taking, keeping, losing and giving back the lease."""

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.store.workspace import Workspace
from tasks.trainer.lease import Lease, LeaseLostError, is_dead, this_process
from tests.fakes.gcs import BUCKET, FakeGcs


@pytest.fixture(scope="module")
def gcs() -> Iterator[FakeGcs]:
    with FakeGcs() as fake:
        yield fake


@pytest.fixture(params=["local", "gcs"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "training" / "lease.json")
    request.getfixturevalue("gcs")
    return f"gs://{BUCKET}/{uuid.uuid4().hex}/training/lease.json"


def ignore(*_: Any) -> None:
    """Take anything."""


def foreign(uri: str, **changes: Any) -> None:
    """Let a trainer on another machine hold the lease."""
    store, values = Workspace.holding(uri), {"token": 7, "owner": "other", "beat": 0, "process": "boot/elsewhere/1/2"}
    assert store.swap(uri, json.dumps({**values, **changes}).encode(), store.storage.read_versioned(uri)[1])


def test_of_many_at_once_one_gets_it(uri: str) -> None:
    leases, barrier, taken = [Lease(uri, 2, ignore) for _ in range(4)], threading.Barrier(4), []

    def contend(lease: Lease) -> None:
        barrier.wait()
        lease.acquire(ignore)
        taken.append(lease.token)
        lease.release()

    threads = [threading.Thread(target=contend, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [1, 2, 3, 4], "one after the other"


def test_a_holder_that_lives_is_waited_for_and_a_silent_one_replaced(tmp_path: Path) -> None:
    told, uri = list[str](), str(tmp_path / "lease.json")
    foreign(uri)
    lease = Lease(uri, 3.0, ignore)
    beats = threading.Event()

    def live() -> None:
        for beat in range(1, 6):
            time.sleep(0.5)
            foreign(uri, beat=beat)
        beats.set()

    thread = threading.Thread(target=live)
    thread.start()
    lease.acquire(told.append)
    assert beats.is_set(), "it was taken from a trainer that lives"
    assert lease.token == 8
    assert "token 7" in told[0]
    thread.join()
    lease.release()


def test_a_dead_process_on_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    uri = str(tmp_path / "lease.json")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = this_process().split("/")
    assert not is_dead(this_process())
    assert is_dead("/".join([*here[:3], "1"])), "a pid that is used again is another process"
    assert not is_dead(f"another-boot/{here[1]}/{os.getpid()}/1"), "of another machine nothing is known"
    started = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
    name = "/".join([*here[:2], str(child.pid), started])
    assert not is_dead(name)
    child.kill()
    child.wait()
    assert is_dead(name)
    foreign(uri, process=name)
    before = time.monotonic()
    lease = Lease(uri, 3600, ignore)
    lease.acquire(ignore)
    assert time.monotonic() - before < 600  # the lease would have run out after an hour
    lease.release()


def test_a_zombie_cannot_write(tmp_path: Path) -> None:
    uri, lost = str(tmp_path / "lease.json"), threading.Event()
    zombie = Lease(uri, 0.6, lost.set)
    zombie.acquire(ignore)
    store = Workspace(str(tmp_path), guard=zombie.check)
    store.write_bytes(store.uri("mine"), b"before")
    foreign(uri, token=2)
    with pytest.raises(LeaseLostError, match=r"token 1.*token 2"):
        store.write_bytes(store.uri("mine"), b"after")
    with pytest.raises(LeaseLostError), store.writing(store.uri("late")) as out:
        out.write(b"never seen")
    with pytest.raises(LeaseLostError):
        store.delete(store.uri("mine"))
    assert store.read_bytes(store.uri("mine")) == b"before"
    assert not store.exists(store.uri("late"))
    assert lost.wait(5), "the heartbeat notices and stops the trainer"
    zombie.release()
    holder = json.loads(Path(uri).read_text())
    assert holder["owner"] == "other", "nobody else's lease is given back"


def test_a_beat_whose_answer_was_lost_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, lost = str(tmp_path / "lease.json"), threading.Event()
    lease = Lease(uri, 0.6, ignore)
    lease.acquire(ignore)
    original: Callable[..., object] = Workspace.swap

    def swap(store: Workspace, *arguments: Any) -> object:
        found = original(store, *arguments)
        if not lost.is_set():
            lost.set()
            raise OSError("the bucket did not do it")
        return found

    monkeypatch.setattr(Workspace, "swap", swap)
    assert lost.wait(10)
    before, deadline = json.loads(Path(uri).read_text())["beat"], time.monotonic() + 10
    while json.loads(Path(uri).read_text())["beat"] < before + 2:
        assert time.monotonic() < deadline, "the trainer lives, and looks dead"
        time.sleep(0.05)
    lease.release()
    assert json.loads(Path(uri).read_text())["released"]


def test_a_torn_lease_file_counts_as_free(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "lease.json").write_text('{"token": 1, "ow')
    lease = Lease(str(tmp_path / "lease.json"), 60, ignore)
    lease.acquire(ignore)
    assert "damaged" in caplog.text
    lease.release()
