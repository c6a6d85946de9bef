"""Small tokenizers that speak with the chat templates of real model families."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trl

OURS = Path(__file__).parent / "chat_templates"
THEIRS = Path(trl.__file__).parent / "chat_templates"
WORDS = "the a cat dog sat ran on under red blue house tree big small slowly and then but he she they saw made".split()  # noqa: SIM905


@dataclass(frozen=True)
class Family:
    """A chat template with the special tokens that it writes, and what it is handed."""

    name: str
    file: Path
    bos: str | None
    eos: str
    others: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def build_tokenizer(self, folder: Path) -> Any:
        """Write a tokenizer with this template into `folder`."""
        special = [*filter(None, (self.bos, self.eos)), *self.others]
        return build_tokenizer(folder, special, self.words, self.bos, self.eos, self.file.read_text())


def build_tokenizer(
    folder: Path, special: Sequence[str], words: Sequence[str], bos: str | None, eos: str, template: str
) -> Any:
    """Write a byte-level BPE tokenizer of some words; `words` are tokens of their own, and not special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    corpus = [" ".join(rng.choices(WORDS, k=12)) for _ in range(300)] + ["system user assistant USER: ASSISTANT: "] * 40
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|pad|>", *special], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token="<|pad|>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


IM = ("<|im_start|>",)
THINK = ("<think>", "</think>")
FAMILIES = [
    Family(
        "llama3.2", THEIRS / "llama3_2.jinja", "<|begin_of_text|>", "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
    ),
    Family("qwen3", THEIRS / "qwen3.jinja", None, "<|im_end|>", IM, THINK),
    Family(
        "qwen3, no thinking", THEIRS / "qwen3.jinja", None, "<|im_end|>", IM, THINK, (("enable_thinking", False),)
    ),
    Family("gemma", THEIRS / "gemma.jinja", "<bos>", "<end_of_turn>", ("<start_of_turn>",)),
    Family("mistral", OURS / "mistral.jinja", "<s>", "</s>"),
    Family("vicuna", OURS / "vicuna.jinja", "<s>", "</s>"),
    Family(
        "deepseek r1", THEIRS / "deepseek_r1_distill.jinja", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
        ("<｜User｜>", "<｜Assistant｜>"), THINK,
    ),
    Family("smollm2", OURS / "smollm2.jinja", "<|im_start|>", "<|im_end|>"),
]  # fmt: skip


def union_tokenizer(folder: Path) -> Any:
    """Write a tokenizer with the special tokens of all families; its own chat template is the first one's."""
    first = FAMILIES[0]
    special = [token for family in FAMILIES for token in (family.bos, family.eos, *family.others) if token]
    return build_tokenizer(folder, list(dict.fromkeys(special)), THINK, first.bos, first.eos, first.file.read_text())
