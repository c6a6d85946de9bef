"""The deployments on a Prefect server of the tests, its REST API, a process worker that runs them, and runs of them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
# What register.sh is told: the settings of the pool l4-spot, which no test of the process pool looks at.
IMAGE = "registry.example/preflow/train@sha256:" + "0" * 64
COMPUTE_CLASS = "preflow-l4"
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


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


def until(look: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """Return the first true answer of `look`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.25)
    raise AssertionError(f"{look.__qualname__}: not within {seconds} s")


class Api:
    """The Prefect REST API at a server's address."""

    def __init__(self, url: str) -> None:
        self.client = rest_client(url)

    def get(self, path: str) -> Any:
        """Ask for what is there."""
        return self._ask("GET", path).json()

    def post(self, path: str, body: object) -> Any:
        """Ask with a filter, or make something; None where there is no answer."""
        answer = self._ask("POST", path, body)
        return answer.json() if answer.content else None

    def patch(self, path: str, body: object) -> None:
        """Change something."""
        self._ask("PATCH", path, body)

    def _ask(self, method: str, path: str, body: object = None) -> httpx.Response:
        answer = self.client.request(method, path, json=body)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer

    def deployment(self, name: str) -> dict[str, Any]:
        """Return the deployment `flow/name`."""
        found: dict[str, Any] = self.get(f"/deployments/name/{name}")
        return found

    def automation(self, name: str) -> dict[str, Any]:
        """Return the one automation of a name."""
        (found,) = (item for item in self.post("/automations/filter", {}) if item["name"] == name)
        return dict(found)

    def switch(self, automation: str, on: bool) -> None:
        """Turn an automation on or off, as the switch in the UI does."""
        self.patch(f"/automations/{self.automation(automation)['id']}", {"enabled": on})

    def create_run(self, name: str, parameters: dict[str, Any]) -> httpx.Response:
        """Ask for a run of a deployment and return the answer, whatever it is."""
        path = f"/deployments/{self.deployment(name)['id']}/create_flow_run"
        return self.client.post(path, json={"parameters": parameters})

    def start(self, name: str, parameters: dict[str, Any]) -> str:
        """Start a run of a deployment and return its id."""
        return str(self.create_run(name, parameters).raise_for_status().json()["id"])

    def runs(self, name: str) -> list[dict[str, Any]]:
        """Return the runs of a deployment."""
        found: list[dict[str, Any]] = self.post(
            "/flow_runs/filter", {"deployments": {"id": {"any_": [self.deployment(name)["id"]]}}}
        )
        return found

    def wait(self, run: str, *states: str) -> dict[str, Any]:
        """Wait until a run is in a state of one of these types, and return it."""

        def there() -> dict[str, Any] | None:
            found: dict[str, Any] = self.get(f"/flow_runs/{run}")
            # For a moment a run that was not approved has failed, until a hook of the flow says what became of it.
            refused = found["state_type"] == "FAILED" and "NotApproved" in found["state"]["message"]
            if found["state_type"] in ENDED and found["state_type"] not in states and not refused:
                raise AssertionError(f"{found['state_type']}: {found['state']['message']}")
            return found if found["state_type"] in states else None

        found: dict[str, Any] = until(there)
        return found

    def log(self, run: str) -> list[tuple[int, str]]:
        """Return level and text of the lines of a run that has ended."""
        chosen = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC"}
        patience, lines = time.monotonic() + 30, list[tuple[int, str]]()
        # The run's process sends its last lines after its state.
        while not any("Finished in state" in text for _, text in lines) and time.monotonic() < patience:
            time.sleep(0.5)
            lines = [(line["level"], line["message"]) for line in self.post("/logs/filter", chosen)]
        return lines


def prefect_home(out: Path) -> Path:
    """Lay down the folder of a Prefect server whose database has its tables."""

    def make(folder: Path) -> None:
        folder.mkdir()
        with prefect_server(folder, is_temporary=True):
            pass

    return kept(out, make, version("prefect"))


def registered_home(out: Path) -> Path:
    """Lay down the folder of a Prefect server that register.sh was run against."""

    def make(folder: Path) -> None:
        with prefect_server(prefect_home(folder)) as server:
            api = f"http://127.0.0.1:{server.port}/api"
            image = {"PREFLOW_TRAIN_IMAGE": IMAGE, "PREFLOW_COMPUTE_CLASS": COMPUTE_CLASS}
            register(PREFECT_API_URL=api, PREFECT_HOME=str(folder), DO_NOT_TRACK="1", **image)

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
        """End the worker in order, and by force where a loaded machine keeps it from that."""
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()


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
