"""One trainer at a time: taking, keeping, losing and giving back the lease."""

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
from tasks.trainer.lease import Holder, Lease, LeaseLostError, SwapFile, is_dead, this_process
from tests.fakes.gcs import BUCKET, FakeGcs


@pytest.fixture(scope="module")
def gcs() -> Iterator[FakeGcs]:
    with FakeGcs() as fake:
        yield fake


@pytest.fixture(params=["local", "gcs"])
def make_file(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], SwapFile]:
    if request.param == "local":
        return lambda: SwapFile(str(tmp_path / "training" / "lease.json"))
    request.getfixturevalue("gcs")
    uri = f"gs://{BUCKET}/{uuid.uuid4().hex}/training/lease.json"
    return lambda: SwapFile(uri)


def ignore(*_: Any) -> None:
    """Take anything."""


def foreign(file: SwapFile, **changes: Any) -> None:
    """Let a trainer on another machine hold the lease."""
    values = {"token": 7, "owner": "other", "beat": 0, "process": "boot/elsewhere/1/2", **changes}
    _, version = file.read()
    assert file.swap(version, Holder(**values))


def test_a_swap_needs_the_version_that_was_read(make_file: Callable[[], SwapFile]) -> None:
    file, other = make_file(), make_file()
    _, version = file.read()
    holder = Holder(token=1, owner="a", beat=0, process="")
    assert file.swap(version, holder)
    assert not other.swap(version, Holder(token=1, owner="b", beat=0, process=""))
    assert other.read()[0] == holder


def test_of_many_at_once_one_gets_it(make_file: Callable[[], SwapFile]) -> None:
    make_file().read()
    barrier, won = threading.Barrier(4), []

    def contend(name: str) -> None:
        file = make_file()
        _, version = file.read()
        barrier.wait()
        if file.swap(version, Holder(token=1, owner=name, beat=0, process="")):
            won.append(name)

    threads = [threading.Thread(target=contend, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    holder = make_file().read()[0]
    assert holder is not None
    assert won == [holder.owner]


def test_tokens_grow_and_a_released_lease_is_free_at_once(make_file: Callable[[], SwapFile]) -> None:
    tokens = []
    for _ in range(3):
        lease = Lease(make_file(), 60, ignore)
        lease.acquire(ignore)
        tokens.append(lease.token)
        lease.release()
    assert tokens == [1, 2, 3]


def test_a_holder_that_lives_is_waited_for_and_a_silent_one_replaced(make_file: Callable[[], SwapFile]) -> None:
    file, told = make_file(), []
    foreign(file)
    lease = Lease(make_file(), 4.0, ignore)
    beats = threading.Event()

    def live() -> None:
        for beat in range(1, 6):
            time.sleep(0.5)
            foreign(file, beat=beat)
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
    file = SwapFile(str(tmp_path / "lease.json"))
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = this_process().split("/")
    started = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
    name = "/".join([*here[:2], str(child.pid), started])
    assert not is_dead(name)
    child.kill()
    child.wait()
    assert is_dead(name)
    foreign(file, process=name)
    before = time.monotonic()
    lease = Lease(file, 3600, ignore)
    lease.acquire(ignore)
    assert time.monotonic() - before < 5
    lease.release()


def test_a_reused_pid_is_another_process() -> None:
    here = this_process().split("/")
    assert not is_dead("/".join(here))
    assert is_dead("/".join([*here[:3], "1"]))
    assert not is_dead(f"another-boot/{here[1]}/{os.getpid()}/1"), "of another machine nothing is known"


def test_a_zombie_cannot_write(tmp_path: Path) -> None:
    file, lost = SwapFile(str(tmp_path / "lease.json")), threading.Event()
    zombie = Lease(file, 0.6, lost.set)
    zombie.acquire(ignore)
    store = Workspace(str(tmp_path), guard=zombie.check)
    store.write_bytes(store.uri("mine"), b"before")
    foreign(file, token=2)
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
    holder = file.read()[0]
    assert holder is not None
    assert (holder.owner, holder.released) == ("other", False)


def test_a_lease_lost_while_a_file_is_written_keeps_the_file_from_appearing(tmp_path: Path) -> None:
    file = SwapFile(str(tmp_path / "lease.json"))
    lease = Lease(file, 60, ignore)
    lease.acquire(ignore)
    store = Workspace(str(tmp_path), guard=lease.check)

    def write() -> None:
        with store.writing(store.uri("adapter")) as out:
            out.write(b"weights")
            foreign(file, token=2)

    with pytest.raises(LeaseLostError):
        write()
    assert store.list(store.root) == [store.uri("lease.json"), store.uri("lease.lock")]
    lease.release()


def test_a_torn_lease_file_counts_as_free(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "lease.json").write_text('{"token": 1, "ow')
    lease = Lease(SwapFile(str(tmp_path / "lease.json")), 60, ignore)
    lease.acquire(ignore)
    assert "damaged" in caplog.text
    lease.release()
