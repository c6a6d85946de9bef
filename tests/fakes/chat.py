"""Small tokenizers that speak with the chat templates of real model families."""

import random
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
        """Write a byte-level BPE tokenizer of some words with this template into `folder`."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        special = ["<|pad|>", *filter(None, (self.bos, self.eos)), *self.others]
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        rng = random.Random(0)
        corpus = [" ".join(rng.choices(WORDS, k=12)) for _ in range(300)] + [
            "system user assistant USER: ASSISTANT: "
        ] * 40
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        bpe.train_from_iterator(
            corpus, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
        )
        bpe.add_tokens([AddedToken(word, special=False, normalized=False) for word in self.words])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe, bos_token=self.bos, eos_token=self.eos, pad_token="<|pad|>"
        )
        tokenizer.chat_template = self.file.read_text()
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
