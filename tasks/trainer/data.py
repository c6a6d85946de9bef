"""Preference pairs as tokens: read, measured and grouped into micro-batches before any model is loaded."""

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from tasks.config import ChatSettings
from tasks.errors import PreflowError
from tasks.llm.chat_template import ChatTemplate, TemplateRefused, same_words
from tasks.store.forms import ended_by_itself
from tasks.store.records import Message, PairRow, number_rows
from tasks.store.workspace import Workspace, digest

LOG = logging.getLogger(__name__)

# Share of prompts or completions that may be in other tokens than the model is sampled and served with.
MOST_UNLIKE = 0.01
# Rows whose texts go to the tokenizer in one call; more at once are not faster.
ROWS_AT_ONCE = 100


class NoUsablePairsError(PreflowError):
    """Not one pair of a file can be trained on."""


@dataclass(frozen=True)
class TokenPair:
    """One pair in tokens; `line` is its line in the file, from 1, `sampled` which sides have the sampled tokens.

    One with a `problem`, such as tokens that the model has no embeddings for, is never trained on.
    One that is `sft_only` has equal sides: every DPO loss is a function of how both differ from the reference, so its
    gradient cancels out, and an SFT loss on the chosen side remains.
    """

    line: int
    sha256: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    sampled: tuple[bool, bool] = (False, False)
    sft_only: bool = False
    problem: str | None = None

    def length(self, max_length: int) -> int:
        """Return the length of the longer side with its prompt, in tokens, after truncation."""
        return min(max_length, len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids)))

    def refusal(self, max_length: int) -> str | None:
        """Return why this pair cannot be trained on, or None."""
        room = max_length - len(self.prompt_ids)
        if self.problem:
            return self.problem
        if room <= 0:
            return f"the prompt alone has {len(self.prompt_ids)} tokens"
        if not (self.chosen_ids and self.rejected_ids):
            return "a side is empty"
        if not self.sft_only and self.chosen_ids[:room] == self.rejected_ids[:room]:
            return "chosen and rejected are equal" + ("" if room >= len(self.chosen_ids) else " up to the cut")
        return None


@dataclass
class LengthReport:
    """What tokenizing one file showed; lengths in tokens of prompt + side, the rest in sides or pairs.

    Attributes:
        used: pairs that are trained on.
        exact: sides of them whose tokens are exactly those that were sampled, all of them.
        unfinished: sides that were cut while being sampled: trained on without an end of turn.
        altered: sides without sampled tokens that the chat template would have changed; they are kept as they are.
        ended_early: sides whose text spells an end of turn: what stands behind it is left out.
        rewritten: those of them in which it would have changed more than white space and thinking.
        other_prompts: pairs whose prompt was sampled with other tokens than the chat template gives.
        foreign: sides whose sampled tokens do not read as their text: of another tokenizer.
    """

    pairs: int = 0
    longest: int = 0
    longest_prompt: int = 0
    mean: float = 0.0
    cut_sides: int = 0
    cut_tokens: int = 0
    used: int = 0
    exact: int = 0
    unfinished: int = 0
    altered: int = 0
    ended_early: int = 0
    rewritten: int = 0
    other_prompts: int = 0
    foreign: int = 0
    refused: dict[int, str] = field(default_factory=dict)

    def add(self, pair: TokenPair, max_length: int) -> bool:
        """Count one pair, and tell whether it is trained on."""
        sides = [len(pair.prompt_ids) + len(side) for side in (pair.chosen_ids, pair.rejected_ids)]
        over = [length - max_length for length in sides if length > max_length]
        self.mean = (self.mean * self.pairs + sum(sides) / 2) / (self.pairs + 1)
        self.pairs += 1
        self.longest = max(self.longest, *sides)
        self.longest_prompt = max(self.longest_prompt, len(pair.prompt_ids))
        self.cut_sides += len(over)
        self.cut_tokens += sum(over)
        if reason := pair.refusal(max_length):
            self.refused[pair.line] = reason
            return False
        self.used += 1
        self.exact += sum(known and length <= max_length for known, length in zip(pair.sampled, sides, strict=True))
        return True

    @property
    def exact_share(self) -> float:
        """Share of completions that are trained on exactly as they were sampled, token by token."""
        return self.exact / (2 * self.used) if self.used else 0.0

    def check(self, uri: str, template: ChatTemplate) -> None:
        """See that the tokens are those of the model that is trained, and of the template it is served with."""
        served = "sampled, served and trained in other words. Serve with this template (vLLM: --chat-template), or "
        found = [
            (self.foreign, 2 * self.pairs, "completions have sampled tokens that do not read as their text: they are "
             "of another tokenizer. Give the base model that was sampled from as base_model."),
            (0 if template.has_clock else self.other_prompts, self.pairs, "prompts were sampled with other tokens than "
             f"the chat template of {template.source} gives: the model would be {served}name the server's own with "
             "chat_template, and hand it the same chat_template_kwargs."),
            (self.rewritten, 2 * self.pairs, f"answers would be changed by the chat template of {template.source}, so "
             f"they would be {served}write the answers as it does."),
        ]  # fmt: skip
        for count, of, what in found:
            if count > MOST_UNLIKE * of:
                raise PreflowError(f"{uri}: {count} of {of} {what}")


