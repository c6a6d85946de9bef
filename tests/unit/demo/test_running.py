"""What `make down` takes for its own: nothing stale, nothing of others."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.demo.running import Run, end_all
from tasks.demo.services import require_free
from tasks.errors import PreflowError

SLEEP = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(300)"]


def sleeper(**environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(SLEEP, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


def test_the_files_of_a_reboot_are_not_believed(tmp_path: Path) -> None:
    run, other = Run(tmp_path), sleeper()
    try:
        run.write({"phase": "up", "pid": other.pid, "api": "http://127.0.0.1:4200/api", "pieces": {}})
        (run.folder / "lock").write_text(str(other.pid))
        assert run.supervisor() is None
        assert run.api() is None
        assert end_all(run) == 0
        assert other.poll() is None, "a process that has the number of an old supervisor was ended"
    finally:
        other.kill()
        other.wait()


def test_what_is_marked_is_ended_and_nothing_else(tmp_path: Path) -> None:
    run = Run(tmp_path / "mine")
    mine, others = sleeper(**run.environment), sleeper(**Run(tmp_path / "mine-too").environment)
    try:
        assert run.leftovers() == [mine.pid]
        assert end_all(run) == 1
        assert mine.wait(10) == -15
        assert others.poll() is None
    finally:
        for process in (mine, others):
            process.kill()
            process.wait()


def test_the_lock_tells_who_the_supervisor_is(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.lock():
        code = "import pathlib, sys, tasks.demo.running as r; print(r.Run(pathlib.Path(sys.argv[1])).supervisor())"
        said = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True).stdout
        assert int(said) == os.getpid()
    assert run.supervisor() is None


def test_a_taken_port_is_refused_with_the_variable_that_changes_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PreflowError, match=f"port {port} .*the Prefect UI.*UI_PORT={port + 10} make up"):
            require_free(port, "UI_PORT", "the Prefect UI")
    require_free(port, "UI_PORT", "the Prefect UI")
