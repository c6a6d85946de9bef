"""The servers that a run on this machine needs; each ends with this process, however this process ends."""

import logging
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from tasks.demo import watchdog
from tasks.errors import PreflowError
from tasks.llm.choose_template import template_file

LOG = logging.getLogger(__name__)
GRACE_SECONDS = 10.0
REPORT_SECONDS = 10.0
LOG_LINES_IN_ERROR = 15
# Exchanges an adapter under its name without touching the requests in flight; see its docstring.
VLLM_PLUGIN = Path(__file__).parents[2] / "infra" / "docker" / "vllm_plugin"
VLLM_ENVIRONMENT = {
    "PYTHONPATH": str(VLLM_PLUGIN),
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; vLLM would otherwise claim nearly all memory
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    # One thread, free to move: sums then do not depend on the number of cores, and vLLM's own choice, pinned to the
    # first core, is half as fast where something else runs there.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Service:
    """A server on a port of 127.0.0.1, in a process group of its own that ends with this process.

    `command` starts it, `health` is a path it answers when ready, `log` receives all it prints. As a context manager it
    is ready inside and ended outside.
    """

    name: str
    command: Sequence[str]
    port: int
    health: str
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    _lifeline: int = field(default=-1, init=False, repr=False)
    _start: float = field(default=0.0, init=False, repr=False)

    @property
    def base_url(self) -> str:
        """The OpenAI-compatible base URL, for a server that has one."""
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Start the server and return at once; `wait_ready` tells when it answers."""
        if self._process is not None:
            raise PreflowError(f"{self.name} runs already on port {self.port}: stop it before it is started again")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._start = time.monotonic()
        reader, self._lifeline = os.pipe()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, watchdog.__file__, str(reader), str(GRACE_SECONDS), *self.command],
                pass_fds=[reader], stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **self.environment},
            )  # fmt: skip
        os.close(reader)

    def wait_ready(self, timeout: float = 300.0) -> None:
        """Wait until the server answers, with a line in the log every ten seconds.

        Raises:
            PreflowError: with the end of the server's log, where it died or took longer than `timeout` seconds.
        """
        next_report = self._start + REPORT_SECONDS
        while not answers(self.url):
            waited = time.monotonic() - self._start
            if self._process is None or self._process.poll() is not None:
                raise PreflowError(f"{self.name} ended while starting. {self._log_end()}")
            if waited > timeout:
                raise PreflowError(f"{self.name} did not answer within {timeout:.0f} s. {self._log_end()}")
            if time.monotonic() >= next_report:
                LOG.info("%s is starting, %.0f s so far; its log: %s", self.name, waited, self.log)
                next_report += REPORT_SECONDS
            time.sleep(0.1)
        LOG.info("%s is ready on port %d after %.0f s", self.name, self.port, time.monotonic() - self._start)

    def stop(self) -> None:
        """End the server: SIGTERM to its process group, SIGKILL after the grace. Does nothing where it has ended."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        if self._process is not None:
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The address that it answers when it is ready."""
        return f"http://127.0.0.1:{self.port}{self.health}"

    def _log_end(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES_IN_ERROR:]
        return f"The last lines of {self.log}:\n" + "\n".join(lines)


def answers(url: str) -> bool:
    """Tell whether a server of this machine answers at `url`, be it that a key is missing; no proxy is asked."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.netloc, timeout=2.0)
    try:
        connection.request("GET", parts.path)
        return connection.getresponse().status < 500
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nothing listens on, at random and below those that the kernel hands out.

    The kernel may give one of its own to somebody else in the seconds that the server needs until it listens.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise PreflowError("100 ports between 20,000 and 32,000 are taken: end what runs on them")


def prefect_server(home: Path, port: int | None = None, *, is_temporary: bool = False) -> Service:
    """Return a Prefect server with its UI on `port` or a free one, its database in `home`.

    `is_temporary`: it serves one run, and starts in two thirds of the time, as it does not import every collection of
    Prefect's to list the types of their blocks; a block is found, and its type listed when it is saved.
    """
    port = port or free_port()
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    environment = {
        "PREFECT_HOME": str(home),
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # SQLite waits so long for its lock; on a busy machine 10 s are not enough, and a run is refused.
        "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
        # Who holds a slot of a deployment's limit is kept: else a restart of the server ends those runs within minutes.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
    }
    if is_temporary:
        quick = ("REGISTER_BLOCKS_ON_START", "MEMOIZE_BLOCK_AUTO_REGISTRATION")
        environment |= {f"PREFECT_SERVER_{name}": "false" for name in quick}
    log = home.parent / "logs" / "prefect.log"
    return Service("Prefect", command, port, "/api/health", log, environment)


def judge_server(logs: Path, key: str, port: int | None = None) -> Service:
    """Return the demo's rule-based judge on `port` or a free one; each request adds a line to judge-requests.jsonl."""
    port = port or free_port()
    requests = logs / "judge-requests.jsonl"
    command = [sys.executable, "-m", "tasks.demo.judge", str(port), str(requests)]
    return Service("judge", command, port, "/v1/models", logs / "judge.log", {"DEMO_JUDGE_KEY": key})


@dataclass(frozen=True)
class VllmOptions:
    """What vLLM is started with: lengths in tokens, `max_loras` above every adapter ever loaded."""

    max_model_len: int = 384
    max_num_seqs: int = 64
    max_lora_rank: int = 16
    max_loras: int = 8
    dtype: str = "float32"
    extra: tuple[str, ...] = ()

    def arguments(self, model: Path, adapters: Mapping[str, Path], port: int) -> list[str]:
        """Return the command line after `python -m vllm.entrypoints.openai.api_server`."""
        flags: dict[str, object] = {
            "model": model,
            "served-model-name": "base",
            "host": "127.0.0.1",
            "port": port,
            "dtype": self.dtype,
            "max-model-len": self.max_model_len,
            "max-num-seqs": self.max_num_seqs,
            # A prompt must never be split: seeded sampling of a split one ends the CPU engine.
            "max-num-batched-tokens": self.max_num_seqs * self.max_model_len,
            "max-lora-rank": self.max_lora_rank,
            "max-loras": self.max_loras,
            "structured-outputs-config": '{"backend":"xgrammar","disable_any_whitespace":true}',
        }
        switches = ["--enable-lora", "--enforce-eager", "--disable-uvicorn-access-log", "--disable-log-stats"]
        loras = ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())] if adapters else []
        return [*(f"--{flag}={value}" for flag, value in flags.items()), *switches, *loras, *self.extra]


def vllm_server(
    python: Path,
    model: Path,
    log: Path,
    adapters: Mapping[str, Path] | None = None,
    options: VllmOptions | None = None,
    port: int | None = None,
) -> Service:
    """Return a vLLM server of a base model's folder and adapters by name, on `port` or a free one.

    `python` is the interpreter of the environment that holds vLLM.

    Raises:
        PreflowError: there is no such interpreter, or a folder is not whole.
    """
    adapters, port = adapters or {}, port or free_port()
    if not python.exists():
        raise PreflowError(f"no Python with vLLM at {python}: run `make demo`, which makes the serving environment")
    loras = [(f"adapter {name!r}", path, "adapter_config.json") for name, path in adapters.items()]
    for name, path, file in [("the base model", model, "config.json"), *loras]:
        if not (path / file).is_file():
            raise PreflowError(f"{name} in {path} is not whole: {file} is missing. Build it again.")
    arguments = (options or VllmOptions()).arguments(model, adapters, port)
    template = template_file([*map(str, adapters.values()), str(model)])
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", *arguments]
    command += [f"--chat-template={template}"] if template else []
    return Service("vLLM", command, port, "/health", log, VLLM_ENVIRONMENT)
