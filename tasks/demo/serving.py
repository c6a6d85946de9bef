"""A vLLM server for the demo's tiny model and its adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.demo.services import Service, free_port
from tasks.errors import PreflowError
from tasks.llm.choose_template import template_file

# Exchanges an adapter under its name without touching the requests in flight; see its docstring.
VLLM_PLUGIN = Path(__file__).parents[2] / "infra" / "docker" / "vllm_plugin"
ENVIRONMENT = {
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


def vllm_server(
    python: Path,
    model: Path,
    log: Path,
    adapters: Mapping[str, Path] | None = None,
    options: VllmOptions | None = None,
    port: int | None = None,
) -> Service:
    """Return a vLLM server.

    Args:
        python: the interpreter of the environment that holds vLLM.
        model: folder of the base model.
        log: receives all that the server prints.
        adapters: name to folder of the LoRA adapters that it serves from the start.
        options: what it is started with.
        port: where it listens; None: on a free port.

    Raises:
        PreflowError: there is no such interpreter, or a folder is not whole.
    """
    adapters, options = adapters or {}, options or VllmOptions()
    if not python.exists():
        raise PreflowError(f"no Python with vLLM at {python}: run `make demo`, which makes the serving environment")
    for name, path, file in _folders(model, adapters):
        if not (path / file).is_file():
            raise PreflowError(f"{name} in {path} is not whole: {file} is missing. Build it again.")
    port = port or free_port()
    template = template_file([*map(str, adapters.values()), str(model)])
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", *options.arguments(model, adapters, port)]
    command += [f"--chat-template={template}"] if template else []
    return Service("vLLM", command, port, "/health", log, ENVIRONMENT)


def _folders(model: Path, adapters: Mapping[str, Path]) -> Sequence[tuple[str, Path, str]]:
    loras = [(f"adapter {name!r}", path, "adapter_config.json") for name, path in adapters.items()]
    return [("the base model", model, "config.json"), *loras]
