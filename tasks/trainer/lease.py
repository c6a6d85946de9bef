"""One trainer at a time: a lease in the workspace with a heartbeat and a fencing token."""

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tasks.store.workspace import Workspace

LOG = logging.getLogger(__name__)

HEARTBEATS_PER_LEASE = 6


class LeaseLostError(Exception):
    """Another trainer has taken over; this one must not write any more."""


@dataclass(frozen=True)
class Holder:
    """What the lease file says. `token` grows with every change of hands, `beat` with every sign of life."""

    token: int
    owner: str
    beat: int
    process: str
    released: bool = False


def this_process() -> str:
    """Name this process so that another one on the same machine can see whether it still lives; '' where it cannot."""
    return _process_name(os.getpid())


def _process_name(pid: int) -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
    return f"{boot}/{namespace}/{pid}/{started}"


def is_dead(process: str) -> bool:
    """Tell whether `process` ran on this machine and is gone; False where that cannot be known."""
    parts, here = process.split("/"), this_process().split("/")
    if len(parts) != 4 or len(here) != 4 or parts[:2] != here[:2]:
        return False
    return _process_name(int(parts[2])) != process


class Lease:
    """The right to train under one key, held by a heartbeat thread.

    Args:
        uri: the lease's file, local or gs://; it is replaced only if it is still what was read.
        seconds: a holder whose beat stands still for so long is dead. Measured with the waiter's own clock, so that
            clocks need not agree.
        on_lost: called from the heartbeat thread when another trainer has taken over.
    """

    def __init__(self, uri: str, seconds: float, on_lost: Callable[[], None]) -> None:
        self._store, self._uri = Workspace.holding(uri), uri
        self._seconds = seconds
        self._on_lost = on_lost
        self._mine = Holder(token=0, owner=uuid.uuid4().hex, beat=0, process=this_process())
        self._version: object = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def token(self) -> int:
        """The fencing token: higher than that of every earlier holder."""
        return self._mine.token

    def acquire(self, waiting: Callable[[str], None]) -> None:
        """Take the lease; wait while another trainer that lives holds it, and tell `waiting` so every ten seconds."""
        seen: tuple[str, int] | None = None
        since = told = time.monotonic()
        while True:
            holder, version = self._read()
            now = time.monotonic()
            if holder is not None and (holder.owner, holder.beat) != seen:
                seen, since = (holder.owner, holder.beat), now
            is_free = holder is None or holder.released or is_dead(holder.process) or now - since >= self._seconds
            mine = replace(self._mine, token=holder.token + 1 if holder else 1)
            if is_free and (taken := self._swap(version, mine)) is not None:
                self._mine, self._version = mine, taken
                self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
                self._thread.start()
                return
            if holder is not None and now >= told:
                waiting(f"another trainer holds the lease (token {holder.token}); waiting for it to finish or die")
                told = now + 10
            time.sleep(min(1.0, self._seconds / 10))

    def _read(self) -> tuple[Holder | None, object]:
        """Return the holder and the file's version; a torn file counts as free."""
        content, version = self._store.storage.read_versioned(self._uri)
        try:
            return None if content is None else Holder(**json.loads(content)), version
        except (ValueError, TypeError):
            LOG.warning("the lease file is damaged and counts as free: %r", (content or b"")[:80])
            return None, version

    def _swap(self, version: object, holder: Holder) -> object | None:
        """Replace the file if it still has `version`; return the new version, or None if it had not."""
        return self._store.swap(self._uri, json.dumps(asdict(holder)).encode(), version)

    def _keep(self) -> None:
        while not self._done.wait(self._seconds / HEARTBEATS_PER_LEASE):
            try:
                with self._lock:
                    self._beat(replace(self._mine, beat=self._mine.beat + 1))
            except LeaseLostError as error:
                LOG.error("%s", error)
                self._on_lost()
                return
            except Exception:
                LOG.warning("the lease's heartbeat failed once", exc_info=True)

    def _beat(self, mine: Holder) -> None:
        # Where the answer to an earlier beat was lost, the file has another version, and is still this trainer's.
        version = self._swap(self._version, mine) or self._swap(self._version_held(), mine)
        if version is not None:
            self._mine, self._version = mine, version

    def check(self) -> None:
        """Raise `LeaseLostError` if another trainer has taken over."""
        self._version_held()

    def _version_held(self) -> object:
        holder, version = self._read()
        if holder is None or holder.owner != self._mine.owner:
            token = holder.token if holder else "?"
            raise LeaseLostError(
                f"this trainer (token {self._mine.token}) lost its lease to another (token {token}) and must not write"
            )
        return version

    def release(self) -> None:
        """Give the lease back, so that a waiting trainer need not wait for it to run out."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            try:
                self._beat(replace(self._mine, released=True))
            except LeaseLostError as error:
                LOG.warning("%s", error)
