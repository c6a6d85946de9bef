"""`make up` and `make down`: everything a run needs on this machine, in the background until it is ended.

`up` starts one supervisor, which owns the servers and starts a crashed one again; the supervisor holds a lock as long
as it lives, so a stale file of a reboot or of a `kill -9` is never taken for a running one.
"""

import argparse
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.demo.local import JUDGE_KEY, SERVED_NAME, Places, demo_config, vllm_for
from tasks.demo.materials import Materials, ensure_materials, locate_materials
from tasks.demo.register import end_lost_runs, register_all
from tasks.demo.running import Run, end_all, wait_until
from tasks.demo.services import Service, judge_server, prefect_server, prefect_worker, require_free
from tasks.errors import PreflowError
from tasks.run.logs import set_up_logs

LOG = logging.getLogger("tasks.demo.up")
MOST_RESTARTS = 3
POLL_SECONDS = 0.5
START_SECONDS = 900.0
LOOK_SECONDS = 2.0


@dataclass(frozen=True)
class Ports:
    """Where the servers listen on 127.0.0.1; fixed, so that documented addresses hold."""

    ui: int = 4200
    vllm: int = 8000
    judge: int = 8001

    @classmethod
    def from_environment(cls) -> "Ports":
        """Return the ports, with those that UI_PORT, VLLM_PORT and JUDGE_PORT change."""
        return cls(**{name: int(os.environ.get(f"{name.upper()}_PORT", getattr(cls, name))) for name in vars(cls())})

    @property
    def api(self) -> str:
        """The Prefect API's address."""
        return f"http://127.0.0.1:{self.ui}/api"

    def url(self, name: str) -> str:
        """Return the OpenAI-compatible base URL of `vllm` or `judge`."""
        return f"http://127.0.0.1:{getattr(self, name)}/v1"

    def check_free(self) -> None:
        """Refuse ports that other programs have."""
        for name, use in (("ui", "the Prefect UI"), ("vllm", "vLLM"), ("judge", "the demo's judge")):
            require_free(getattr(self, name), f"{name.upper()}_PORT", use)


