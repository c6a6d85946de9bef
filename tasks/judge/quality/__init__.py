"""What the judge and its pairs are worth: position, flips, agreement, length, diversity, failures, in one pass."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from tasks.judge.quality.counters import Candidates, CountTokens, Tally, count_words, text_key
from tasks.judge.quality.metrics import (
    confidence_metric,
    failure_metric,
    judge_metrics,
    leak_metric,
    match_metric,
    position_metrics,
    text_metrics,
    yield_metric,
)
from tasks.judge.quality.plot import plot_quality
from tasks.store.measures import Metric, QualityReport
from tasks.store.records import CompletionsRow, PairRow, prompt_id, read_rows

__all__ = ["Metric", "QualityReport", "audit_preferences", "measure_judgements", "plot_quality"]


def measure_judgements(
    rows: Iterable[Mapping[str, Any]],
    count_tokens: CountTokens | None = None,
    usage: Mapping[str, int] | None = None,
) -> QualityReport:
    """Measure judged rows in one pass; only counters are kept, so memory does not grow with the rows.

    Args:
        rows: the rows of `judged.jsonl`.
        count_tokens: tokens in a text; without it words and punctuation marks are counted.
        usage: what all verdicts together used (`requests`, `prompt_tokens`, ...), where the votes do not say it.
    """
    tally = Tally(count_tokens or count_words)
    for row in rows:
        tally.add_judged(row)
    if usage is not None:
        tally.usage.clear()
        tally.usage.update(usage)
    metrics = [yield_metric(tally), failure_metric(tally), *judge_metrics(tally), *text_metrics(tally)]
    return _report(tally, metrics)


def audit_preferences(
    train: str, val: str | None = None, completions: str | None = None, count_tokens: CountTokens | None = None
) -> QualityReport:
    """Measure preference pairs that something else made.

    Pairs hold no positions, so these are recovered from the completions: rows are joined by the prompt's id, and the
    place of the chosen and the rejected text among the row's completions is taken for the position the judge saw
    them in (true of a judge that is shown them once, in the file's order).

    Args:
        train: JSONL of preference pairs, a path or gs:// address.
        val: the held-out pairs, if there are any.
        completions: JSONL of the completions that were judged; without it nothing is said about positions.
        count_tokens: tokens in a text; without it words and punctuation marks are counted.

    Raises:
        PreflowError: a file is missing or empty, or a row is wrong (file, line and field are named).
    """
    tally = Tally(count_tokens or count_words)
    candidates = _read_candidates(completions, tally) if completions else None
    sides = {"train": train} if val is None else {"train": train, "val": val}
    seen: dict[str, set[bytes]] = {side: set() for side in sides}
    for side, uri in sides.items():
        for number, pair in enumerate(read_rows(PairRow, uri), 1):
            seen[side].add(tally.add_preference(pair, side, candidates, f"{uri}, row {number}"))
    metrics = [leak_metric(seen["train"], seen.get("val", set()))]
    if candidates is not None:
        metrics += [match_metric(tally), *position_metrics(tally)]
    if tally.confidence:
        metrics.append(confidence_metric(tally.confidence))
    return _report(tally, [*metrics, *text_metrics(tally)])


def _read_candidates(uri: str, tally: Tally) -> Candidates:
    candidates: Candidates = defaultdict(list)
    for row in read_rows(CompletionsRow, uri):
        key = bytes.fromhex(prompt_id([message.model_dump() for message in row.prompt]))
        candidates[key].append([text_key(text) for text in row.completions])
        tally.add_completions(row.completions, row.finish_reasons)
    return candidates


def _report(tally: Tally, metrics: list[Metric]) -> QualityReport:
    lengths = {"characters": tally.characters.histogram(), "tokens": tally.tokens.histogram()} if tally.pairs else {}
    return QualityReport(
        rows=tally.rows,
        pairs=tally.pairs,
        statuses=dict(tally.statuses),
        reasons=dict(tally.reasons.most_common()),
        degenerate=tally.degenerate,
        metrics=metrics,
        detail={"lengths": lengths},
    )
