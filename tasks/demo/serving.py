"""Start, watch and end a vLLM server for the demo's tiny model and its adapters."""

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from tasks.demo import watchdog
from tasks.errors import PreflowError

LOG = logging.getLogger(__name__)

ENVIRONMENT = {
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
GRACE_SECONDS = 10.0
LOG_LINES_IN_ERROR = 15


@dataclass(frozen=True)
class VllmOptions:
    """What the server is started with: lengths in tokens, `max_loras` above every adapter ever loaded."""

    served_model_name: str = "base"
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
            "served-model-name": self.served_model_name,
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


@dataclass
class VllmServer:
    """A vLLM server in a process group of its own, which ends with this process, however this process ends.

    `python` is the interpreter of the environment that holds vLLM; `log` receives all that the server prints.
    """

    python: Path
    model: Path
    log: Path
    adapters: Mapping[str, Path] = field(default_factory=dict)
    port: int | None = None
    options: VllmOptions = field(default_factory=VllmOptions)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    _lifeline: int = field(default=-1, init=False, repr=False)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Start the server and return at once; `wait_ready` tells when it answers."""
        self._check()
        self.port = self.port or _free_port()
        command = [str(self.python), "-m", "vllm.entrypoints.openai.api_server"]
        command += self.options.arguments(self.model, self.adapters, self.port)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        reader, self._lifeline = os.pipe()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, watchdog.__file__, str(reader), str(GRACE_SECONDS), *command],
                pass_fds=[reader],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **ENVIRONMENT},
            )
        os.close(reader)

    def wait_ready(self, timeout: float = 300.0, report: Callable[[str], None] = LOG.info) -> float:
        """Wait until the server answers and return the seconds it took; `report` gets a line every ten seconds.

        Raises PreflowError with the end of the server's log where it died or took longer than `timeout` seconds.
        """
        start = time.monotonic()
        next_report = start + 10.0
        while not self._is_healthy():
            waited = time.monotonic() - start
            if self._process is None or self._process.poll() is not None:
                raise PreflowError(f"vLLM ended while starting. {self._log_end()}")
            if waited > timeout:
                raise PreflowError(f"vLLM did not answer within {timeout:.0f} s. {self._log_end()}")
            if time.monotonic() >= next_report:
                report(f"vLLM is starting, {waited:.0f} s so far; its log: {self.log}")
                next_report += 10.0
            time.sleep(0.25)
        seconds = time.monotonic() - start
        report(f"vLLM is ready at {self.base_url} after {seconds:.0f} s")
        return seconds

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _check(self) -> None:
        if self._process is not None:
            raise PreflowError(f"vLLM runs already at {self.base_url}: stop it before it is started again.")
        if not self.python.exists():
            raise PreflowError(f"no Python with vLLM at {self.python}: create the serving environment first.")
        for name, path, file in _folders(self.model, self.adapters):
            if not (path / file).is_file():
                raise PreflowError(f"{name} in {path} is not whole: {file} is missing. Build it again.")

    def _is_healthy(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=2.0).status_code == 200
        except httpx.TransportError:
            return False

    def _log_end(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES_IN_ERROR:]
        return f"The last lines of {self.log}:\n" + "\n".join(lines)


def _folders(model: Path, adapters: Mapping[str, Path]) -> Sequence[tuple[str, Path, str]]:
    loras = [(f"adapter {name!r}", path, "adapter_config.json") for name, path in adapters.items()]
    return [("the base model", model, "config.json"), *loras]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
