"""The servers that a run on this machine needs; each ends with this process, however this process ends."""

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from tasks.demo import watchdog
from tasks.errors import PreflowError

LOG = logging.getLogger(__name__)
GRACE_SECONDS = 10.0
REPORT_SECONDS = 10.0
LOG_LINES_IN_ERROR = 15


@dataclass
class Service:
    """A server on a port of 127.0.0.1, in a process group of its own that ends with this process.

    `command` starts it, `health` is a path it answers when ready, `log` receives all it prints. As a context manager it
    is ready inside and ended outside.
    """

    name: str
    command: Sequence[str]
    port: int
    health: str
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    _lifeline: int = field(default=-1, init=False, repr=False)

    @property
    def base_url(self) -> str:
        """The OpenAI-compatible base URL, for a server that has one."""
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Start the server and return at once; `wait_ready` tells when it answers."""
        if self._process is not None:
            raise PreflowError(f"{self.name} runs already on port {self.port}: stop it before it is started again")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        reader, self._lifeline = os.pipe()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, watchdog.__file__, str(reader), str(GRACE_SECONDS), *self.command],
                pass_fds=[reader],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **self.environment},
            )
        os.close(reader)

    @property
    def pid(self) -> int | None:
        """The process id of the watchdog that the server runs under, while it runs."""
        return self._process.pid if self.is_running() and self._process is not None else None

    def is_running(self) -> bool:
        """Tell whether the server was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def wait_ready(self, timeout: float = 300.0, report: Callable[[str], None] = LOG.info) -> float:
        """Wait until the server answers and return the seconds it took; `report` gets a line every ten seconds.

        Raises:
            PreflowError: with the end of the server's log, where it died or took longer than `timeout` seconds.
        """
        start = time.monotonic()
        next_report = start + REPORT_SECONDS
        while not self.is_healthy():
            waited = time.monotonic() - start
            if not self.is_running():
                raise PreflowError(f"{self.name} ended while starting. {self._log_end()}")
            if waited > timeout:
                raise PreflowError(f"{self.name} did not answer within {timeout:.0f} s. {self._log_end()}")
            if time.monotonic() >= next_report:
                report(f"{self.name} is starting, {waited:.0f} s so far; its log: {self.log}")
                next_report += REPORT_SECONDS
            time.sleep(0.25)
        seconds = time.monotonic() - start
        report(f"{self.name} is ready on port {self.port} after {seconds:.0f} s")
        return seconds

    def stop(self) -> None:
        """End the server: SIGTERM to its process group, SIGKILL after the grace. Does nothing where it has ended."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        if self._process is not None:
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def is_healthy(self) -> bool:
        """Tell whether the server answers now."""
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}{self.health}", timeout=2.0).status_code < 500
        except httpx.TransportError:
            return False

    def _log_end(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES_IN_ERROR:]
        return f"The last lines of {self.log}:\n" + "\n".join(lines)


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def require_free(port: int, variable: str, use: str) -> None:
    """Refuse a port that something listens on already.

    Raises:
        PreflowError: naming the variable that chooses another port.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise PreflowError(
                f"port {port} of 127.0.0.1, for {use}, is taken by another program: end that, or choose another port "
                f"with {variable}, e.g. {variable}={port + 10} preflow up"
            ) from error


def prefect_server(home: Path, port: int | None = None) -> Service:
    """Return a Prefect server with its UI on `port` or a free one, its database in `home`."""
    port = port or free_port()
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    environment = {
        "PREFECT_HOME": str(home),
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # SQLite waits so long for its lock; on a busy machine 10 s are not enough, and a run is refused.
        "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
        # Who holds a slot of a deployment's limit is kept: else a restart of the server ends those runs within minutes.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
    }
    log = home.parent / "logs" / "prefect.log"
    return Service("Prefect", command, port, "/api/health", log, environment)


def judge_server(logs: Path, key: str, port: int | None = None) -> Service:
    """Return the demo's rule-based judge on `port` or a free one; each request adds a line to judge-requests.jsonl."""
    port = port or free_port()
    requests = logs / "judge-requests.jsonl"
    command = [sys.executable, "-m", "tasks.demo.judge", "--port", str(port), "--log", str(requests)]
    return Service("judge", command, port, "/v1/models", logs / "judge.log", {"DEMO_JUDGE_KEY": key})
