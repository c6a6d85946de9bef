"""Log lines for people: what the user can mend without a traceback, and no line for every shard."""

import logging

from tasks.errors import PreflowError


class _PlainUserErrors(logging.Filter):
    """Shows a `PreflowError` as its message, without the traceback that only a defect deserves."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, PreflowError):
            record.exc_info, record.exc_text = None, None
            record.msg, record.args = "%s", (str(error),)
        return True


class _NoLineForEachTask(logging.Filter):
    """Drops Prefect's "Finished in state Completed()" of hundreds of shards; the UI shows their states."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(("Finished in state Completed", "Finished in state Cached"))


def set_up_logs() -> None:
    """Let preflow's own INFO lines through, and make Prefect's lines about runs readable."""
    logging.getLogger("tasks").setLevel(logging.INFO)
    # It asks, on every import without a GPU, for a 4-bit CPU kernel that only comes from the internet.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        _add_once(logging.getLogger(name), _PlainUserErrors())
    _add_once(logging.getLogger("prefect.task_runs"), _NoLineForEachTask())


def _add_once(target: logging.Logger, wanted: logging.Filter) -> None:
    if not any(type(known) is type(wanted) for known in target.filters):
        target.addFilter(wanted)