@dataclass(frozen=True)
class PairData:
    """The pairs of one file that can be trained on, and the report on all of them."""

    pairs: list[TokenPair]
    report: LengthReport


class PairTokenizer:
    """Turns pairs into tokens: those that were sampled where the pair has them, else its text, rendered once.

    Rendered, a side is the prompt's text, the answer as it stands, and the template's end of turn, each tokenized on
    its own, as in sampling: white space, thinking and the prompt's last token stay what they were.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None = None, rows: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        template = template or ChatTemplate(tokenizer.chat_template, tokenizer.name_or_path, {}, ChatSettings())
        self.template = replace(template, special_tokens=tokenizer.special_tokens_map)
        self._lead, self._end = self.template.around_answer
        known = highest_token(tokenizer) + 1
        self._rows = min(rows or known, known)
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        (end,) = self._encode([self._end])
        self._ends = (added | set(tokenizer.all_special_ids)) & set(end)
        self._ends_of_a_turn = sum(number in self._ends for number in end)
        stops = template.settings.stop
        # Where sampling ended at other texts than the template's, the answer's own end is not known.
        self._knows_end = not stops or any(self._end.lstrip(" ").startswith(stop) for stop in stops)
        if not self._ends:
            LOG.warning("the chat template of %s ends an answer with %r, no special token: whether the model learns to "
                        "stop there is not certain", template.source, self._end)  # fmt: skip

    def tokenize(self, rows: Sequence[tuple[str, PairRow]], report: LengthReport) -> list[TokenPair]:
        """Return the tokens of pairs with their places, `file:line`; what was noticed is counted in `report`.

        All texts go to the tokenizer together: one by one, its wrapping takes several times as long as the tokens.
        """
        texts = [text for place, row in rows for text in self._render(place, row, report)]
        encoded = iter(self._encode(texts))
        return [self._pair(place, row, [next(encoded), next(encoded), next(encoded)], report) for place, row in rows]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def _render(self, place: str, row: PairRow, report: LengthReport) -> tuple[str, str, str]:
        """Return the texts of the prompt and both answers; nothing for an answer whose tokens are known."""
        messages = [message.model_dump() for message in row.prompt]
        try:
            prompt = self.template.render(messages, prompt=True)
            for answer, ids, _ in _sides(row):
                if ids is None:
                    self._compare(prompt, answer, self.template.render([*messages, answer.model_dump()]), report)
        except TemplateRefused as error:
            raise PreflowError(f"{place}: {error}. Change the messages, or give another chat_template.") from error
        end = self._end if self._ends else self._end.rstrip()
        chosen, rejected = (
            self._lead_of(answer.content) + answer.content + (end if self._is_ended(reason) else "")
            if ids is None else "" for answer, ids, reason in _sides(row)
        )  # fmt: skip
        return prompt, chosen, rejected

    def _lead_of(self, answer: str) -> str:
        return "" if answer.startswith(self._lead) else self._lead

    def _is_ended(self, reason: str | None) -> bool:
        return ended_by_itself(reason) and self._knows_end

    def _compare(self, prompt: str, answer: Message, whole: str, report: LengthReport) -> None:
        """Count an answer that the template would have changed: `whole` is the conversation as it renders it."""
        if whole == prompt + self._lead_of(answer.content) + answer.content + self._end:
            return
        report.altered += 1
        visible = answer.content.rpartition("</think>")[2]
        report.rewritten += not any(same_words(whole, prompt + text + self._end) for text in (answer.content, visible))

    def _pair(self, place: str, row: PairRow, rendered: list[list[int]], report: LengthReport) -> TokenPair:
        prompt, *answers = rendered
        # An empty list of tokens says that none are known, and not that nothing was asked.
        known, sides, line = row.prompt_token_ids or None, list(_sides(row)), int(place.rpartition(":")[2])
        if not row.chosen[0].content.strip():
            return TokenPair(line, digest(rendered), [], [], [], problem="chosen is empty, which would teach silence")
        sampled = list(filter(None, (known, *(ids for _, ids, _ in sides))))
        for number, ids in enumerate([*sampled, *filter(None, rendered)]):
            if min(ids) < 0 or max(ids) >= self._rows:
                report.foreign += number < len(sampled)
                problem = f"tokens from {min(ids)} to {max(ids)}, the model's go from 0 to {self._rows - 1}"
                return TokenPair(line, digest([prompt, ids]), [], [], [], problem=problem)
        if known is not None and known != prompt:
            report.other_prompts += 1
            prompt = known
        chosen, rejected = (self._side(*side, ids, report) for side, ids in zip(sides, answers, strict=True))
        if row.sft_only:
            rejected = chosen
        sampled_chosen, sampled_rejected = (known is not None and ids is not None for _, ids, _ in sides)
        tokens = prompt, chosen, rejected
        return TokenPair(
            line, digest(list(tokens)), *tokens, (sampled_chosen, sampled_rejected), sft_only=bool(row.sft_only)
        )

    def _side(
        self, answer: Message, sampled: list[int] | None, reason: str | None, rendered: list[int], report: LengthReport
    ) -> list[int]:
        report.unfinished += not ended_by_itself(reason)
        if sampled is not None:
            report.foreign += not self._reads(sampled, answer.content)
            return sampled
        if not self._is_ended(reason):
            return rendered
        places = [place for place, number in enumerate(rendered, 1) if number in self._ends]
        if len(places) > self._ends_of_a_turn:  # the answer spells one itself, and is cut there, as a server would
            report.ended_early += 1
        return rendered[: next(iter(places), None)]

    def _reads(self, ids: list[int], text: str) -> bool:
        """Tell whether sampled tokens are this text, of which a server may have taken thinking and stop texts."""
        read, text = ("".join(part.replace("\ufffd", "").split()) for part in (self._tokenizer.decode(ids, True), text))
        return text in read


def highest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the highest number that a tokenizer gives a token."""
    numbers: dict[str, int] = tokenizer.get_vocab()
    return max(numbers.values())


