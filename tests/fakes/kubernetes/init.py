"""The first process of a container, as tini is in the images: `python init.py COMMAND...`, standard library only.

Passes SIGTERM and SIGINT on to its one child and to nobody else, reaps what is left behind, and exits as the child did.
"""

import os
import signal
import sys


def main(command: list[str]) -> int:
    """Return the command's exit status, 128 and the signal's number where a signal ended it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        try:
            os.execvp(command[0], command)
        except OSError as error:
            print(f"exec {command[0]} failed: {error.strerror}", file=sys.stderr, flush=True)
            os._exit(127)
    while True:
        number = signal.sigwait({signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
        if number != signal.SIGCHLD:
            os.kill(child, number)
            continue
        status = _reap(child)
        if status is not None:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _reap(child: int) -> int | None:
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == child:
            found = status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
