"""`preflow up` and `preflow down`: what runs need on this machine, in the background, kept running by supervisord.

Prefect's server, a process that serves the deployments, and for the demo vLLM and the judge. One folder holds all of
it; processes are known by a mark in their environment, which those that they start inherit.
"""

import json
import logging
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy

import psutil
from supervisor.xmlrpc import SupervisorTransport

from tasks.demo import TINY, DemoModel
from tasks.demo.services import Service, answers
from tasks.errors import PreflowError

logger = logging.getLogger(__name__)

MARK = "PREFLOW_UP"
START_SECONDS = 900.0
END_SECONDS = 60.0
# Prefect's server is there before what asks it, and goes last.
CONFIG = """[unix_http_server]
file={socket}
chmod=0700
[supervisord]
logfile={logs}/supervisord.log
pidfile={run}/supervisord.pid
childlogdir={logs}
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""
PROGRAM = """[program:{name}]
command={command}
environment={environment}
priority={priority}
autorestart=true
startretries=3
stopasgroup=true
killasgroup=true
stopwaitsecs=30
redirect_stderr=true
stdout_logfile={log}
"""


@dataclass(frozen=True)
class Ports:
    """Where the servers listen on 127.0.0.1; fixed, so that documented addresses hold."""

    ui: int = 4200
    vllm: int = 8000
    judge: int = 8001

    @property
    def api(self) -> str:
        """The Prefect API's address."""
        return f"http://127.0.0.1:{self.ui}/api"

    def url(self, name: str) -> str:
        """Return the OpenAI-compatible base URL of `vllm` or `judge`."""
        return f"http://127.0.0.1:{getattr(self, name)}/v1"


@dataclass(frozen=True)
class Places:
    """Where things are kept, below one folder: the demo's, or the `.preflow` next to a configuration."""

    root: Path

    @classmethod
    def below(cls, folder: str, model: DemoModel = TINY) -> "Places":
        """Return the demo's below a folder, which may be relative; the tiny model's are directly in it."""
        root = Path(folder).expanduser().absolute()
        return cls(root if model == TINY else root / model)

    @property
    def workspace(self) -> Path:
        """The pipeline's workspace."""
        return self.root / "workspace"

    @property
    def logs(self) -> Path:
        """Every server's log."""
        return self.root / "logs"

    @property
    def prefect_home(self) -> Path:
        """The Prefect server's database."""
        return self.root / "prefect"

    @property
    def run(self) -> Path:
        """What `preflow up` keeps for itself."""
        return self.root / "run"


class Up(Places):
    """What runs in the background for one folder."""

    @classmethod
    def of(cls, config: Path | None, demo: Path) -> "Up":
        """Return what runs for a configuration, or else for the demo in a folder."""
        return cls(config.absolute().parent / ".preflow" if config else demo.absolute())

    @property
    def served(self) -> Path:
        """Written by the process that serves the deployments, once they are registered."""
        return self.run / "served"

    @property
    def socket(self) -> Path:
        """Through which supervisord is asked; in the temporary folder, as its path must be short."""
        return Path(tempfile.gettempdir()) / f"preflow-{sha256(str(self.root).encode()).hexdigest()[:16]}.sock"

    def _supervisor(self) -> Any:
        transport = SupervisorTransport(None, None, f"unix://{self.socket}")
        return ServerProxy("http://127.0.0.1", transport=transport).supervisor

    def state(self) -> dict[str, dict[str, Any]]:
        """Return what supervisord says of each process, nothing where it does not run."""
        try:
            found = self._supervisor().getAllProcessInfo()
        except (OSError, Fault):
            return {}
        return {entry["name"]: entry for entry in found}

    def api(self) -> str | None:
        """Return the address of its Prefect API, if it answers."""
        if not self.state():
            return None
        api = str(json.loads((self.run / "up.json").read_text())["api"])
        return api if answers(f"{api}/health") else None

    def start(self, services: Sequence[Service], api: str) -> None:
        """Have supervisord start the services, in this order, and keep them running."""
        for folder in (self.run, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        (self.run / "up.json").write_text(json.dumps({"api": api}))
        self.served.unlink(missing_ok=True)
        programs = (_program(service, number) for number, service in enumerate(services))
        text = CONFIG.format(socket=self.socket, logs=self.logs, run=self.run) + "".join(programs)
        config = self.run / "supervisord.conf"
        config.write_text(text)
        environment = {**os.environ, MARK: str(self.root)}
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(config)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise PreflowError(f"supervisord did not start: {done.stderr.strip() or done.stdout.strip()}")

    def wait(self, services: Mapping[str, Callable[[], bool]]) -> None:
        """Wait until each of these is ready, and say so as they become it.

        Raises:
            PreflowError: one cannot be started, or it takes too long; with its log.
        """
        waiting, deadline = dict(services), time.monotonic() + START_SECONDS
        while waiting:
            for name in [name for name, is_ready in waiting.items() if is_ready()]:
                del waiting[name]
                print(f"  {name} ready", flush=True)
            failed = [entry for entry in self.state().values() if entry["statename"] == "FATAL"]
            if failed or time.monotonic() > deadline:
                name, log = (failed[0]["name"], failed[0]["logfile"]) if failed else (next(iter(waiting)), self.logs)
                raise PreflowError(f"{name} did not start: see {log}; `preflow down` ends the others")
            time.sleep(0.5)

    def stop(self) -> int:
        """End supervisord, what it started and what is left of it; return how many processes there were."""
        count = len(self.leftovers())
        try:
            self._supervisor().shutdown()
            psutil.wait_procs(self.leftovers(naming="supervisor.supervisord"), END_SECONDS)
        except (OSError, Fault) as error:
            logger.info("supervisord does not answer (%s): what is left of it is ended by process", error)
        for process in self.leftovers():
            with suppress(psutil.NoSuchProcess):  # one that ends takes others with it
                process.terminate()
        for process in psutil.wait_procs(self.leftovers(), 10)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return count

    def leftovers(self, naming: str = "") -> list[psutil.Process]:
        """Return the processes that were started for this folder, and theirs; `naming`: those with it in a command."""
        found = psutil.process_iter(["pid", "environ", "cmdline"])
        mine = [p for p in found if (p.info["environ"] or {}).get(MARK) == str(self.root) and p.pid != os.getpid()]
        return [p for p in mine if not naming or any(naming in part for part in p.info["cmdline"] or ())]


def _program(service: Service, priority: int) -> str:
    quoted = ",".join(f'{name}="{value}"'.replace("%", "%%") for name, value in service.environment.items())
    return PROGRAM.format(
        name=service.name.replace(" ", "-"), command=shlex.join(map(str, service.command)).replace("%", "%%"),
        environment=quoted, priority=priority, log=service.log,
    )  # fmt: skip


def require_free(ports: Ports, names: Sequence[str]) -> None:
    """Refuse ports that other programs have.

    Raises:
        PreflowError: naming the variable that chooses another one.
    """
    uses = {"ui": "the Prefect UI", "vllm": "vLLM", "judge": "the demo's judge"}
    for name in names:
        port, variable = getattr(ports, name), f"{name.upper()}_PORT"
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise PreflowError(
                    f"port {port} of 127.0.0.1, for {uses[name]}, is taken by another program: end that, or choose "
                    f"another port with {variable}, e.g. {variable}={port + 10} preflow up"
                ) from error