def _sides(row: PairRow) -> Iterator[tuple[Message, list[int] | None, str | None]]:
    """Yield the answer, its sampled tokens and the reason for its end, of both sides."""
    yield row.chosen[0], row.chosen_token_ids, row.chosen_finish_reason
    yield row.rejected[0], row.rejected_token_ids, row.rejected_finish_reason


def load_pairs(
    uri: str,
    store: Workspace,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    template: ChatTemplate | None = None,
    rows: int | None = None,
) -> PairData:
    """Read and tokenize a file of `PairRow`s; what cannot be trained on is refused, counted and named.

    Prompt + side is cut at `max_length` tokens; the model has embeddings for `rows` (None: all of the tokenizer's).
    Raises `PreflowError` if a line is wrong, not one pair can be trained on, or the tokens are not the model's own.
    """
    report, kept, reader = LengthReport(), [], PairTokenizer(tokenizer, template, rows)
    numbered = number_rows(PairRow, uri, store)
    while some := list(islice(numbered, ROWS_AT_ONCE)):
        kept += [pair for pair in reader.tokenize(some, report) if report.add(pair, max_length)]
    if not report.pairs:
        raise NoUsablePairsError(f"{uri}: has no rows. Give a JSONL file with at least one pair.")
    _report(uri, report, max_length)
    report.check(uri, reader.template)
    if not kept:
        line, reason = next(iter(report.refused.items()))
        raise NoUsablePairsError(
            f"{uri}: none of its {report.pairs} pairs can be trained on (line {line}: {reason}; max_length is "
            f"{max_length}). Raise max_length, or judge completions that differ."
        )
    return PairData(kept, report)


def _report(uri: str, report: LengthReport, max_length: int) -> None:
    LOG.info(
        "%s: %d pairs, mean %.0f tokens, longest %d (prompt %d); %d sides cut at %d tokens, %d tokens lost; share "
        "trained on exactly the sampled tokens %.3f; %d were cut in sampling and get no end of turn",
        uri, report.pairs, report.mean, report.longest, report.longest_prompt, report.cut_sides, max_length,
        report.cut_tokens, report.exact_share, report.unfinished,
    )  # fmt: skip
    if report.ended_early:
        LOG.warning("%s: %d answers spell an end of turn and are trained on up to there", uri, report.ended_early)
    if report.altered or report.other_prompts:
        LOG.warning(
            "%s: %d answers stand otherwise in the chat template (white space, thinking) and are trained on as they "
            "are; %d prompts were sampled with other tokens than it gives",
            uri, report.altered, report.other_prompts,
        )  # fmt: skip
    if report.refused:
        named = "; ".join(f"line {line}: {reason}" for line, reason in list(report.refused.items())[:5])
        LOG.warning("%s: %d pairs refused and left out: %s", uri, len(report.refused), named)


def make_micro_batches(lengths: Sequence[int], size: int, group_by_length: bool, seed: int) -> list[list[int]]:
    """Partition row numbers into micro-batches of `size`; the last one may be smaller.

    They hold the same pairs in every epoch, so that a pair is always padded and computed alike and its cached
    reference log-probs are those of a fresh computation, to the last bit. With `group_by_length` the longest come
    first, so that memory runs out at once or never; else they are shuffled.
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
