"""Run a command in a process group of its own and end the whole group when the parent goes away.

Started by path, standard library only: `python watchdog.py PIPE_FD GRACE_SECONDS COMMAND...`. The parent holds the
other end of the pipe and never writes to it, so the pipe ends when the parent closes it or dies, by kill -9 too.
"""

import os
import select
import signal
import subprocess
import sys
import time


def main(pipe: int, grace: float, command: list[str]) -> int:
    """Return the command's exit status, or 143 where the parent went away or a SIGTERM came first."""
    signals = _signal_pipe()
    child = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
    child_exit = os.pidfd_open(child.pid)
    ready, _, _ = select.select([pipe, signals, child_exit], [], [])
    if child_exit not in ready:
        _signal_group(child.pid, signal.SIGTERM)
        select.select([child_exit], [], [], grace)
    _end_group(child.pid)
    status = child.wait()
    return status if child_exit in ready else 143


def _signal_pipe() -> int:
    """Return a descriptor that becomes readable on SIGTERM or SIGINT; the command inherits neither handler."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return reader


def _end_group(group: int) -> None:
    """Kill what is left of the group and wait until it is gone, for a member may be slow to give up its memory."""
    deadline = time.monotonic() + 10.0
    while _signal_group(group, signal.SIGKILL) and time.monotonic() < deadline:
        if _only_zombies(group):
            return
        time.sleep(0.05)


def _signal_group(group: int, number: signal.Signals) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _only_zombies(group: int) -> bool:
    for entry in os.listdir("/proc"):
        if entry.isdigit() and _state_in_group(int(entry), group) not in ("Z", "X", ""):
            return False
    return True


def _state_in_group(pid: int, group: int) -> str:
    """Return the state letter of a process of this group, or an empty string for any other."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return fields[0] if int(fields[2]) == group else ""


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
