"""A random Llama with the shape of Llama-3.2-3B, an SFT adapter on it, a 128k tokenizer, and pairs of known length."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fakes.tiny_training import SPECIAL, large_tokenizer

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Size:
    """Sizes of everything; the default is Llama-3.2-3B with pairs of 600 and 2,048 tokens."""

    layers: int = 28
    hidden: int = 3072
    intermediate: int = 8192
    heads: int = 24
    kv_heads: int = 8
    vocabulary: int = 128_256
    rank: int = 32
    short: int = 600
    long: int = 2048


TINY = Size(
    layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2, vocabulary=1000, rank=4, short=40, long=90
)  # fmt: skip


def make_models(root: Path, size: Size) -> None:
    """Write base/ (bfloat16) and sft/, each with the tokenizer; on the card where there is one."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        max_position_embeddings=131_072, rope_theta=500_000.0, rms_norm_eps=1e-5, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    lora = LoraConfig(
        r=size.rank, lora_alpha=size.rank, lora_dropout=0.05, task_type="CAUSAL_LM", target_modules=PROJECTIONS,
        base_model_name_or_path=str(root / "base"), inference_mode=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        shapes = {name: value.shape for name, value in model.state_dict().items() if name != "lm_head.weight"}
        adapted = get_peft_model(model, lora)
        adapter = {name: value.shape for name, value in get_peft_model_state_dict(adapted).items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    def drawn(shape: Any, dtype: torch.dtype) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype)
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02).cpu()

    for folder, tensors, dtype, file in (
        (root / "base", shapes, torch.bfloat16, "model.safetensors"),
        (root / "sft", adapter, torch.float32, "adapter_model.safetensors"),
    ):
        folder.mkdir(parents=True)
        save_file({name: drawn(shape, dtype) for name, shape in tensors.items()}, folder / file, {"format": "pt"})
        large_tokenizer(folder, size.vocabulary)
    config.save_pretrained(root / "base")
    lora.save_pretrained(root / "sft")


def make_pairs(folder: Path, size: Size, lengths: list[int]) -> None:
    """Write train.jsonl with a pair for each length: tokens of prompt + side, a third of them the prompt's.

    A side is longer than its length by the template's tokens: `max_length` cuts it where all lengths are equal.
    """
    rng = random.Random(0)

    def text(role: str, count: int) -> list[dict[str, str]]:
        words = [f"w{number}" for number in rng.choices(range(size.vocabulary - len(SPECIAL)), k=count)]
        return [{"role": role, "content": " ".join(words)}]

    folder.mkdir(parents=True)
    with (folder / "train.jsonl").open("w") as out:
        for length in lengths:
            prompt, side = length // 3, length - length // 3
            row = {
                "prompt": text("user", prompt),
                "chosen": text("assistant", side),
                "rejected": text("assistant", side),
            }
            out.write(json.dumps(row) + "\n")


def mixed_lengths(count: int, size: Size) -> list[int]:
    """Return lengths as scenes have them: log-normal around the short one, at most the long one."""
    rng = random.Random(1)
    return [min(size.long - 8, max(12, int(size.short * rng.lognormvariate(0, 0.5)))) for _ in range(count)]
