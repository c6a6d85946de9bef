"""Counters behind a quality report: each adds up over rows, so memory does not grow with their number."""

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.errors import PreflowError
from tasks.store.records import PairRow, prompt_id

WORD = re.compile(r"\w+|[^\w\s]")
SPEAKER = re.compile(r"^\[([^\]\n]{1,40})\]", re.MULTILINE)
NGRAMS = (1, 2, 3)
DIVERSITY_PROMPTS = 2000
MAX_KEYS = 200
TOKEN_BIN, CHARACTER_BIN, MAX_BIN = 10, 50, 2000
OTHER = "(other)"

CountTokens = Callable[[str], int]
# Of each prompt: the digests of the texts in every row of completions that it has.
Candidates = dict[bytes, list[list[bytes]]]


def short(value: float) -> float:
    """Return `value` to 6 significant digits, as it stands in a report."""
    return float(f"{value:.6g}")


def count_words(text: str) -> int:
    """Count words and punctuation marks: a stand-in for a model's tokens, without its tokenizer."""
    return len(WORD.findall(text))


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a share (Wilson 1927); `total` must be at least 1."""
    from scipy.stats import binomtest  # here and below: scipy takes a second to import, and flows must start at once

    interval = binomtest(successes, total).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


def _without_numbers(text: str) -> str:
    """Make one key of messages that differ in their figures only."""
    return re.sub(r"\d+(\.\d+)?", "n", text)[:120]


def _count(counter: Counter[str], key: str) -> None:
    """Count `key`; a counter whose keys come from data stops taking new ones at MAX_KEYS."""
    counter[key if key in counter or len(counter) < MAX_KEYS else OTHER] += 1


@dataclass
class Positions:
    """How often one side's completion lay at each position, beside how often it would by chance."""

    shown: Counter[int] = field(default_factory=Counter)
    observed: Counter[int] = field(default_factory=Counter)
    expected: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, position: int, size: int) -> None:
        """Count one verdict: 0-based position among `size`."""
        self.observed[position] += 1
        for k in range(size):
            self.shown[k] += 1
            self.expected[k] += 1 / size

    def table(self) -> list[dict[str, Any]]:
        """Return one row a position (1-based), with its 95 % Wilson interval."""
        return [
            {
                "position": k + 1,
                "shown": self.shown[k],
                "observed": self.observed[k],
                "rate": short(self.observed[k] / self.shown[k]),
                "chance": short(self.expected[k] / self.shown[k]),
                "lift": short(self.observed[k] / self.expected[k]),
                "interval": [short(bound) for bound in wilson_interval(self.observed[k], self.shown[k])],
            }
            for k in sorted(self.shown)
        ]

    def drift(self) -> float:
        """Return how far the mean position lies from chance, in standard errors; positive is late."""
        total = sum(self.observed.values())
        mean = sum(k * share for k, share in self.expected.items()) / total
        variance = sum((k - mean) ** 2 * share for k, share in self.expected.items()) / total
        moved = sum(k * count for k, count in self.observed.items()) / total - mean
        return float(moved / (variance / total) ** 0.5) if variance else 0.0


@dataclass
class Agreement:
    """Krippendorff's coincidence matrix, which adds up over units: no vote needs to be kept."""

    coincidences: dict[tuple[int, int], float] = field(default_factory=lambda: defaultdict(float))
    units: int = 0

    def add(self, values: Sequence[int]) -> None:
        """Count one unit: the values that its raters gave it; one alone says nothing."""
        if len(values) < 2:
            return
        self.units += 1
        counts = Counter(values)
        for a, count_a in counts.items():
            for b, count_b in counts.items():
                self.coincidences[a, b] += count_a * (count_b - (a == b)) / (len(values) - 1)

    def alpha(self) -> float | None:
        """Return nominal alpha, 1 - observed / expected disagreement (Krippendorff 2011); None without variation."""
        totals: dict[int, float] = defaultdict(float)
        for (a, _), count in self.coincidences.items():
            totals[a] += count
        n = sum(totals.values())
        observed = sum(count for (a, b), count in self.coincidences.items() if a != b)
        expected = n * n - sum(count * count for count in totals.values())
        return 1 - (n - 1) * observed / expected if expected > 1e-9 else None


