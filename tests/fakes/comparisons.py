"""Comparisons by their outcomes alone, and planted judges whose taste is known."""

from collections.abc import Mapping, Sequence

from tasks.evaluate.comparisons import Comparison


def compared(
    outcomes: Mapping[str, Sequence[float | None]], groups: Mapping[str, str] | None = None
) -> list[Comparison]:
    """Return comparisons of texts of one length: of each prompt the outcomes of its samples."""
    return [
        Comparison(prompt=prompt, cluster=(groups or {}).get(prompt, prompt), outcome=outcome, lengths=(100, 100))
        for prompt, values in outcomes.items()
        for outcome in values
    ]
