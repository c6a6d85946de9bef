"""Log lines for people: a `PreflowError` is its message, without the traceback that only a defect deserves."""

import logging

from tasks.errors import PreflowError


class _PlainUserErrors(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, PreflowError):
            record.exc_info, record.exc_text = None, None
            record.msg, record.args = "%s", (str(error),)
        return True


def set_up_logs() -> None:
    """Let preflow's own INFO lines through, and strip tracebacks from Prefect's lines about errors the user can mend."""
    logging.getLogger("tasks").setLevel(logging.INFO)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        run_logger = logging.getLogger(name)
        if not any(isinstance(known, _PlainUserErrors) for known in run_logger.filters):
            run_logger.addFilter(_PlainUserErrors())
