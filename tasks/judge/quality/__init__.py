"""What the judge and its pairs are worth: position, flips, agreement, length, diversity, failures, in one pass."""

from collections.abc import Iterable, Mapping
from typing import Any

from tasks.judge.quality.audit import measure_pairs
from tasks.judge.quality.metrics import JUDGE, TEXTS, make_report
from tasks.judge.quality.plot import plot_quality
from tasks.judge.quality.tally import Tally
from tasks.store.measures import QualityReport

__all__ = ["measure_judgements", "measure_pairs", "plot_quality"]


def measure_judgements(rows: Iterable[Mapping[str, Any]], usage: Mapping[str, int] | None = None) -> QualityReport:
    """Measure judged rows in one pass; of each verdict and pair only a few numbers are kept.

    Args:
        rows: the rows of `judged.jsonl`.
        usage: what all verdicts together used: `requests`, `prompt_tokens`, ...
    """
    tally = Tally()
    tally.usage.update(usage or {})
    for row in rows:
        tally.add(row)
    return make_report(tally, (*JUDGE, *TEXTS))
