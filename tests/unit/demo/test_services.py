"""The demo's servers, with a stub for vLLM: errors show the log, and nothing is left running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tasks.demo import watchdog
from tasks.demo.services import VllmOptions, vllm_server
from tasks.errors import PreflowError

# Answers /health, and has a child of its own that ignores SIGTERM, as an engine process in trouble would.
STUB = """#!{python}
import http.server, os, pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"])
pathlib.Path({pids!r}).write_text(f"{{os.getpid()}} {{child.pid}}")
print("arguments:", *sys.argv[1:], flush=True)
port = int(next(a for a in sys.argv if a.startswith("--port=")).removeprefix("--port="))
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""
PARENT = """
import sys, time
from pathlib import Path
from tasks.demo.services import vllm_server
server = vllm_server(python=Path(sys.argv[1]), model=Path(sys.argv[2]), log=Path(sys.argv[3]))
server.start()
server.wait_ready(60)
print("ready", flush=True)
time.sleep(600)
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    return executable(tmp_path / "python", STUB.format(python=sys.executable, pids=str(tmp_path / "pids")))


def started(folder: Path) -> list[int]:
    """Return the processes that the stub has written down: itself and its child."""
    found = [int(pid) for pid in (folder / "pids").read_text().split()]
    assert all(map(is_running, found))
    return found


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_stop_ends_the_server_and_a_child_that_ignores_sigterm(
    stub: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.demo.services.GRACE_SECONDS", 0.5)
    server = vllm_server(python=stub, model=model, log=tmp_path / "vllm.log")
    server.start()
    server.wait_ready(60)
    assert httpx.get(server.base_url.removesuffix("/v1") + "/health").status_code == 200
    running = started(tmp_path)
    server.stop()
    assert not any(map(is_running, running))
    server.stop()


def test_kill_9_of_the_parent_leaves_nothing_behind(stub: Path, model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(stub), str(model), str(tmp_path / "vllm.log")]
    environment = {**os.environ, "PYTHONPATH": str(Path(watchdog.__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        running = started(tmp_path)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(map(is_running, running)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, running))


def test_a_server_that_dies_while_starting_shows_the_end_of_its_log(model: Path, tmp_path: Path) -> None:
    dying = executable(tmp_path / "python", "#!/bin/sh\necho first; seq 1 40; echo no memory left; exit 3\n")
    log = tmp_path / "vllm.log"
    server = vllm_server(python=dying, model=model, log=log)
    with pytest.raises(PreflowError) as caught, server:
        raise AssertionError("the server never answered")
    assert "no memory left" in str(caught.value)
    assert str(log) in str(caught.value)
    assert "first" not in str(caught.value)


def test_a_server_that_never_answers_is_given_up_and_ended(model: Path, tmp_path: Path) -> None:
    silent = executable(tmp_path / "python", f"#!/bin/sh\necho $$ > {tmp_path}/pid; exec sleep 600\n")
    server = vllm_server(python=silent, model=model, log=tmp_path / "vllm.log")
    server.start()
    with pytest.raises(PreflowError, match="did not answer within 1 s"):
        server.wait_ready(1)
    server.stop()
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_no_prompt_can_be_split_every_adapter_is_named_and_each_is_whole(stub: Path, model: Path) -> None:
    options = VllmOptions(max_model_len=100, max_num_seqs=7)
    arguments = options.arguments(Path("/m"), {"sft": Path("/a"), "dpo": Path("/b")}, 8123)
    assert "--max-num-batched-tokens=700" in arguments
    assert arguments[arguments.index("--lora-modules") + 1 :][:2] == ["sft=/a", "dpo=/b"]
    assert "--lora-modules" not in options.arguments(Path("/m"), {}, 8123)
    with pytest.raises(PreflowError, match=r"adapter 'sft' in .*nothing is not whole: adapter_config.json"):
        vllm_server(python=stub, model=model, log=model / "vllm.log", adapters={"sft": model / "nothing"})
