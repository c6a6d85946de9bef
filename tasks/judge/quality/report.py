"""What a quality report is: metrics, each with the range it should lie in and what to do when it does not."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from tasks.store.measures import Metric


class QualityReport(BaseModel):
    """Everything measured about a set of judgements or pairs; plain JSON through `model_dump(mode="json")`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int
    pairs: int
    statuses: dict[str, int]
    reasons: dict[str, int]
    degenerate: int
    metrics: list[Metric]
    detail: dict[str, Any] = {}

    def summary(self) -> str:
        """Return one line: how many pairs of how many rows, and what is out of range."""
        problems = self.problems()
        held = [metric for metric in self.metrics if metric.ok is not None]
        names = f": {', '.join(metric.title for metric in problems)}" if problems else ""
        counts = f"{len(problems)} of {len(held)} measurements out of range{names}"
        return f"{self.pairs:,} pairs of {self.rows:,} rows; {counts}"

    def metric(self, name: str) -> Metric:
        """Return the metric called `name`.

        Raises:
            KeyError: it was not measured on these data.
        """
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise KeyError(name)

    def problems(self) -> list[Metric]:
        """Return the metrics that are out of their healthy range."""
        return [metric for metric in self.metrics if metric.ok is False]