@dataclass
class Flips:
    """Pairs of verdicts of one judge on one prompt in two orders, and how many of them name another completion."""

    compared: int = 0
    flipped: int = 0
    prompts: int = 0
    prompts_flipped: int = 0

    def add(self, choices: Sequence[int]) -> None:
        """Count the choices of one judge on one prompt, one for each order."""
        votes = len(choices)
        if votes < 2:
            return
        same = sum(count * (count - 1) // 2 for count in Counter(choices).values())
        pairs = votes * (votes - 1) // 2
        self.compared += pairs
        self.flipped += pairs - same
        self.prompts += 1
        self.prompts_flipped += same < pairs


@dataclass
class Lengths:
    """Lengths of chosen and rejected in one unit: who is longer, and histograms of bounded size."""

    width: int
    longer: int = 0
    shorter: int = 0
    equal: int = 0
    chosen: Counter[int] = field(default_factory=Counter)
    rejected: Counter[int] = field(default_factory=Counter)

    def add(self, chosen: int, rejected: int) -> None:
        """Count one pair's lengths."""
        self.longer += chosen > rejected
        self.shorter += chosen < rejected
        self.equal += chosen == rejected
        self.chosen[min(chosen // self.width, MAX_BIN)] += 1
        self.rejected[min(rejected // self.width, MAX_BIN)] += 1

    def histogram(self, most: int = 40) -> dict[str, list[int]]:
        """Return edges and counts in at most `most` bins; the last one holds the longest per cent, whatever it is."""
        both = self.chosen + self.rejected
        reach, total = 0, sum(both.values())
        while sum(count for k, count in both.items() if k <= reach) < 0.99 * total:
            reach += 1
        step = -(-(reach + 1) // most)
        bins = -(-(reach + 1) // step)
        return {
            "edges": [k * step * self.width for k in range(bins + 1)],
            "chosen": _rebinned(self.chosen, step, bins),
            "rejected": _rebinned(self.rejected, step, bins),
        }


def _rebinned(counts: Counter[int], step: int, bins: int) -> list[int]:
    out = [0] * bins
    for k, count in counts.items():
        out[min(k // step, bins - 1)] += count
    return out


@dataclass
class Diversity:
    """Distinct-n (Li et al. 2016): distinct over all n-grams, of two completions of a prompt, averaged over prompts.

    Two, because over more of them the figure falls with their number, and could be held against no fixed range.
    """

    prompts: int = 0
    total: dict[int, float] = field(default_factory=lambda: dict.fromkeys(NGRAMS, 0.0))

    def add(self, completions: Sequence[str]) -> None:
        """Count one prompt; beyond DIVERSITY_PROMPTS more of them would cost time and move nothing."""
        if self.prompts >= DIVERSITY_PROMPTS:
            return
        self.prompts += 1
        words = [WORD.findall(text.lower()) for text in completions[:2]]
        for n in NGRAMS:
            grams = [gram for text in words for gram in zip(*(text[i:] for i in range(n)), strict=False)]
            self.total[n] += len(set(grams)) / len(grams) if grams else 0.0


@dataclass
class Tally:
    """All counters of a report."""

    count_tokens: CountTokens
    rows: int = 0
    pairs: int = 0
    degenerate: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    best: Positions = field(default_factory=Positions)
    worst: Positions = field(default_factory=Positions)
    flips: Flips = field(default_factory=Flips)
    worst_flips: Flips = field(default_factory=Flips)
    agreement: Agreement = field(default_factory=Agreement)
    worst_agreement: Agreement = field(default_factory=Agreement)
    characters: Lengths = field(default_factory=lambda: Lengths(CHARACTER_BIN))
    tokens: Lengths = field(default_factory=lambda: Lengths(TOKEN_BIN))
    diversity: Diversity = field(default_factory=Diversity)
    speakers: dict[str, Counter[str]] = field(default_factory=lambda: {"chosen": Counter(), "rejected": Counter()})
    scenes: int = 0
    confidence: Counter[int] = field(default_factory=Counter)
    votes: int = 0
    placed: int = 0
    refused: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    usage: Counter[str] = field(default_factory=Counter)

    def add_judged(self, row: Mapping[str, Any]) -> None:
        """Count one row of `judged.jsonl`."""
        self.rows += 1
        self.statuses[row["status"]] += 1
        if row.get("reason"):
            _count(self.reasons, _without_numbers(row["reason"]))
        self._add_votes(row["votes"])
        self.add_completions(row["completions"], row.get("finish_reasons") or [])
        if row["status"] == "pair":
            self.add_pair(row["completions"][row["best"]], row["completions"][row["worst"]])

    def add_preference(self, pair: PairRow, side: str, candidates: Candidates | None, where: str) -> bytes:
        """Count one preference pair and return its prompt's id."""
        self.rows += 1
        self.statuses[side] += 1
        key = bytes.fromhex(prompt_id([message.model_dump() for message in pair.prompt]))
        chosen, rejected = pair.chosen[-1].content, pair.rejected[-1].content
        self.add_pair(chosen, rejected)
        confidence = (pair.model_extra or {}).get("confidence")
        if confidence is not None:
            self._add_confidence(confidence, where)
        if candidates is not None:
            self._locate(candidates.get(key), chosen, rejected)
        return key

    def add_pair(self, chosen: str, rejected: str) -> None:
        """Count the texts of one pair."""
        self.pairs += 1
        self.degenerate += not chosen.strip() or not rejected.strip() or chosen.strip() == rejected.strip()
        self.characters.add(len(chosen), len(rejected))
        self.tokens.add(self.count_tokens(chosen), self.count_tokens(rejected))
        named = {"chosen": SPEAKER.findall(chosen), "rejected": SPEAKER.findall(rejected)}
        self.scenes += all(named.values())
        for side, names in named.items():
            for name in names:
                _count(self.speakers[side], name)

    def add_completions(self, completions: Sequence[str], finish_reasons: Sequence[str]) -> None:
        """Count the completions of one prompt."""
        self.diversity.add(completions)
        for reason in finish_reasons:
            _count(self.finish_reasons, str(reason))

    def _add_votes(self, votes: Sequence[Mapping[str, Any]]) -> None:
        readable = [vote for vote in votes if "error" not in vote]
        self.votes += len(votes)
        for vote in votes:
            self.usage.update({name: count for name, count in (vote.get("usage") or {}).items() if count})
            if "error" in vote:
                self._add_error(str(vote["error"]))
        by_judge: dict[str, dict[tuple[int, ...], Mapping[str, Any]]] = defaultdict(dict)
        for vote in readable:
            order = vote["order"]
            self.best.add(order.index(vote["best"]), len(order))
            self.worst.add(order.index(vote["worst"]), len(order))
            if vote.get("confidence") is not None:
                self.confidence[round(vote["confidence"])] += 1
            by_judge[vote["judge"]][tuple(order)] = vote
        for orders in by_judge.values():
            self.flips.add([vote["best"] for vote in orders.values()])
            self.worst_flips.add([vote["worst"] for vote in orders.values()])
        self.agreement.add([vote["best"] for vote in readable])
        self.worst_agreement.add([vote["worst"] for vote in readable])

    def _add_error(self, error: str) -> None:
        self.refused += error.startswith("refused")
        _count(self.errors, _without_numbers(error))

    def _add_confidence(self, confidence: object, where: str) -> None:
        if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not math.isfinite(confidence):
            raise PreflowError(f"{where}: confidence is {confidence!r}, not a number. Give 1-5, or leave it out.")
        self.confidence[round(confidence)] += 1

    def _locate(self, rows: list[list[bytes]] | None, chosen: str, rejected: str) -> None:
        if not rows:
            self.reasons["prompt not among the completions"] += 1
            return
        best, worst = text_key(chosen), text_key(rejected)
        found = [row for row in rows if best in row and worst in row]
        places = {(row.index(best), row.index(worst), len(row)) for row in found}
        twice = best == worst or any(row.count(best) > 1 or row.count(worst) > 1 for row in found)
        if not found:
            self.reasons["text not among the prompt's completions"] += 1
        elif twice or len(places) > 1:
            self.reasons["text at more than one position"] += 1
        else:
            ((best_at, worst_at, size),) = places
            self.placed += 1
            self.best.add(best_at, size)
            self.worst.add(worst_at, size)


def text_key(text: str) -> bytes:
    """Return a short digest of a text; white space at its ends does not count."""
    return hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=12).digest()
