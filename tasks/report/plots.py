"""Pictures of a training's metrics, as PNG bytes."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

PANELS = (
    ("loss", ("loss",)),
    ("accuracy", ("rewards/accuracies",)),
    ("margin", ("rewards/margins",)),
    ("rewards", ("rewards/chosen", "rewards/rejected")),
    ("log-probs (nats)", ("logps/chosen", "logps/rejected")),
    ("gradient norm", ("grad_norm",)),
)


def plot_metrics(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw loss, accuracy, margin, rewards and log-probs over the steps; solid: training, dashed: held out.

    Args:
        rows: of `metrics.jsonl`.

    Returns:
        A PNG. With no rows the panels are empty.
    """
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for name in names:
            _draw(axes, rows, name, "-", name.rpartition("/")[2])
            _draw(axes, rows, f"eval_{name}", "--", f"{name.rpartition('/')[2]}, held out")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def _draw(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, style: str, label: str) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, style, marker="." if len(points) < 30 else None, label=label)
