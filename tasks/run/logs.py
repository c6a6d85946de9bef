"""Log lines for people: what the user can fix as one message without a traceback, and no line for every shard."""

import logging
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from uuid import UUID

from tasks.errors import PreflowError

REFUSED = "Flow run received invalid parameters:"
# Prefect ends a run with the message of its error once more: "Finished in state Failed('Flow run encountered ...')".
REPEATED = re.compile(
    r"Finished in state (\w+)\(.*(?:encountered an exception|Validation of flow parameters failed)", re.S
)


class _RunLog(logging.Handler):
    """Sends lines to the log, on the server, of the run that they were written in; outside of runs nowhere."""

    def emit(self, record: logging.LogRecord) -> None:
        if "prefect" not in sys.modules:
            return  # no run without it: a trainer would import it, for seconds, only to find none
        from prefect.context import FlowRunContext, TaskRunContext
        from prefect.logging.handlers import APILogHandler

        if FlowRunContext.get() is not None or TaskRunContext.get() is not None:
            APILogHandler().emit(record)


class _PlainUserErrors(logging.Filter):
    """Shows an error of the user once in a run's log, as its message: the traceback is for defects."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[tuple[object, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if (message := _user_error(record)) is not None:
            record.exc_info, record.exc_text, record.msg, record.args = None, None, "%s", (message,)
            shown = (getattr(record, "flow_run_id", None), message)
            if shown[0] is not None and shown in self._shown:  # its task has said it
                return False
            self._shown.add(shown)
        elif ended := REPEATED.match(record.getMessage()):
            record.msg, record.args = f"Finished in state {ended[1]}", ()
            record.levelno, record.levelname = logging.INFO, "INFO"
        return True


def _user_error(record: logging.LogRecord) -> str | None:
    """Return what the user should read in place of a record, if it is about an error of the user."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, PreflowError):
        return str(error)
    # By name: `tasks` sets this up before anything has need of Prefect, which takes a second to import.
    refused = [value for value in record.args or () if type(value).__name__ == "ParameterTypeError"]
    if not refused:
        return None
    return str(refused[0]).replace(REFUSED, "the parameters cannot be used:").replace("Value error, ", "")


def _put_refusal_into_the_run_log(record: logging.LogRecord) -> bool:
    """Put the refusal of a run's parameters into the run's log: Prefect says it before the run has one."""
    message, run_id = _user_error(record), os.environ.get("PREFECT__FLOW_RUN_ID")
    if message is None or run_id is None:
        return True
    from prefect.logging.loggers import flow_run_logger

    flow_run_logger(flow_run_id=UUID(run_id)).error("%s", message)
    return False


def _drop(*beginnings: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not record.getMessage().startswith(beginnings)


@cache
def set_up_logs() -> None:
    """Have preflow's own INFO lines shown, on the terminal and in the run's log, and Prefect's lines made readable.

    `tasks` does it when it is imported: a worker loads a flow by its file's path, and no package above it.
    """
    own = logging.getLogger("tasks")
    own.setLevel(logging.INFO)
    own.addHandler(_RunLog())
    # It asks, on every import without a GPU, for a 4-bit CPU kernel that only comes from the internet.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # All parameters, values that may be keys among them; the run's log has the refusal.
    logging.getLogger("prefect.flows").addFilter(_drop("Parameter validation failed for flow"))
    logging.getLogger("prefect.engine").addFilter(_put_refusal_into_the_run_log)
    # There are hundreds of shards; the UI shows their states. An error is no result, and is in the log anyway: that it
    # cannot be written as JSON says nothing.
    task_runs, plain = logging.getLogger("prefect.task_runs"), _PlainUserErrors()
    task_runs.addFilter(_drop("Finished in state Completed", "Finished in state Cached", "Failed to write result:"))
    task_runs.addFilter(plain)
    logging.getLogger("prefect.flow_runs").addFilter(plain)
