"""A container as processes of this machine.

Where the machine allows it they live in a pid namespace of their own, as on a node: nobody inside sees the processes
of another pod, and with the first process all the others die at once. Elsewhere they are found by the HOSTNAME in their
environment, which is the pod's name. The container sees this machine's files; what a pod mounts at /tmp and at its home
folder is a folder of the pod's own, named in TMPDIR and HOME.
"""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from tests.fakes.kubernetes import init

ISOLATED = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
# The container must not outlive the double, however that ends.
TIED = ["setpriv", "--pdeathsig", "KILL"]


@cache
def isolation() -> list[str]:
    """Return the command that gives a process its own pid namespace; empty where this machine does not allow it."""
    if not all(shutil.which(name) for name in (ISOLATED[0], TIED[0])):
        return []
    for command in (ISOLATED, [ISOLATED[0], "--user", "--map-root-user", *ISOLATED[1:]]):
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return [*TIED, *command]
    return []


class Container:
    """One running container; `code` is its exit status once it has ended.

    Args:
        hostname: name of the pod, in the container's environment.
    """

    def __init__(self, hostname: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.log = log
        self._hostname = hostname
        self._process = process
        self._killed = False

    @classmethod
    async def start(
        cls, hostname: str, command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path
    ) -> "Container":
        """Start a command with exactly this environment, in a session of its own."""
        wrapped = [*isolation(), sys.executable, "-S", "-E", init.__file__, *command]
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *wrapped, env={**environment, "HOSTNAME": hostname}, cwd=folder, stdin=asyncio.subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        return cls(hostname, process, log)

    async def wait(self) -> int:
        """Return the exit status as Kubernetes tells it: 128 and the signal's number where a signal ended it."""
        code = await self._process.wait()
        self._end_stragglers()
        if self._killed:
            return 128 + signal.SIGKILL
        return code if code >= 0 else 128 - code

    def terminate(self) -> None:
        """Send SIGTERM to the container's first process alone."""
        first = self._first()
        if first is not None:
            with suppress(ProcessLookupError):
                os.kill(first, signal.SIGTERM)

    def kill(self) -> None:
        """Kill all processes of the container at once."""
        if self._process.returncode is None:
            self._killed = True
            with suppress(ProcessLookupError):
                os.kill(self._first() or self._process.pid, signal.SIGKILL)
        self._end_stragglers()

    def _first(self) -> int | None:
        if not isolation():
            return self._process.pid
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        with suppress(OSError):
            found = children.read_text().split()
            return int(found[0]) if found else None
        return None

    def _end_stragglers(self) -> None:
        if isolation():
            return
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in self.processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def processes(self) -> list[int]:
        """Return the pids, as this machine counts them, of all processes of the container."""
        mark = f"HOSTNAME={self._hostname}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found


def expand(text: str, known: Mapping[str, str]) -> str:
    """Replace $(NAME) as Kubernetes does: an unknown name stays as it is, and $$ is a dollar."""

    def replace(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        return known.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([-._a-zA-Z][-._a-zA-Z0-9]*)\)", replace, text)
