"""`preflow`: its sub-commands, its exit codes, and errors as one line.

A sub-command is a function in a file below preflow/commands and a line in COMMANDS; it is imported when it is called,
so that `preflow --help` needs neither Prefect nor torch. It returns an exit code, or None for 0.
"""

import errno
import os
import select
import sys
import tempfile
import traceback
from enum import IntEnum
from importlib.metadata import version
from pathlib import Path
from urllib.request import getproxies

from cyclopts import App, CycloptsError, Group

from tasks.errors import PreflowError


class Exit(IntEnum):
    """What the exit code says."""

    DONE = 0
    NOT_BETTER = 1
    WRONG = 2
    DEFECT = 3
    INTERRUPTED = 130


CODES = """Exit codes: 0 done; 1 the adapter is not better, or was not approved; 2 you
can fix it, the message says how; 3 a defect of preflow; 130 stopped by Ctrl-C."""

# What the machine refuses is for its user to settle.
_ROOM, _RIGHT = "make room there, and for $TMPDIR", "give this user the right to it, or name another place"
OF_THE_MACHINE = {
    errno.ENOSPC: _ROOM, errno.EDQUOT: _ROOM, errno.EACCES: _RIGHT, errno.EPERM: _RIGHT, errno.EROFS: _RIGHT,
    errno.EMFILE: "raise `ulimit -n`, or lower max_concurrency",
    errno.ENOTDIR: "a file stands where a folder is wanted", errno.EISDIR: "a folder stands where a file is wanted",
}  # fmt: skip
MINE, MODELS, SERVICE, FILES = (Group.create_ordered(name) for name in (
    "Your model", "What is served", "This machine", "The configuration"))  # fmt: skip
# Its file, its group in the help, and what it does.
COMMANDS = {
    "init": ("files", MINE, "Write a commented config.yaml with four lines to change."),
    "check": ("runs", MINE, "List all that is wrong, what a run costs, what it can show."),
    "run": ("runs", MINE, "Make a better adapter: sample, judge, train, prove, serve."),
    "sweep": ("runs", MINE, "Try several settings against each other."),
    "rounds": ("runs", MINE, "Go on: sample from what won, judge, train, prove again."),
    "report": ("results", MINE, "Say how a run ended; --open shows its report."),
    "label": ("results", MINE, "Judge some comparisons yourself: does the judge agree?"),
    "evidence": ("results", MINE, "Write all that a run's verdict rests on into one file."),
    "verify": ("results", MINE, "Recompute a verdict from its evidence, offline."),
    "promote": ("served", MODELS, "Serve the adapter of a finished run, if it won."),
    "rollback": ("served", MODELS, "Serve the adapter before the present one again."),
    "chat": ("served", MODELS, "Talk to a served model or adapter."),
    "demo": ("machine", SERVICE, "All of it with a tiny model: no GPU, no key, no cloud."),
    "up": ("machine", SERVICE, "Start Prefect and its UI in the background."),
    "down": ("machine", SERVICE, "End what `up` started."),
    "drill": ("machine", SERVICE, "Preempt a training on purpose and compare its bytes."),
    "schema": ("files", FILES, "Print the JSON schema of config.yaml, for editors."),
    "params": ("files", FILES, "Print a config.yaml as a deployment's parameters."),
    "convert": ("files", FILES, "Show how a file of prompts, completions or pairs is read."),
}


def make_app() -> App:
    """Return the command with its sub-commands, none of them imported yet."""
    app = App(
        name="preflow", help="Turns an SFT LoRA adapter into a better one: sample, judge, DPO, proof, serve.",
        help_epilogue=CODES, help_format="plaintext", version=lambda: version("preflow"),
        suppress_keyboard_interrupt=False,
    )  # fmt: skip
    for order, (name, (file, group, text)) in enumerate(COMMANDS.items()):
        target = f"preflow.commands.{file}:{name}"
        app.command(target, name=name, group=group, help=text, help_epilogue="", sort_key=order)
    return app


def main(arguments: list[str] | None = None) -> int:
    """Run a sub-command and return the exit code; errors are one line on standard error."""
    os.environ.setdefault("DO_NOT_TRACK", "1")  # else Prefect counts its users, and says so in the middle of a run
    if getproxies() and getproxies().get("no") != "*":  # no proxy has a way to what runs on this machine
        os.environ["no_proxy"] = ",".join(filter(None, [getproxies().get("no"), "127.0.0.1", "localhost"]))
    try:
        code = make_app()(arguments, exit_on_error=False, result_action="return_value")
        sys.stdout.flush()
        return int(code or Exit.DONE)
    except CycloptsError:  # cyclopts has said what is wrong
        return Exit.WRONG
    except PreflowError as error:
        print(error, file=sys.stderr)
        return Exit.WRONG
    except KeyboardInterrupt:
        print("stopped; run it again, and it continues where it was", file=sys.stderr)
        return Exit.INTERRUPTED
    except Exception as error:  # noqa: BLE001  # the last place: a person gets one line, and the traceback in a file
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return Exit.INTERRUPTED
        if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
            print(f"{error.filename or 'a file'}: {error.strerror}: {OF_THE_MACHINE[error.errno]}", file=sys.stderr)
            return Exit.WRONG
        print(f"a defect of preflow: {type(error).__name__}: {error}. {_keep_traceback()}", file=sys.stderr)
        return Exit.DEFECT


def _nobody_reads() -> bool:
    """Tell whether standard output is a pipe that was closed, as by `preflow schema | head`; then let it go nowhere."""
    output = select.poll()
    output.register(1, 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


def _keep_traceback() -> str:
    """Write the traceback into a file, and say where that is."""
    try:
        log = Path(tempfile.gettempdir()) / "preflow-error.log"
        log.write_text(traceback.format_exc())
    except OSError as error:
        return f"The traceback could not be kept ({error}): set TMPDIR to a folder with room, and run it again"
    return f"The traceback is in {log}"
