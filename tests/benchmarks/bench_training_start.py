"""Seconds from the start of a training to its first step, by phase, at real size: 128k tokens, 2 GB, 100,000 pairs.

    python tests/benchmarks/bench_training_start.py [--vocabulary 128256] [--hidden 4096] [--pairs 100000]

The base is of zeros but for the rows of a few tokens, which makes it in seconds; the adapter brings its own tokenizer,
as TRL's does. The reference is computed in the step (`cache_reference` off): beforehand it takes a forward pass of
every pair, which is the accelerator's time and not the start's. One step of one pair ends the run.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tasks.config import TrainingConfig  # noqa: E402
from tasks.train.launch import base_digest, check_training_inputs, run_training, training_key  # noqa: E402
from tasks.train.spec import Progress  # noqa: E402
from tests.fakes.tiny_training import large_tokenizer, write_preferences  # noqa: E402

USED = 2000


def build(root: Path, vocabulary: int, hidden: int) -> None:
    """Write the base, and an adapter with a tokenizer of its own."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=1,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=512, dtype="bfloat16",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
            if parameter.ndim == 2:
                parameter[:USED].normal_(0, 0.02)
    model.save_pretrained(root / "base")
    policy = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    policy.save_pretrained(root / "sft")
    for folder in ("base", "sft"):
        large_tokenizer(root / folder, vocabulary)


def write_pairs(root: Path, count: int) -> Any:
    """Write `count` short pairs of words that have rows of weights."""
    rng = random.Random(0)

    def text(words: int) -> str:
        return " ".join(f"w{rng.randrange(USED // 2)}" for _ in range(words))

    def row() -> dict[str, Any]:
        sides = {side: [{"role": "assistant", "content": text(40)}] for side in ("chosen", "rejected")}
        return {"prompt": [{"role": "user", "content": text(30)}], **sides}

    return write_preferences(root / "preferences", [row() for _ in range(count)], [row()])


def main() -> None:
    """Build it, train one step and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("vocabulary", 128_256), ("hidden", 4096), ("pairs", 100_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="preflow-bench-") as folder:
        root = Path(folder)
        build(root, options.vocabulary, options.hidden)
        preferences = write_pairs(root, options.pairs)
        training = TrainingConfig(
            base_model=str(root / "base"), sft_adapter=str(root / "sft"), load_in_4bit=False, cache_reference=False,
            max_steps=1, warmup_steps=0, per_device_train_batch_size=1, gradient_accumulation_steps=1,
            eval_steps=100, learning_rate=1e-3, max_length=512,
        )  # fmt: skip
        size = sum(file.stat().st_size for file in (root / "base").glob("*.safetensors"))
        print(f"{options.vocabulary} tokens, a base of {size / 1e9:.2f} GB, {options.pairs} pairs; seconds:")
        report(root, preferences, training)


def report(root: Path, preferences: Any, training: TrainingConfig) -> None:
    """Train one step in a child process, as the product does, and print what took how long."""
    table: dict[str, float] = {}

    def timed(name: str, started: float) -> None:
        table[name] = time.monotonic() - started

    started = begun = time.monotonic()
    check_training_inputs(training)
    timed("checks", started)
    started = time.monotonic()
    base_digest(training)
    timed("digest of the base", started)
    started = time.monotonic()
    key = training_key(preferences, training)
    timed("the rest of the key", started)
    child, first = time.monotonic(), []

    def watch(progress: Progress) -> None:
        if progress.step and not first:
            first.append(time.monotonic())

    adapter = run_training(preferences, str(root / "workspace"), training, key, watch)
    phases = json.loads((Path(adapter.uri).parent / "timing.json").read_text())["phases"]
    table |= {f"child: {name}": seconds for name, seconds in phases.items()}
    table["child: libraries, first loss and step, what is not named"] = first[0] - child - sum(phases.values())
    for name, seconds in table.items():
        print(f"  {seconds:8.1f}  {name}")
    print(f"  {first[0] - begun:8.1f}  from the start to the end of the first step", flush=True)


if __name__ == "__main__":
    main()
