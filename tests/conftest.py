"""What tests of several kinds share, each made once a test process: a Prefect server, a tiny training."""

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes.tiny_training import TinyWorld
from tests.fakes.training_process import TrainingProcesses

PREFECT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_CLI_COLORS": "false",
}
# The longest first: minutes each.
LONGEST = (
    "test_end_to_end", "test_promotion_under_load", "test_sweep", "test_training_deployment",
    "test_kubernetes_preemption", "test_lost_pieces", "test_infra_image_replay", "test_drill", "test_pipeline_gcs",
)  # fmt: skip


def pytest_configure() -> None:
    """Hear Ctrl-C: a shell's background job ignores it and hands that on to all that the tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Import torch, TRL and Prefect without looking for garbage meanwhile: a quarter of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that at the end no test process works, or waits, alone."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """Base, SFT adapter and pairs of a tiny training, which nobody changes."""
    return TinyWorld.build(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingProcesses]:
    """What starts real training processes in an instant: it has imported torch and TRL once for all."""
    processes = TrainingProcesses(tmp_path_factory.mktemp("children"))
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a Prefect server of this test process's own and point Prefect at it; yields the API's address.

    Processes that a test starts inherit the address from the environment. The server has a database of its own and a
    free port, so other test processes do not share it; it ends with this process, however that ends.
    """
    with _pointed_at_a_server(tmp_path_factory.mktemp("prefect")) as url:
        yield url


@pytest.fixture(scope="module")
def empty_prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """As `prefect_server`, for one file that makes pools or counts runs: nothing of another file's is on it."""
    with _pointed_at_a_server(tmp_path_factory.mktemp("prefect")) as url:
        yield url


@pytest.fixture(scope="module")
def registered_prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """As `empty_prefect_server`, with the pools, deployments and automations that register.sh makes."""
    with _pointed_at_a_server(tmp_path_factory.mktemp("prefect"), registered=True) as url:
        yield url


@contextmanager
def _pointed_at_a_server(folder: Path, registered: bool = False) -> Iterator[str]:
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

    from tasks.demo.services import prefect_server as start_server
    from tasks.run.logs import set_up_logs
    from tests.deployed import prefect_home, registered_home

    set_up_logs()
    home = registered_home(folder / "home") if registered else prefect_home(folder / "home")
    with start_server(home, is_temporary=True) as server, pytest.MonkeyPatch.context() as environment:
        url = f"http://127.0.0.1:{server.port}/api"
        for name, value in {**PREFECT, "PREFECT_API_URL": url, "PREFECT_HOME": str(home)}.items():
            environment.setenv(name, value)
        assert os.environ["PREFECT_API_URL"] == url
        with temporary_settings({PREFECT_API_URL: url, PREFECT_HOME: home}):
            yield url
            # What is told now takes a second; at the end of the process, with the server gone, each event takes many.
            for queue in (EventsWorker, APILogWorker):
                queue.drain_all(timeout=60)
