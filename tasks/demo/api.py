"""The Prefect API that a command on this machine uses: one that runs, or a server of its own."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from tasks.demo.services import prefect_server
from tasks.demo.up import Up
from tasks.errors import PreflowError


@contextmanager
def prefect_api(folder: Path, meanwhile: Callable[[], object] = lambda: None) -> Iterator[str]:
    """Give this process a Prefect API; yields the UI's address. `folder` is the demo's, or a configuration's.

    It is that of PREFECT_API_URL, that of `preflow up` if that is running (two servers would share one database), or a
    server of our own. `meanwhile` is called while that one starts.
    """
    here, server = Up(folder), None
    with ExitStack() as stack:
        if (url := _named_api()) is None:
            with here.alone():
                if (url := here.api()) is None:
                    server = prefect_server(here.prefect_home, is_temporary=True)
                    stack.callback(server.stop)
                    server.start()
                    meanwhile()
                    server.wait_ready()
                    url = f"http://127.0.0.1:{server.port}/api"
        stack.enter_context(pointed_at(url))
        if server is not None:
            stack.enter_context(temporary_settings({PREFECT_HOME: here.prefect_home}))
            stack.callback(_send_the_last)
        yield url.removesuffix("/api")


def _send_the_last() -> None:
    """Send the last lines and events to the server, before it goes.

    With nobody there, each event holds this process up for many seconds at its end.
    """
    from prefect.events.worker import EventsWorker

    for handler in logging.getLogger("prefect.flow_runs").handlers:
        handler.flush()
    EventsWorker.drain_all(timeout=30)


def running_api(folder: Path) -> str:
    """Return the Prefect API of PREFECT_API_URL, or that of `preflow up` for a folder.

    Raises:
        PreflowError: there is none.
    """
    if api := _named_api() or Up(folder).api():
        return api
    raise PreflowError("there is no Prefect server: `preflow up`, or export PREFECT_API_URL=http://HOST:4200/api")


def _named_api() -> str | None:
    if not (api := PREFECT_API_URL.value()):
        return None
    with get_client(sync_client=True) as client:
        if (problem := client.api_healthcheck()) is not None:
            raise PreflowError(
                f"PREFECT_API_URL is {api}, and no Prefect answers there ({problem}): start that server, or unset it"
            )
    return str(api)


@contextmanager
def pointed_at(url: str) -> Iterator[None]:
    """Have this process, and those that it starts, use the Prefect API at an address."""
    os.environ["PREFECT_API_URL"] = url
    with temporary_settings({PREFECT_API_URL: url}):
        yield
