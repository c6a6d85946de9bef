"""`preflow up` and `preflow down`: what runs need on this machine, in the background, kept running by supervisord.

Prefect's server, a process that serves the deployments, and for the demo vLLM and the judge. One folder holds all of
it; processes are known by a mark in their environment, which those that they start inherit.
"""

import fcntl
import json
import logging
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
SUPERVISOR_SECONDS = 10.0
MAX_STARTS = 4  # of a server that has not answered yet: supervisord would start it again for ever
# What a path in supervisord's configuration cannot hold: a comment begins there, a value ends, or a name is filled in.
UNWRITABLE = re.compile(r"""\s[;#]|["%\n]""")
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


class Places:
    """Where things are kept, below one folder: the demo's, or the `.preflow` next to a configuration."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.workspace, self.logs = root / "workspace", root / "logs"
        # The database of Prefect's server, and what `preflow up` keeps for itself.
        self.prefect_home, self.run = root / "prefect", root / "run"

    @classmethod
    def below(cls, folder: str, model: DemoModel = TINY) -> "Places":
        """Return the demo's below a folder, which may be relative; the tiny model's are directly in it."""
        root = Path(folder).expanduser().absolute()
        return cls(root if model == TINY else root / model)


class Up(Places):
    """What runs in the background for one folder."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        # Written by the process that serves the deployments, once they are registered.
        self.served = self.run / "served"

    @classmethod
    def of(cls, config: Path | None, demo: Path) -> "Up":
        """Return what runs for a configuration, or else for the demo in a folder."""
        return cls((config.parent / ".preflow" if config else demo).expanduser().absolute())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait for what else starts servers for this folder: it would be ended, or two would make one database."""
        self.run.mkdir(parents=True, exist_ok=True)
        with (self.run / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another command is starting servers for {self.root}: waiting for it", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _told(self) -> dict[str, Any]:
        """Return what `start` has written down; nothing where that is lost."""
        try:
            return dict(json.loads((self.run / "up.json").read_text()))
        except (OSError, ValueError):
            return {}

    def _supervisor(self) -> Any:
        transport = SupervisorTransport(None, None, f"unix://{self._told().get('socket', '/nowhere')}")
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
        api = self._told().get("api")
        return str(api) if api and self.state() and answers(f"{api}/health") else None

    def start(self, services: Sequence[Service], api: str) -> None:
        """Have supervisord start the services, in this order, and keep them running.

        Raises:
            PreflowError: it does not start, or cannot be told of a folder of that name.
        """
        if found := UNWRITABLE.search(f"{self.root}\t{sys.executable}"):
            raise PreflowError(f"{self.root}: supervisord cannot take a name with {found[0]!r}: rename that folder")
        for folder in (self.run, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        # In the temporary folder, as a socket's path must be short; that of the next command may be another one.
        door = Path(tempfile.gettempdir()) / f"preflow-{sha256(str(self.root).encode()).hexdigest()[:16]}.sock"
        ready = {service.name: service.health and service.url for service in services}
        (self.run / "up.json").write_text(json.dumps({"api": api, "socket": str(door), "ready": ready}))
        self.served.unlink(missing_ok=True)
        text = CONFIG.format(socket=door, logs=self.logs, run=self.run)
        config = self.run / "supervisord.conf"
        config.write_text(text + "".join(map(_program, services, range(len(services)))), encoding="utf-8")
        environment = {**os.environ, MARK: str(self.root)}
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(config)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise PreflowError(f"supervisord did not start: {done.stderr.strip() or done.stdout.strip()}")

    def wait(self) -> None:
        """Wait until each server is ready, and say so as they become it.

        Raises:
            PreflowError: one cannot be started, or it takes too long; with its log.
        """
        waiting, start = dict(self._told().get("ready", {})), time.monotonic()
        starts: dict[str, set[int]] = defaultdict(set)
        while waiting:
            for name in [name for name, url in waiting.items() if (answers(url) if url else self.served.exists())]:
                del waiting[name]
                print(f"  {name} ready", flush=True)
            state, waited = self.state(), time.monotonic() - start
            for name, entry in state.items():
                starts[name].add(entry["start"])
                if entry["statename"] == "FATAL" or (name in waiting and len(starts[name]) >= MAX_STARTS):
                    raise PreflowError(f"{name} did not start: see {entry['logfile']}; `preflow down` ends the others")
            if waiting and (waited > START_SECONDS or (not state and waited > SUPERVISOR_SECONDS)):
                why = "did not start" if state else "was ended, by `preflow down` or with supervisord"
                raise PreflowError(f"{', '.join(waiting)} {why}: see {self.logs}")
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
    # What is there anyway is inherited: a key then stands in no file.
    given = {name: value for name, value in service.environment.items() if os.environ.get(name) != value}
    return PROGRAM.format(
        name=service.name, command=shlex.join(map(str, service.command)).replace("%", "%%"),
        environment=",".join(f'{name}="{value}"'.replace("%", "%%") for name, value in given.items()),
        priority=priority, log=service.log,
    )  # fmt: skip


def require_free(ports: Ports, names: Sequence[str]) -> None:
    """Refuse ports that other programs have.

    Raises:
        PreflowError: naming the variable that chooses another one.
    """
    uses, wanted = {"ui": "the Prefect UI", "vllm": "vLLM", "judge": "the demo's judge"}, dict[int, str]()
    for name in names:
        port, variable = getattr(ports, name), f"{name.upper()}_PORT"
        if (other := wanted.setdefault(port, name)) != name:
            raise PreflowError(f"port {port} is for {uses[other]} and {uses[name]}: choose another one with {variable}")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise PreflowError(
                    f"port {port} of 127.0.0.1, for {uses[name]}, is taken by another program: end that, or choose "
                    f"another port with {variable}, e.g. {variable}={port + 10} preflow up"
                ) from error
