"""What a quality report is computed from: a few numbers of each verdict and pair, filled in one pass over the rows."""

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORD = re.compile(r"\w+|[^\w\s]")
SPEAKER = re.compile(r"^\[([^\]\n]{1,40})\]", re.MULTILINE)
NGRAMS = (1, 2, 3)
# Beyond so many prompts the share of distinct n-grams costs time and does not move.
DIVERSITY_PROMPTS = 2000
# A counter whose keys come from data takes no more than these; the rest is counted together.
MAX_KEYS = 200
OTHER = "(other)"
# What is kept of a verdict: the row it is on, how many were shown, where best and worst stood, and which they are.
COLUMNS = ("row", "shown", "best_at", "worst_at", "best", "worst")


@dataclass
class Tally:
    """Counts of judged rows.

    Attributes:
        lengths: of the pairs' chosen and rejected sides, in characters, in turn.
        degenerate: pairs whose sides are equal or empty.
        verdicts: COLUMNS of each verdict, in turn.
        compared: pairs of verdicts of one judge on one row in two orders; `flipped`: those with another best or worst.
        distinct: summed shares of distinct n-grams of `scored` prompts.
        scenes: pairs in which both sides name who speaks.
        scores: of the best completion of a prompt, rounded, where the judges were asked for scores.
    """

    rows: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    lengths: "array[int]" = field(default_factory=lambda: array("i"))
    degenerate: int = 0
    votes: int = 0
    verdicts: "array[int]" = field(default_factory=lambda: array("i"))
    errors: Counter[str] = field(default_factory=Counter)
    confidence: Counter[int] = field(default_factory=Counter)
    compared: int = 0
    flipped: Counter[str] = field(default_factory=Counter)
    scored: int = 0
    distinct: dict[int, float] = field(default_factory=lambda: dict.fromkeys(NGRAMS, 0.0))
    scenes: int = 0
    scores: Counter[int] = field(default_factory=Counter)
    speakers: dict[str, Counter[str]] = field(default_factory=lambda: {"chosen": Counter(), "rejected": Counter()})
    finish_reasons: Counter[str] = field(default_factory=Counter)

    @property
    def pairs(self) -> int:
        """Pairs so far."""
        return len(self.lengths) // 2

    def sides(self) -> NDArray[np.int64]:
        """Return the lengths of chosen and of rejected, a row each."""
        return np.array(self.lengths, dtype=np.int64).reshape(-1, 2).T

    def columns(self) -> dict[str, NDArray[np.int64]]:
        """Return the verdicts' columns by their names."""
        return dict(zip(COLUMNS, np.array(self.verdicts, dtype=np.int64).reshape(-1, len(COLUMNS)).T, strict=True))

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one row of `judged.jsonl`."""
        self.rows += 1
        self.statuses[row["status"]] += 1
        if row.get("reason"):
            _count(self.reasons, _without_numbers(row["reason"]))
        for reason in row.get("finish_reasons") or ():
            _count(self.finish_reasons, str(reason))
        if self.scored < DIVERSITY_PROMPTS:
            self._add_diversity(row["completions"])
        self._add_votes(row["votes"])
        if row.get("scores") and row["best"] is not None:
            self.scores[round(row["scores"][str(row["best"])])] += 1
        if row["status"] == "pair":
            self._add_pair(*(row["completions"][row[side]] for side in ("best", "worst")))

    def _add_votes(self, votes: Sequence[Mapping[str, Any]]) -> None:
        self.votes += len(votes)
        by_judge: dict[str, dict[tuple[int, ...], Mapping[str, Any]]] = defaultdict(dict)
        for vote in votes:
            if "error" in vote:
                _count(self.errors, _without_numbers(str(vote["error"])))
                continue
            order, best, worst = vote["order"], vote["best"], vote["worst"]
            self.verdicts.extend((self.rows, len(order), order.index(best), order.index(worst), best, worst))
            if vote.get("confidence") is not None:
                self.confidence[round(vote["confidence"])] += 1
            by_judge[vote["judge"]][tuple(order)] = vote
        for orders in by_judge.values():
            pairs = len(orders) * (len(orders) - 1) // 2
            self.compared += pairs
            for side in ("best", "worst"):
                named = Counter(vote[side] for vote in orders.values())
                self.flipped[side] += pairs - sum(count * (count - 1) // 2 for count in named.values())

    def _add_pair(self, *texts: str) -> None:
        self.lengths.extend(map(len, texts))
        self.degenerate += not all(text.strip() for text in texts) or texts[0].strip() == texts[1].strip()
        named = [SPEAKER.findall(text) for text in texts]
        self.scenes += all(named)
        for side, names in zip(("chosen", "rejected"), named, strict=True):
            for name in names:
                _count(self.speakers[side], name)

    def _add_diversity(self, completions: Sequence[str]) -> None:
        """Add distinct over all n-grams of the first two completions: of more, the figure falls with their number."""
        self.scored += 1
        words = [WORD.findall(text.lower()) for text in completions[:2]]
        for n in NGRAMS:
            grams = [gram for text in words for gram in zip(*(text[i:] for i in range(n)), strict=False)]
            self.distinct[n] += len(set(grams)) / len(grams) if grams else 0.0


def _without_numbers(text: str) -> str:
    """Make one key of messages that differ in their figures only."""
    return re.sub(r"\d+(\.\d+)?", "n", text)[:120]


def _count(counter: Counter[str], key: str) -> None:
    counter[key if key in counter or len(counter) < MAX_KEYS else OTHER] += 1
