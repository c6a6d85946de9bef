"""Samples of two adapters side by side, and what each comparison is worth to the new one."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from tasks.errors import PreflowError
from tasks.evaluate.intervals import Estimate, Floats, estimate_mean, estimate_without_length
from tasks.store.measures import WinRate

Row = Mapping[str, Any]


def join_samples(
    baseline: Iterable[Row], candidate: Iterable[Row], failed: Collection[str]
) -> Iterator[dict[str, Any]]:
    """Yield the i-th samples of both adapters as rows of two completions, [baseline, candidate].

    Both files are in the order of the held-out prompts, so that only rows without a partner are held meanwhile. The
    `failed` are prompts for which the new adapter has no completions; they are paired with silence.
    """
    others, waiting = iter(candidate), dict[str, Row]()
    for row in baseline:
        samples = [""] * len(row["completions"])
        if row["id"] not in failed:
            while row["id"] not in waiting and (other := next(others, None)) is not None:
                waiting[other["id"]] = other
            samples = waiting.pop(row["id"], {}).get("completions", [])
        kept = {"prompt": row["prompt"], **({"group": row["group"]} if row.get("group") else {})}
        for number, pair in enumerate(zip(row["completions"], samples, strict=False)):
            yield {"id": f"{row['id']}#{number}", "prompt_id": row["id"], **kept, "completions": list(pair)}


@dataclass(frozen=True)
class Comparison:
    """One comparison: what it is worth to the new adapter (None: it could not be read), and what it may be like."""

    prompt: str
    cluster: str
    outcome: float | None
    lengths: tuple[int, int]


def read_comparison(row: Row, judges: Collection[str] | None = None) -> Comparison:
    """Read one row of verdicts, by the votes of some of the judges; None: of all."""
    baseline, candidate = (len(text.strip()) for text in row["completions"])
    group = row.get("group")
    cluster = f"group {group}" if group else row["prompt_id"]
    return Comparison(row["prompt_id"], cluster, outcome_of(row, judges), (baseline, candidate))


def outcome_of(row: Row, judges: Collection[str] | None = None) -> float | None:
    """Return what one comparison is worth to the candidate (completion 1), averaged over the judges.

    For a judge it is 1 if the candidate wins in every order, 0 if the baseline does, and 0.5 otherwise; a judge with a
    verdict that could not be read does not count, and without one that counts the outcome is None. A sample that is
    empty loses to one that is not, unasked, and equal ones are a tie.
    """
    baseline, candidate = (text.strip() for text in row["completions"])
    if bool(baseline) != bool(candidate):
        return float(bool(candidate))
    if baseline == candidate:
        return 0.5
    best: dict[str, list[int | None]] = {}
    for vote in row["votes"]:
        if judges is None or vote["judge"] in judges:
            best.setdefault(vote["judge"], []).append(vote.get("best"))
    worth = [0.5 if len(set(named)) > 1 else float(named[0] == 1) for named in best.values() if None not in named]
    return fmean(worth) if worth else None


def win_rate(comparisons: Sequence[Comparison], confidence: float) -> WinRate:
    """Return the mean outcome with an interval that knows which comparisons are alike.

    Groups are the clusters, and prompts that have none; see `Estimate.interval`.

    Raises:
        PreflowError: there is no comparison that could be read.
    """
    return _measure(comparisons, confidence, lambda outcomes, _, clusters: estimate_mean(outcomes, clusters))


def length_controlled(comparisons: Sequence[Comparison], confidence: float) -> WinRate:
    """Return the win rate with length taken out: see `estimate_without_length`."""
    return _measure(comparisons, confidence, estimate_without_length)


def _measure(
    comparisons: Sequence[Comparison], confidence: float, estimate: Callable[[Floats, Floats, list[str]], Estimate]
) -> WinRate:
    read = [one for one in comparisons if one.outcome is not None]
    if not read:
        raise PreflowError("evaluation: no comparison could be judged; see the verdicts for the judge's own words")
    outcomes = np.array([one.outcome for one in read], dtype=np.float64)
    lengths = np.array([one.lengths for one in read], dtype=np.float64)
    found = estimate(outcomes, lengths, [one.cluster for one in read])
    lower, upper = found.interval(confidence)
    return WinRate(
        win_rate=found.rate, lower=lower, upper=upper, confidence=confidence, samples=found.samples,
        prompts=len({one.prompt for one in read}), clusters=found.clusters, ties=found.ties,
        effective_samples=found.effective_samples, unreadable=len(comparisons) - len(read),
        silent=sum(one.lengths[0] > 0 and not one.lengths[1] for one in read),
        sft_silent=sum(not one.lengths[0] for one in read),
    )  # fmt: skip
