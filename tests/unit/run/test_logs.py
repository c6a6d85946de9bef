"""Log lines for people."""

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tasks.errors import PreflowError
from tasks.run.logs import set_up_logs


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    set_up_logs()
    set_up_logs()
    loggers = [logging.getLogger(name) for name in ("prefect.task_runs", "prefect.flow_runs", "tasks")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("error", [PreflowError("prompts.jsonl:3: not JSON"), ZeroDivisionError("a defect")])
def test_what_the_user_can_fix_is_its_message_alone_and_a_defect_keeps_its_traceback(
    lines: pytest.LogCaptureFixture, error: Exception
) -> None:
    logging.getLogger("prefect.flow_runs").error("Encountered an exception during execution", exc_info=error)
    said, is_users = lines.records[-1], isinstance(error, PreflowError)
    assert (said.getMessage() == str(error), said.exc_info is None) == (is_users, is_users)


def test_finished_shards_say_nothing_and_failed_ones_do(lines: pytest.LogCaptureFixture) -> None:
    task_runs = logging.getLogger("prefect.task_runs")
    task_runs.info("Finished in state Completed()")
    task_runs.warning("Failed to write result: PreflowError is not JSON serializable Execution will continue, ...")
    task_runs.error("Finished in state Failed('the disk is full')")
    said = [record.getMessage() for record in lines.records if record.name == "prefect.task_runs"]
    assert set(said) == {"Finished in state Failed('the disk is full')"}


def test_a_line_in_a_process_without_runs_does_not_import_prefect() -> None:
    """A trainer's first line took three seconds of CPU."""
    code = "import logging, sys, tasks; logging.getLogger('tasks.x').error('said'); sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
