"""What a run shows: one live line a stage on a terminal, plain lines elsewhere, everything in a file."""

import logging
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tasks.batch.costs import format_seconds

# The flows that get a line of their own; what they call belongs to them.
STAGES = {
    "generate-completions": "sample", "judge-preferences": "judge", "train-dpo": "train",
    "evaluate-adapter": "evaluate", "promote-adapter": "promote",
}  # fmt: skip
POINTS = {"sweep-point": "point"}
ROUNDS = {"round": "round"}
BEGUN = re.compile(r"Beginning (?:sub)?flow run '(.*)' for flow '(.*)'$")
ENDED = re.compile(r"Finished in state (\w+)")
# Prefect's own remarks are for the file.
SHOWN_LOGGERS = ("tasks", "preflow", "prefect.flow_runs", "prefect.task_runs")
PREFIX = re.compile(r"^[\w -]{1,30}(?: \([^)]*\))?: ")
PLAIN_SECONDS = 30.0
FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


class Stage:
    """A stage that is under way: since when, and what it last said."""

    def __init__(self, title: str) -> None:
        self.title, self.said = title, ""
        self.start = self.shown = time.monotonic()

    def elapsed(self) -> str:
        """Return the time it has taken so far."""
        return format_seconds(time.monotonic() - self.start)


class Display(logging.Handler):
    """Shows a run of flows in this process; as a context manager it takes the place of all other log output.

    Args:
        stages: the flows that get a line, with its title.
        log: the file that gets every line.
    """

    def __init__(self, log: Path, stages: Mapping[str, str] = STAGES) -> None:
        super().__init__(logging.INFO)
        self._stages, self._log = stages, log
        self._console = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())
        self._waiting = Stage("prepare")
        self._open: dict[tuple[str, str], Stage] = {}
        self._warned: set[str] = set()
        self._live = Live(get_renderable=self._render, console=self._console, transient=True, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(self._log, encoding="utf-8")
        file.setFormatter(logging.Formatter(FORMAT))
        root = logging.getLogger()
        self._before, root.handlers = root.handlers, [file, self]
        logging.captureWarnings(True)
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        logging.captureWarnings(False)
        root = logging.getLogger()
        root.handlers[0].close()
        root.handlers = self._before

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line: it begins or ends a stage, tells how far one is, or is a warning."""
        message = record.getMessage()
        if not record.name.startswith(SHOWN_LOGGERS):
            return
        if record.levelno >= logging.WARNING:
            self._warn(record, message)
        elif found := BEGUN.match(message):
            self._begin(found[2], found[1])
        elif found := ENDED.match(message):
            self._end(str(getattr(record, "flow_name", "")), str(getattr(record, "flow_run_name", "")), found[1])
        elif record.name.startswith("tasks"):
            self._tell(message)

    def _warn(self, record: logging.LogRecord, message: str) -> None:
        # An error is what the run ends with, and the command says it then.
        if record.levelno < logging.ERROR and message not in self._warned:
            self._warned.add(message)
            self._console.print(Text.assemble(("warning: ", "yellow"), message))

    def _begin(self, flow: str, run: str) -> None:
        if flow in self._stages and all(other == flow for other, _ in self._open):
            title = self._stages[flow]
            self._open[flow, run] = Stage(title if self._stages is STAGES else run)

    def _end(self, flow: str, run: str, state: str) -> None:
        stage = self._open.pop((flow, run), None)
        if stage is not None:
            mark = ("done ", "green") if state in ("Completed", "Cached") else (f"{state.lower()} ", "red")
            took = (f"{stage.title:<9} {stage.elapsed():>12}  ", "bold")
            self._console.print(Text.assemble(mark, took, _last(stage.said)))
            self._waiting = Stage("")

    def _tell(self, message: str) -> None:
        stage = list(self._open.values())[-1] if self._open else self._waiting
        stage.said = message
        if not self._console.is_terminal and time.monotonic() - stage.shown > PLAIN_SECONDS:
            stage.shown = time.monotonic()
            self._console.print(Text(f"{stage.title}: {_last(message)}"))

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 1))
        for stage in list(self._open.values()) or [self._waiting]:
            table.add_row(Text(f"  … {stage.title:<9}", "bold cyan"), f"{stage.elapsed():>12}", _last(stage.said))
        table.columns[-1].no_wrap = True
        return Group(table)


def _last(message: str) -> str:
    """Return the first line of a message, without the name of the stage that it begins with."""
    first = message.strip().partition("\n")[0]
    return PREFIX.sub("", first)


@contextmanager
def shown(folder: Path, name: str, stages: Mapping[str, str] = STAGES) -> Iterator[None]:
    """Show the flows that are run inside, with a log file of their own and a Prefect server; `folder` holds both.

    Flows are imported inside: that takes as long as the server's start, and is done meanwhile.
    """
    from tasks.demo.api import prefect_api

    def load() -> None:
        for module in ("flows.pipeline", "scipy.stats"):
            import_module(module)

    log = folder / "logs" / f"{name}-{datetime.now():%Y%m%d-%H%M%S}.log"
    with Display(log, stages), prefect_api(folder, load) as ui:
        print(f"log: {log}; while it runs: {ui}/v2/runs", flush=True)
        yield
