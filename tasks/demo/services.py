"""The servers that a run on this machine needs; each ends with this process, however this process ends."""

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from tasks.demo import watchdog
from tasks.errors import PreflowError

LOG = logging.getLogger(__name__)
GRACE_SECONDS = 10.0


@dataclass
class Service:
    """A server started by `command` on `port`, which is ready when `health` (a path) answers.

    Raises:
        PreflowError: (`start`) it died or does not answer in time; the end of its log is shown.
    """

    name: str
    command: Sequence[str]
    port: int
    health: str
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    _lifeline: int = field(default=-1, init=False, repr=False)

    def start(self, timeout: float = 180.0) -> None:
        """Start the server and wait until it answers."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        reader, self._lifeline = os.pipe()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, watchdog.__file__, str(reader), str(GRACE_SECONDS), *self.command],
                pass_fds=[reader], stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **self.environment},
            )
        os.close(reader)
        start = time.monotonic()
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() - start > timeout:
                end = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
                raise PreflowError(f"{self.name} did not start. The end of its log, {self.log}:\n{end}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End the server and all it started."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        if self._process is not None:
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}{self.health}", timeout=5).status_code < 500
        except httpx.TransportError:
            return False

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prefect_server(home: Path) -> Service:
    """Return a Prefect server with its UI on a free port, its database in `home`."""
    port = free_port()
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    environment = {
        "PREFECT_HOME": str(home), "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
    }
    log = home.parent / "logs" / "prefect.log"
    return Service("the Prefect server", command, port, "/api/health", log, environment)


def judge_server(logs: Path, key: str) -> Service:
    """Return the demo's rule-based judge on a free port; each request adds a line to `judge-requests.jsonl`."""
    port = free_port()
    command = [
        sys.executable, "-m", "tasks.demo.judge", "--port", str(port), "--log", str(logs / "judge-requests.jsonl")
    ]
    return Service("the judge", command, port, "/v1/models", logs / "judge.log", {"DEMO_JUDGE_KEY": key})
