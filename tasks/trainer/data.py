"""Preference pairs as tokens: read, measured and grouped into micro-batches before any model is loaded."""

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from tasks.errors import PreflowError
from tasks.store.records import PreferencePair, read_rows
from tasks.store.workspace import Workspace, digest

LOG = logging.getLogger(__name__)


class NoUsablePairsError(PreflowError):
    """Not one pair of a file can be trained on."""


@dataclass(frozen=True)
class TokenPair:
    """One pair in tokens; `line` is its line in the file, from 1."""

    line: int
    sha256: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    def length(self, max_length: int) -> int:
        """Return the length of the longer side with its prompt, in tokens, after truncation."""
        return min(max_length, len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids)))

    def refusal(self, max_length: int) -> str | None:
        """Return why this pair cannot be trained on, or None."""
        room = max_length - len(self.prompt_ids)
        if room <= 0:
            return f"the prompt alone has {len(self.prompt_ids)} tokens"
        if self.chosen_ids[:room] == self.rejected_ids[:room]:
            return "chosen and rejected are equal" + ("" if room >= len(self.chosen_ids) else " up to the cut")
        return None


@dataclass
class LengthReport:
    """What tokenizing one file showed; lengths in tokens of prompt + side."""

    pairs: int = 0
    longest: int = 0
    longest_prompt: int = 0
    mean: float = 0.0
    cut_sides: int = 0
    cut_tokens: int = 0
    refused: dict[int, str] = field(default_factory=dict)

    def add(self, pair: TokenPair, max_length: int) -> None:
        """Count one pair."""
        sides = [len(pair.prompt_ids) + len(side) for side in (pair.chosen_ids, pair.rejected_ids)]
        over = [length - max_length for length in sides if length > max_length]
        self.mean = (self.mean * self.pairs + sum(sides) / 2) / (self.pairs + 1)
        self.pairs += 1
        self.longest = max(self.longest, *sides)
        self.longest_prompt = max(self.longest_prompt, len(pair.prompt_ids))
        self.cut_sides += len(over)
        self.cut_tokens += sum(over)


@dataclass(frozen=True)
class PairData:
    """The pairs of one file that can be trained on, and the report on all of them."""

    pairs: list[TokenPair]
    report: LengthReport


def load_pairs(uri: str, store: Workspace, tokenizer: PreTrainedTokenizerBase, max_length: int) -> PairData:
    """Read and tokenize a file of preference pairs; what cannot be trained on is refused, counted and named.

    Args:
        uri: JSONL of `PreferencePair`; extra columns go no further.
        store: the workspace through which `uri` is read.
        tokenizer: with a chat template.
        max_length: in tokens; prompt + side is cut there.

    Raises:
        PreflowError: a line is wrong, or not one pair can be trained on.
    """
    report, kept = LengthReport(), []
    for line, row in enumerate(read_rows(PreferencePair, uri, store), 1):
        pair = tokenize(row, tokenizer, line)
        report.add(pair, max_length)
        reason = pair.refusal(max_length)
        if reason is None:
            kept.append(pair)
        else:
            report.refused[line] = reason
    _report(uri, report, max_length)
    if not kept:
        line, reason = next(iter(report.refused.items()))
        raise NoUsablePairsError(
            f"{uri}: none of its {report.pairs} pairs can be trained on (line {line}: {reason}; max_length is "
            f"{max_length}). Raise max_length, or judge completions that differ."
        )
    return PairData(kept, report)


def _report(uri: str, report: LengthReport, max_length: int) -> None:
    LOG.info(
        "%s: %d pairs, mean %.0f tokens, longest %d (prompt %d); %d sides cut at %d tokens, %d tokens lost",
        uri, report.pairs, report.mean, report.longest, report.longest_prompt, report.cut_sides, max_length,
        report.cut_tokens,
    )  # fmt: skip
    if report.refused:
        named = "; ".join(f"line {line}: {reason}" for line, reason in list(report.refused.items())[:5])
        LOG.warning("%s: %d pairs refused and left out: %s", uri, len(report.refused), named)


def tokenize(row: PreferencePair, tokenizer: PreTrainedTokenizerBase, line: int) -> TokenPair:
    """Tokenize one pair as TRL's DPOTrainer does: the sides start where they leave the prompt's own tokens."""
    prompt, chosen, rejected = (
        [message.model_dump() for message in messages] for messages in (row.prompt, row.chosen, row.rejected)
    )
    prompt_ids = _template(tokenizer, prompt, add_generation_prompt=True)
    with_chosen = _template(tokenizer, prompt + chosen)
    with_rejected = _template(tokenizer, prompt + rejected)
    start = min(common_prefix_length(prompt_ids, with_chosen), common_prefix_length(prompt_ids, with_rejected))
    return TokenPair(
        line=line,
        sha256=digest([prompt_ids[:start], with_chosen[start:], with_rejected[start:]]),
        prompt_ids=prompt_ids[:start],
        chosen_ids=with_chosen[start:],
        rejected_ids=with_rejected[start:],
    )


def _template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]
    return ids


def make_micro_batches(lengths: Sequence[int], size: int, group_by_length: bool, seed: int) -> list[list[int]]:
    """Partition row numbers into micro-batches of `size`; the last one may be smaller.

    They hold the same pairs in every epoch, so that a pair is always padded and computed alike and its cached
    reference log-probs are those of a fresh computation, to the last bit.

    Args:
        lengths: tokens of each row.
        size: pairs in a micro-batch.
        group_by_length: longest first, so that memory runs out at once or never; else shuffled with `seed`.
        seed: of the shuffle.
    """
    order = list(range(len(lengths)))
    if group_by_length:
        order.sort(key=lambda row: (-lengths[row], row))
    else:
        random.Random(seed).shuffle(order)
    return [order[start : start + size] for start in range(0, len(order), size)]


class MicroBatchSampler(Sampler[int]):
    """Yields row numbers, micro-batch after micro-batch, in an order that only seed and epoch decide.

    The first epoch starts with the first micro-batch (the longest, when grouped by length); a smaller one comes last.
    """

    def __init__(self, micro_batches: Sequence[list[int]], seed: int) -> None:
        self._micro_batches = list(micro_batches)
        self._seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return sum(len(batch) for batch in self._micro_batches)

    def __iter__(self) -> Iterator[int]:
        for batch in self.order(self.epoch):
            yield from batch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def order(self, epoch: int) -> list[list[int]]:
        """Return the micro-batches in the order of `epoch`."""
        batches = list(self._micro_batches)
        smaller = [batches.pop()] if len(batches) > 1 and len(batches[-1]) < len(batches[0]) else []
        first = [batches.pop(0)] if epoch == 0 else []
        random.Random(f"{self._seed}-{epoch}").shuffle(batches)
        return first + batches + smaller


def as_dataset(pairs: Sequence[TokenPair]) -> Dataset:
    """Return the columns that the trainer reads: prompt_ids, chosen_ids, rejected_ids."""
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_dict({name: [getattr(pair, name) for pair in pairs] for name in columns})
