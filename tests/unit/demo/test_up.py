"""What `preflow up` starts, with a real supervisord and a shell for the servers."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.demo import up as module
from tasks.demo.api import prefect_api
from tasks.demo.services import Service, free_port
from tasks.demo.up import Up
from tasks.errors import PreflowError

API = "http://127.0.0.1:9/api"


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    """A folder whose name holds what configurations give a meaning."""
    up = Up(tmp_path / "größer, Ann's")
    yield up
    up.stop()


def server(up: Up, script: str, health: str = "", **environment: str) -> Service:
    return Service("deployments", ["sh", "-c", script, "50 %"], free_port(), health, up.logs / "log 1.log", environment)


def test_it_is_found_again_whatever_its_folder_is_called_and_wherever_temporary_files_go(
    up: Up, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", "secret-key")
    script = 'printf "%s %s" "$0" "$WHERE" >"$WHERE/run/served"; exec sleep 600'
    up.start([server(up, script, WHERE=str(up.root), KEY="secret-key")], API)
    up.wait()
    assert up.served.read_text() == f"50 % {up.root}"
    assert "secret-key" not in (up.run / "supervisord.conf").read_text()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert up.state()["deployments"]["statename"] in ("STARTING", "RUNNING")
    shutil.rmtree(up.root)
    assert up.api() is None, "its folder was deleted under it"
    assert up.stop() >= 2
    assert not up.leftovers()


@pytest.mark.slow  # it is started four times
def test_a_server_that_ends_again_and_again_is_no_server_that_takes_long(up: Up) -> None:
    up.start([server(up, "sleep 1.2; exit 3", "/health")], API)
    with pytest.raises(PreflowError, match=r"deployments did not start: see .*log 1.log; `preflow down`"):
        up.wait()


def test_what_is_ended_while_it_starts_is_not_waited_for(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SUPERVISOR_SECONDS", 0.5)
    up.start([server(up, "sleep 600", "/health")], API)
    up.stop()
    with pytest.raises(PreflowError, match="deployments was ended, by `preflow down` or with supervisord"):
        up.wait()


def test_a_run_that_begins_while_up_starts_waits_for_it_and_takes_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, ready = Event(), Event()

    def start() -> None:
        with Up(tmp_path).alone():
            begun.set()
            time.sleep(0.5)
            ready.set()

    monkeypatch.setenv("PREFECT_API_URL", "")
    monkeypatch.setattr(Up, "api", lambda _: API if ready.is_set() else None)
    with ThreadPoolExecutor(1) as pool, temporary_settings(restore_defaults={PREFECT_API_URL}):
        pool.submit(start)
        begun.wait()
        with prefect_api(tmp_path) as ui:
            assert ui == API.removesuffix("/api")
    assert f"another command is starting servers for {tmp_path}: waiting for it" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a #1", "b ;c", 'd"e', "f%g"])
def test_a_folder_that_supervisord_cannot_be_told_of_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PreflowError, match="rename that folder"):
        Up(tmp_path / name).start([], API)


def test_the_home_folder_may_be_written_as_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The shell leaves it alone in --folder=~/demo."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Up.of(None, Path("~/demo")).root == tmp_path / "demo"
    assert Up.of(Path("~/config.yaml"), Path()).root == tmp_path / ".preflow"
