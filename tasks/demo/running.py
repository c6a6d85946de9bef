"""What `make up` has running: known by a lock that a process cannot outlive, and a mark that its children inherit.

No process id is believed alone: after a reboot or a `kill -9` the lock is free, whatever the files say.
"""

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.store.workspace import Workspace

# An environment variable with the demo's folder: with it `down` finds what the supervisor started, and nothing else.
MARK = "PREFLOW_UP"
END_SECONDS = 30.0


@dataclass(frozen=True)
class Run:
    """The supervisor of one demo's folder: its files there, and the processes that it has started."""

    root: Path

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.root / "run"

    @property
    def environment(self) -> dict[str, str]:
        """What marks a process as started by this supervisor; processes hand it on to those that they start."""
        return {MARK: str(self.root)}

    def state(self) -> dict[str, Any]:
        """Return what the supervisor last wrote about itself and its pieces."""
        try:
            found: dict[str, Any] = json.loads((self.folder / "up.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return found

    def api(self) -> str | None:
        """Return the address of the Prefect API, if one is up."""
        ready = self.supervisor() is not None and self.state().get("phase") == "up"
        return str(self.state()["api"]) if ready else None

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the state."""
        Workspace(self.folder).write_json(str(self.folder / "up.json"), state)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the supervisor while the block runs; the lock goes with the process, however that ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def supervisor(self) -> int | None:
        """Return the process id of the supervisor, if one is alive."""
        try:
            with (self.folder / "lock").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return None
        except BlockingIOError:
            text = (self.folder / "lock").read_text()
            return int(text) if text else None
        return None

    def leftovers(self) -> list[int]:
        """Return the processes that a supervisor of this folder has started, and their children."""
        mark = f"{MARK}={self.root}".encode()
        return [pid for pid in _processes() if mark in _read(pid, "environ").split(b"\0")]

    def flow_processes(self) -> list[int]:
        """Return the processes that run flows for the worker."""
        return [pid for pid in self.leftovers() if b"prefect.engine" in _read(pid, "cmdline")]


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def _read(pid: int, file: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:  # gone, or somebody else's
        return b""


def end_all(run: Run) -> int:
    """End everything that `up` has started, in order if it can be, and return the number of processes there were."""
    count = len(run.leftovers())
    supervisor = run.supervisor()
    if supervisor is not None and supervisor in run.leftovers():
        os.kill(supervisor, signal.SIGTERM)
        wait_until(lambda: run.supervisor() is None)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in run.leftovers():
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        wait_until(lambda: not run.leftovers())
    return count


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait until something holds, but not longer than `END_SECONDS`."""
    deadline = time.monotonic() + END_SECONDS
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.1)
