"""The deployments on a Prefect server of the tests, its REST API, a process worker that runs them, and runs of them."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import arun_deployment

from tasks.demo.services import prefect_server
from tasks.store.workspace import file_sha256
from tests.fakes.process import ROOT
from tests.models import kept

# A worker that looks every second, and starts nothing before its time.
EAGER = {"PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_WORKER_PREFETCH_SECONDS": "0"}
SECONDS = 600.0


class Patience(httpx.HTTPTransport):
    """Asks again for a minute where the server says 503: a busy SQLite makes it, and Prefect's client waits, too."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Return the last answer."""
        deadline = time.monotonic() + 60
        while (answer := super().handle_request(request)).status_code == 503 and time.monotonic() < deadline:
            answer.close()
            time.sleep(0.5)
        return answer


def rest_client(url: str, **options: Any) -> httpx.Client:
    """Return a client of the Prefect REST API at `url`."""
    return httpx.Client(base_url=url, timeout=60, transport=Patience(), **options)


def ask(url: str, method: str, path: str, body: object = None) -> Any:
    """Ask the Prefect REST API at `url` once, and return its answer."""
    with rest_client(url) as client:
        return client.request(method, path, json=body).raise_for_status().json()


def prefect_home(out: Path) -> Path:
    """Lay down the folder of a Prefect server whose database has its tables."""

    def make(folder: Path) -> None:
        folder.mkdir()
        with prefect_server(folder):
            pass

    return kept(out, make, version("prefect"))


def registered_home(out: Path) -> Path:
    """Lay down the folder of a Prefect server that register.sh was run against."""

    def make(folder: Path) -> None:
        with prefect_server(prefect_home(folder)) as server:
            api = f"http://127.0.0.1:{server.port}/api"
            register(PREFECT_API_URL=api, PREFECT_HOME=str(folder), DO_NOT_TRACK="1")

    # The forms are made from the signatures and the settings of the flows.
    files = [path for name in ("deployments", "flows", "tasks") for path in sorted((ROOT / name).rglob("*.*"))]
    sources = [(str(path), file_sha256(path)) for path in files if path.suffix in (".py", ".yaml", ".json", ".sh")]
    return kept(out, make, (version("prefect"), sources))


def register(*arguments: str, **environment: str) -> None:
    """Run deployments/register.sh in the checkout, for the server that the environment names."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["deployments/register.sh", *arguments],
        cwd=ROOT, env={**os.environ, "PATH": path, **environment}, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


class Worker:
    """A process worker that was started in `folder`, not in the checkout; its log is worker.log there."""

    def __init__(self, folder: Path, pool: str = "local") -> None:
        self._folder, self._pool = folder, pool
        self.start()

    def start(self) -> None:
        """Start it, for the first time or after `kill`."""
        with (self._folder / "worker.log").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "prefect", "worker", "start", "--pool", self._pool],
                cwd=self._folder, env={**os.environ, **EAGER}, stdout=log, stderr=log,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """The worker's process."""
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL the worker; what it has started goes on."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End the worker in order."""
        self._process.terminate()
        self._process.wait(60)


@contextmanager
def process_worker(folder: Path, pool: str = "local") -> Iterator[Worker]:
    """Have a worker while the block runs."""
    worker = Worker(folder, pool)
    try:
        yield worker
    finally:
        worker.stop()


async def run_to_the_end(deployment: str, **parameters: Any) -> FlowRun:
    """Run a deployment as the UI and the command line do, wait for its end, and see that it completed."""
    run = await arun_deployment(deployment, parameters=parameters, timeout=SECONDS, poll_interval=0.5, as_subflow=False)
    assert run.state is not None
    assert run.state.is_completed(), f"{deployment}: {run.state.name}: {run.state.message}"
    return run
