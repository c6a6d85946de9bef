"""A look at preference pairs that something else made, before anything is trained on them."""

from prefect import flow

from tasks.config import Location
from tasks.judge.quality.audit import measure_pairs
from tasks.report.run import publish
from tasks.report.sections import quality_section
from tasks.store.measures import QualityReport


@flow(name="audit-preferences")
async def audit_preferences(
    pairs: Location, val_pairs: Location | None = None, completions: Location | None = None
) -> QualityReport:
    """Measure preference pairs that something else made: length, position, confidence, and what stands in both files.

    Args:
        pairs: The training pairs, JSONL: a path or gs:// address.
        val_pairs: The held-out pairs, if there are any.
        completions: The completions that were judged, in the order shown; empty: nothing is said about positions.
    """
    report = measure_pairs(pairs, val_pairs, completions)
    await publish(quality_section(report))
    return report