class Supervisor:
    """Starts the pieces in order, keeps them running, and writes down how they are."""

    def __init__(self, run: Run, ports: Ports, materials: Materials) -> None:
        self._run, self._ports, self._materials = run, ports, materials
        self._places = Places(run.root)
        self._running: dict[str, Service] = {}
        self._restarts: dict[str, int] = {}
        self._phase, self._error = "starting", ""

    def main(self) -> int:
        """Keep everything up until SIGTERM; return the exit code."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            self._start_all()
            self._phase = "up"
            while True:
                self._look_after()
                time.sleep(LOOK_SECONDS)
        except PreflowError as error:
            LOG.error("%s", error)
            self._phase, self._error = "failed", str(error)
            return 1
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._end_all()

    def _end_all(self) -> None:
        """End the worker first, and let its runs report that they were interrupted, while the server is there."""
        for name in reversed(self._running):
            self._running[name].stop()
            if name == "worker":
                wait_until(lambda: not self._run.flow_processes())
        self._note()

    def _make(self, name: str) -> Service:
        places, ports = self._places, self._ports
        match name:
            case "Prefect":
                return prefect_server(places.prefect_home, ports.ui)
            case "judge":
                return judge_server(places.logs, os.environ[JUDGE_KEY], ports.judge)
            case "vLLM":
                return vllm_for(places, self._materials, ports.vllm)
            case _:
                return prefect_worker(ports.api, places.prefect_home)

    def _start_all(self) -> None:
        for name in ("Prefect", "judge", "vLLM"):
            self._start(name)
        self._wait("Prefect")
        config = demo_config(self._places, self._materials, self._ports.url("vllm"), self._ports.url("judge"))
        register_all(self._ports.api, self._places.logs / "register.log", config)
        end_lost_runs(self._ports.api)
        self._start("worker")
        for name in ("judge", "worker", "vLLM"):
            self._wait(name)

    def _start(self, name: str) -> None:
        self._running[name] = self._make(name)
        self._running[name].start()
        self._note()

    def _wait(self, name: str) -> None:
        self._running[name].wait_ready(START_SECONDS)
        self._note()

    def _look_after(self) -> None:
        """Start a piece that has ended again, a few times."""
        for name, service in list(self._running.items()):
            if not service.is_running() and self._restarts.get(name, 0) < MOST_RESTARTS:
                self._restarts[name] = self._restarts.get(name, 0) + 1
                LOG.warning("%s ended; starting it again (%d of %d)", name, self._restarts[name], MOST_RESTARTS)
                service.stop()
                self._start(name)
        self._note()

    def _note(self) -> None:
        state = {"phase": self._phase, "error": self._error, "pid": os.getpid(), "api": self._ports.api}
        state["pieces"] = {name: self._describe(name, service) for name, service in self._running.items()}
        if state != self._run.state():
            self._run.write(state)

    def _describe(self, name: str, service: Service) -> dict[str, Any]:
        ready = service.is_running() and service.is_healthy()
        restarts = self._restarts.get(name, 0)
        return {"pid": service.pid, "port": service.port, "log": str(service.log), "ready": ready, "restarts": restarts}


def up(run: Run) -> int:
    """Start everything that is not running, wait until it is ready, and say how to use it."""
    ports = Ports.from_environment()
    if run.supervisor() is None:
        end_all(run)  # what a supervisor that was killed has left
        ports.check_free()
        materials = locate_materials(run.root)
        ensure_materials(materials)
        started = _start_supervisor(run)
        return _follow(run, lambda: started.poll() is None)
    print("it runs already:", flush=True)
    return _follow(run, lambda: run.supervisor() is not None)


def _start_supervisor(run: Run) -> subprocess.Popen[bytes]:
    run.write({"phase": "starting", "pieces": {}})
    Places(run.root).logs.mkdir(parents=True, exist_ok=True)
    with (Places(run.root).logs / "up.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tasks.demo.up", "--folder", str(run.root), "supervise"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **run.environment, JUDGE_KEY: secrets.token_hex(16)},
        )


def _follow(run: Run, is_alive: Callable[[], bool]) -> int:
    """Say how the pieces come up until all are, and return the exit code."""
    told: set[str] = set()
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        alive, state = is_alive(), run.state()
        for name, piece in state.get("pieces", {}).items():
            if piece["ready"] and name not in told:
                told.add(name)
                print(f"  {name:<8} ready on port {piece['port']}", flush=True)
        if state.get("phase") == "failed":
            raise PreflowError(state["error"])
        if not alive:
            raise PreflowError(f"the supervisor ended: see {Places(run.root).logs}/up.log, and run `make up` again")
        if state.get("phase") == "up":
            return _announce(run, state)
        time.sleep(POLL_SECONDS)
    raise PreflowError(
        f"not everything was ready after {START_SECONDS:.0f} s: see {Places(run.root).logs}; `make down` ends it"
    )


def _announce(run: Run, state: Mapping[str, Any]) -> int:
    for name, piece in state["pieces"].items():
        if not piece["ready"]:
            print(f"  {name:<8} NOT ready (started again {piece['restarts']} times): see {piece['log']}")
    ui = state["api"].removesuffix("/api")
    print(f"""
Prefect UI:  {ui}/deployments: choose dpo-pipeline > demo, then Run > Quick run
vLLM:        http://127.0.0.1:{state["pieces"]["vLLM"]["port"]}/v1 serves base, sft and, once promoted, {SERVED_NAME}
Terminal:    export PREFECT_API_URL={state["api"]}
             .venv/bin/prefect deployment run dpo-pipeline/demo --watch
Workspace:   {Places(run.root).workspace}
Logs:        {Places(run.root).logs}
`make down` ends all of it.""")
    return 0 if all(piece["ready"] for piece in state["pieces"].values()) else 1


def down(run: Run) -> int:
    """End the supervisor and whatever it started; what others started is left alone."""
    names = ", ".join(run.state().get("pieces", {})) or "the supervisor"
    print(f"ended {names}" if end_all(run) else "nothing runs")
    return 0


def supervise(run: Run) -> int:
    """Be the supervisor."""
    with run.lock():
        return Supervisor(run, Ports.from_environment(), locate_materials(run.root)).main()


def main() -> int:
    """Start or end what a run on this machine needs; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tasks.demo.up", description=main.__doc__)
    parser.add_argument("action", choices=["up", "down", "supervise"])
    parser.add_argument("--folder", default=".demo", help="where everything is kept (default: .demo)")
    options = parser.parse_args()
    set_up_logs()
    run = Run(Places.below(options.folder).root)
    try:
        return {"up": up, "down": down, "supervise": supervise}[options.action](run)
    except PreflowError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nwhat was started goes on in the background: `make up` shows it, `make down` ends it", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
