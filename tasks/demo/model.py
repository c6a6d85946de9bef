"""The demo's own model: a byte-level BPE tokenizer, a 2M-parameter Llama from scratch, and an SFT LoRA adapter."""

import json
import logging
import math
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from tasks.demo.corpus import Row, pretraining_rows, sft_rows
from tasks.errors import PreflowError

LOG = logging.getLogger(__name__)
# Bars that are full at once, and peft's use of a name that transformers has given up, tell a user nothing.
disable_progress_bar()
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

END = "<|end|>"
PAD = "<|pad|>"
SPECIAL_TOKENS = [PAD, END, "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MAX_POSITIONS = 1024
IGNORED = -100
PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train; `batch_size` in conversations, `learning_rate` at the peak of a cosine."""

    rows: int
    steps: int
    batch_size: int
    learning_rate: float


BASE_RECIPE = Recipe(rows=6000, steps=500, batch_size=8, learning_rate=3e-3)
SFT_RECIPE = Recipe(rows=1500, steps=120, batch_size=8, learning_rate=2e-3)
LORA_RANK = 16
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build_base_model(out: Path, seed: int, recipe: Recipe = BASE_RECIPE) -> None:
    """Train the tokenizer and the base model from scratch and write them to `out`, a folder that vLLM can serve.

    One CPU thread, fp32: equal arguments give equal bytes. `out` is absent until it is whole.
    """
    rows = pretraining_rows(recipe.rows, seed)
    with _fixed_randomness(seed), whole_folder(out) as folder:
        tokenizer = train_tokenizer(rows)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        LOG.info("base model: %.2fM parameters, %d conversations", model.num_parameters() / 1e6, len(rows))
        examples = [_tokens(tokenizer, row, prompt_is_learned=True) for row in rows]
        _train(model, examples, recipe, seed, "base model")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def build_sft_adapter(base: Path, out: Path, seed: int, recipe: Recipe = SFT_RECIPE) -> None:
    """Train a LoRA adapter on the SFT corpus, with the loss on completions only, and write it to `out`.

    The adapter is fp32, named `default`, without dropout, bias, DoRA or saved modules. `out` is absent until whole.
    """
    if not (base / "config.json").is_file():
        raise PreflowError(f"no base model in {base}: config.json is missing. Build it with build_base_model first.")
    rows = sft_rows(recipe.rows, seed)
    with _fixed_randomness(seed), whole_folder(out) as folder:
        tokenizer = AutoTokenizer.from_pretrained(base)
        lora = LoraConfig(
            r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=LORA_TARGETS, lora_dropout=0.0, bias="none",
            task_type="CAUSAL_LM",
        )  # fmt: skip
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
        examples = [_tokens(tokenizer, row, prompt_is_learned=False) for row in rows]
        _train(model, examples, recipe, seed, "SFT adapter")
        model.save_pretrained(folder)
        # PEFT's config holds a set: in a fixed order, equal inputs give equal bytes.
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        config["target_modules"] = sorted(config["target_modules"])
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (folder / "README.md").unlink(missing_ok=True)


def train_tokenizer(rows: Iterable[Row], vocab_size: int = 1280) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of the rows' text with a chat template; every message ends in `<|end|>`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    texts = (message["content"] for row in rows for message in (*row["prompt"], *row["completion"]))
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD, model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _tokens(tokenizer: PreTrainedTokenizerFast, row: Row, *, prompt_is_learned: bool) -> tuple[list[int], int]:
    """Return a conversation's token ids and the position where the loss starts."""
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False)
    start = 0 if prompt_is_learned else len(tokenizer(prompt)["input_ids"])
    return tokenizer(whole)["input_ids"], start


def _train(
    model: torch.nn.Module, examples: list[tuple[list[int], int]], recipe: Recipe, seed: int, label: str
) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    warmup = max(1, recipe.steps // 20)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, recipe.steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    shown = start = time.monotonic()
    model.train()
    for step, (ids, labels) in enumerate(_batches(examples, recipe, seed), start=1):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if time.monotonic() - shown > PROGRESS_SECONDS or step == recipe.steps:
            shown = time.monotonic()
            left = (shown - start) / step * (recipe.steps - step)
            LOG.info("%s: step %d/%d, loss %.3f, about %.0f s left", label, step, recipe.steps, loss.item(), left)
    model.eval()


def _batches(
    examples: list[tuple[list[int], int]], recipe: Recipe, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (ids, labels) of shape [batch, longest], right-padded; causal attention never looks at the padding."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(recipe.steps):
        while len(order) < recipe.batch_size:
            order += torch.randperm(len(examples), generator=generator).tolist()
        batch, order = [examples[i] for i in order[: recipe.batch_size]], order[recipe.batch_size :]
        longest = max(len(ids) for ids, _ in batch)
        padded = [ids + [0] * (longest - len(ids)) for ids, _ in batch]
        labels = [[IGNORED] * start + ids[start:] + [IGNORED] * (longest - len(ids)) for ids, start in batch]
        yield torch.tensor(padded), torch.tensor(labels)


@contextmanager
def _fixed_randomness(seed: int) -> Iterator[None]:
    """Seed torch and hold it to one thread (sums differ with the number of threads), and put both back afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder next to `out` and move it there at the end, so that `out` is absent or whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir()
    try:
        yield partial
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
