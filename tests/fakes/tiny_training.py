"""A random Llama of a few thousand weights, an SFT LoRA adapter on it, and preference pairs: made in a second."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.config import TrainingConfig
from tasks.store.workspace import PreferencesRef, file_sha256

WORDS = [f"w{number}" for number in range(90)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "system", "user", "assistant"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s> ' + message['role'] + ' ' + message['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of the tiny model; `dropout` is the adapter's."""

    hidden: int = 64
    layers: int = 2
    rank: int = 4
    dropout: float = 0.1


def build_base(folder: Path, seed: int = 0, shape: Shape | None = None) -> Path:
    """Write a random Llama with a word-level tokenizer and a chat template."""
    shape = shape or Shape()
    _write_llama(
        folder, seed, vocab_size=128, hidden_size=shape.hidden, intermediate_size=2 * shape.hidden,
        num_hidden_layers=shape.layers, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    return large_tokenizer(folder, len(SPECIAL + WORDS))


def build_random_llama(folder: Path, vocabulary: int, ends: list[int]) -> None:
    """Write a random Llama of so many tokens; each of `ends` ends an answer, now and then."""
    # Heads of 32: vLLM's attention on CPUs takes none of 16.
    _write_llama(
        folder, 0, vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        max_position_embeddings=1024, eos_token_id=ends, bos_token_id=None,
    )  # fmt: skip


def _write_llama(folder: Path, seed: int, **settings: Any) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)  # two threads on a busy machine are twenty times slower than one
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **settings))
    model.generation_config.eos_token_id = settings["eos_token_id"]
    model.save_pretrained(folder)


def large_tokenizer(folder: Path, size: int = 128_256) -> Path:
    """Write a word-level tokenizer; by default of the size that real models have."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL, *(f"w{number}" for number in range(size - len(SPECIAL)))]
    words = Tokenizer(models.WordLevel({token: number for number, token in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def build_adapter(folder: Path, base: Path, seed: int = 1, shape: Shape | None = None, **options: Any) -> Path:
    """Write a LoRA adapter whose weights are far from zero, so that it differs from the base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    shape = shape or Shape()
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "r": shape.rank, "lora_alpha": 8, "lora_dropout": shape.dropout, "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{**settings, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def pairs(count: int, seed: int, learnable: bool = True) -> list[dict[str, Any]]:
    """Make preference rows; `learnable`: chosen sides use other words than rejected ones."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        good = rng.choices(WORDS[:45], k=rng.randint(3, 12))
        bad = rng.choices(WORDS[45:], k=rng.randint(3, 12))
        if not learnable and rng.random() < 0.5:
            good, bad = bad, good
        prompt = " ".join(rng.choices(WORDS, k=rng.randint(3, 20)))
        rows.append(
            {
                "id": f"row-{number}",
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": " ".join(good)}],
                "rejected": [{"role": "assistant", "content": " ".join(bad)}],
                "images": "an extra column that must not reach the trainer",
            }
        )
    return rows


def write_preferences(folder: Path, train: list[dict[str, Any]], val: list[dict[str, Any]]) -> PreferencesRef:
    """Write train.jsonl and val.jsonl and return their reference."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train.jsonl", train), ("val.jsonl", val)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "train.jsonl"
    return PreferencesRef(
        uri=str(file), sha256=file_sha256(file), size=file.stat().st_size, rows=len(train), val_rows=len(val)
    )


@dataclass(frozen=True)
class TinyWorld:
    base: Path
    adapter: Path
    preferences: PreferencesRef

    @classmethod
    def build(cls, root: Path, train: int = 28, val: int = 6, learnable: bool = True) -> "TinyWorld":
        base = build_base(root / "base")
        adapter = build_adapter(root / "sft", base)
        for file in root.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes 0600, and a pod is another user
        rows = pairs(train, 3, learnable), pairs(val, 4, learnable)
        return cls(base, adapter, write_preferences(root / "preferences", *rows))

    def config(self, **changes: Any) -> TrainingConfig:
        """Return a configuration of 12 steps of 2 x 2 pairs that learns something."""
        settings: dict[str, Any] = {
            "base_model": str(self.base), "sft_adapter": str(self.adapter), "load_in_4bit": False,
            "learning_rate": 1e-2, "warmup_steps": 2, "max_steps": 12, "gradient_accumulation_steps": 2,
            "per_device_eval_batch_size": 2, "eval_steps": 5, "save_steps": 4, "logging_steps": 3, "max_length": 128,
            "gradient_checkpointing": False,
        }  # fmt: skip
        return TrainingConfig(**{**settings, **changes})
