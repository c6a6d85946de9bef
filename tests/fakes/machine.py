"""`preflow up` on a folder of its own: a real supervisord, Prefect server and judge; vLLM is a fake.

Where vLLM is started by the interpreter of the serving environment it finds a script that starts the fake endpoint.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tasks.demo.materials import locate_materials
from tasks.demo.services import free_port
from tasks.demo.up import Up
from tests.deployed import ask
from tests.fakes.process import ROOT

VLLM = """#!/bin/sh
for argument; do case $argument in --port=*) port=${argument#--port=};; esac; done
export PYTHONPATH=%(root)s  # vLLM's own is for its plugin
exec %(python)s -m tests.fakes.openai_server --port "$port" --plan %(folder)s/plan.json --log %(folder)s/requests.jsonl
"""


@dataclass
class Machine:
    """A folder in which `up` and `down` are run as from a checkout, on free ports."""

    folder: Path
    ports: dict[str, str] = field(
        default_factory=lambda: {f"{name}_PORT": str(free_port()) for name in ("UI", "VLLM", "JUDGE")}
    )

    def prepare(self, plan: dict[str, Any], prompts: int) -> None:
        """Put down what `up` would make: prompts, and folders that look like a model and an adapter."""
        materials = locate_materials(self.folder / ".demo")
        for folder, name in ((materials.base, "config.json"), (materials.sft, "adapter_config.json")):
            folder.mkdir(parents=True)
            (folder / name).write_text("{}")
        (materials.sft / "adapter_model.safetensors").write_bytes(b"weights")
        rows = [{"prompt": [{"role": "user", "content": f"Scene {number}"}]} for number in range(prompts)]
        for path in (materials.prompts, materials.held_out):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (self.folder / "plan.json").write_text(json.dumps(plan))
        python = self.folder / ".venv-serve" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(VLLM % {"python": sys.executable, "root": ROOT, "folder": self.folder})
        python.chmod(0o755)

    @property
    def up(self) -> Up:
        """What is running here."""
        return Up(self.folder / ".demo")

    def environment(self) -> dict[str, str]:
        """The environment of a shell in which this is done, with no Prefect server in it."""
        without = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        return {**without, **self.ports, "PYTHONPATH": str(ROOT), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}

    def start(self, action: str, **environment: str) -> subprocess.Popen[str]:
        """Start `up` or `down` and return at once."""
        return subprocess.Popen(
            [sys.executable, "-m", "preflow", action],
            cwd=self.folder, env={**self.environment(), **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def do(self, action: str) -> str:
        """Run `up` or `down` to its end and return what it printed."""
        process = self.start(action)
        said, _ = process.communicate(timeout=900)
        assert process.returncode == 0, said + self.logs()
        return said

    def logs(self) -> str:
        """Return the ends of all logs, for a failed assertion."""
        logs = sorted((self.folder / ".demo" / "logs").glob("*.log"))
        return "".join(f"\n--- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs)

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """Ask the Prefect API."""
        return ask(f"http://127.0.0.1:{self.ports['UI_PORT']}/api", method, path, body)

    def pids(self) -> dict[str, int]:
        """Return the process id of each piece, as supervisord says it; 0 while it does not run."""
        return {name: entry["pid"] for name, entry in self.up.state().items()}

    def kill(self, name: str) -> None:
        """kill -9 the process of a piece."""
        os.kill(self.pids()[name], signal.SIGKILL)

    def requests(self) -> list[dict[str, Any]]:
        """Return the completions that the fake vLLM was asked for."""
        log = self.folder / "requests.jsonl"
        rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [row for row in rows if row["path"] == "/v1/chat/completions"]

    def wait(self, what: str, holds: Callable[[], bool], seconds: float = 240) -> None:
        """Wait until something holds; the server may be away meanwhile."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if holds():
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.3)
        raise AssertionError(f"{what}: not within {seconds:.0f} s{self.logs()}")
