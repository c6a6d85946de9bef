"""This machine as the place of a run: the demo's folders, servers and configuration, and what it shows at the end."""

import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tasks.config import GenerationConfig, JudgingConfig, PipelineConfig, PromotionConfig, TrainingConfig
from tasks.demo import SMOLLM2, TINY
from tasks.demo.materials import Materials, locate_materials
from tasks.demo.services import Service, VllmOptions, judge_server, vllm_server
from tasks.demo.up import Places, Up
from tasks.promote.pointer import read_pointer
from tasks.run.preflight import find_result

logger = logging.getLogger(__name__)
SERVED_NAME = "dpo"
JUDGE_KEY = "DEMO_JUDGE_KEY"
VLLM_PYTHON = Path(".venv-serve/bin/python")
# Nothing is asked of these when an equal run has finished.
NOWHERE = "http://127.0.0.1:9/v1"


def demo_config(places: Places, materials: Materials, vllm: str, judge: str) -> PipelineConfig:
    """Return the pipeline's configuration for a small model on CPU; `vllm` and `judge` are base URLs."""
    config = PipelineConfig(
        prompts=str(materials.prompts),
        eval_prompts=str(materials.held_out),
        workspace=str(places.workspace),
        generation=GenerationConfig(
            endpoint=vllm, model="sft", num_completions=4, max_tokens=128, frequency_penalty=0.0, max_concurrency=64
        ),
        judging=JudgingConfig(endpoint=judge, model="demo-judge", api_key=f"env:{JUDGE_KEY}", rubric="demo"),
        training=TrainingConfig(
            base_model=str(materials.base), sft_adapter=str(materials.sft), load_in_4bit=False, bf16=False,
            gradient_checkpointing=False, sft_weight=1.0, learning_rate=1e-3, max_steps=60, warmup_steps=5,
            max_length=512,
        ),
        promotion=PromotionConfig(name=SERVED_NAME, endpoint=vllm),
    )  # fmt: skip
    if materials.model == TINY:
        return config
    # A model a hundred times the size: short texts, few steps.
    generation = config.generation.model_copy(update={"max_tokens": 64, "max_concurrency": 8})
    shorter = {"learning_rate": 2e-4, "max_steps": 10, "warmup_steps": 1, "gradient_accumulation_steps": 4}
    training = config.training.model_copy(update={**shorter, "eval_steps": 10, "logging_steps": 2})
    return config.model_copy(update={"generation": generation, "training": training})


@contextmanager
def model_servers(
    places: Places, materials: Materials, find: Callable[[PipelineConfig], object | None] = find_result
) -> Iterator[PipelineConfig]:
    """Start vLLM and the judge, unless `find` knows a result of what they are for; yields the run's configuration."""
    os.environ.setdefault(JUDGE_KEY, secrets.token_hex(16))
    finished = demo_config(places, materials, NOWHERE, NOWHERE)
    if find(finished) is not None:
        logger.info("an equal run has finished: no model server is needed")
        yield finished
        return
    with ExitStack() as running:
        judge = running.enter_context(judge_server(places.logs, os.environ[JUDGE_KEY]))
        vllm = running.enter_context(vllm_for(places, materials))
        yield demo_config(places, materials, vllm.base_url, judge.base_url)


def vllm_for(places: Places, materials: Materials, port: int | None = None) -> Service:
    """Return a vLLM server of the base model, the SFT adapter and what was promoted, on `port` or a free one."""
    adapters = {"sft": materials.sft}
    pointer = read_pointer(str(places.workspace), SERVED_NAME)
    if pointer is not None:
        adapters[SERVED_NAME] = Path(pointer.current.uri)
    options = VllmOptions(max_model_len=512, max_num_seqs=32, dtype="bfloat16") if materials.model == SMOLLM2 else None
    return vllm_server(VLLM_PYTHON.absolute(), materials.base, places.logs / "vllm.log", adapters, options, port)


def vllm_launcher(places: Places, port: int) -> Service:
    """Return vLLM as a service that looks up what was promoted whenever it is started."""
    command = [sys.executable, "-m", "tasks.demo.local", str(places.root), str(port)]
    return Service("vLLM", command, port, "/health", places.logs / "vllm.log")


if __name__ == "__main__":
    here = Up(Path(sys.argv[1]))
    for engine in here.leftovers(naming="EngineCore"):  # of a vLLM that was killed: it would keep its memory
        engine.kill()
    vllm = vllm_for(here, locate_materials(here.root), int(sys.argv[2]))
    os.execve(vllm.command[0], list(vllm.command), {**os.environ, **vllm.environment})
