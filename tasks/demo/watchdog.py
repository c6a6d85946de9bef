"""Run a command in a process group of its own and end the whole group when the parent goes away.

Started by path: `python watchdog.py PIPE_FD GRACE_SECONDS COMMAND...`. The parent holds the other end of the pipe and
never writes to it, so the pipe ends when the parent closes it or dies, by kill -9 too.
"""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil


def main(pipe: int, grace: float, command: list[str]) -> int:
    """Return the command's exit status, or 143 where the parent went away or a SIGTERM came first."""
    # Readable on SIGTERM or SIGINT; the command inherits neither handler.
    signals, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    child = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
    child_exit = os.pidfd_open(child.pid)
    ready, _, _ = select.select([pipe, signals, child_exit], [], [])
    if child_exit not in ready:
        os.killpg(child.pid, signal.SIGTERM)
        select.select([child_exit], [], [], grace)
    # A member may be slow to give up its memory.
    deadline = time.monotonic() + 10.0
    while _is_alive(child.pid) and time.monotonic() < deadline:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        time.sleep(0.05)
    status = child.wait()
    return status if child_exit in ready else 143


def _is_alive(group: int) -> bool:
    """Tell whether a process of the group is more than a zombie."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
