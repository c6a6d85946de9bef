"""Pictures of a run as PNG bytes: one look for all, readable on a light page and on a dark one."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tasks.store.measures import WinRate

# On a transparent ground this grey has a contrast of about 4 to 1 on white and on the dark page alike.
INK = "#75808f"
BLUE, ORANGE = "#2f7dc4", "#d9722e"
PANELS = (
    ("loss", "nats", ("loss",)),
    ("accuracy", "share of pairs", ("rewards/accuracies",)),
    ("margin", "reward", ("rewards/margins",)),
    ("rewards", "beta x nats", ("rewards/chosen", "rewards/rejected")),
    ("log-probs", "nats", ("logps/chosen", "logps/rejected")),
    ("gradient norm", "norm", ("grad_norm",)),
)


class RateBar(NamedTuple):
    """A win rate in a picture, and one with a wider interval to stand behind it, if there is one."""

    name: str
    rate: WinRate
    wider: WinRate | None = None


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, that `to_png` draws."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure) -> bytes:
    """Draw a figure in the colours of the report; the same figure gives the same bytes."""
    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(colors=INK)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(INK)
    for legend in [*figure.legends, *(axes.get_legend() for axes in figure.axes)]:
        if legend is not None:
            legend.set_frame_on(False)
            for text in legend.get_texts():
                text.set_color(INK)
    out = io.BytesIO()
    figure.savefig(out, format="png", transparent=True, metadata={"Software": None})
    return out.getvalue()


def legend_below(axes: Axes, columns: int) -> None:
    """Put the legend under the axes, where no line crosses it."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns)


def plot_metrics(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a PNG of loss, accuracy, margin, rewards and log-probs over the steps; solid: training, dashed: held out.

    `rows` are those of `metrics.jsonl`; without any the panels are empty.
    """
    figure = new_figure(9, 9)
    for axes, (title, unit, names) in zip(figure.subplots(3, 2).flat, PANELS, strict=True):
        for name, colour in zip(names, (BLUE, ORANGE), strict=False):
            label = name.rpartition("/")[2]
            _draw(axes, rows, name, label, color=colour)
            _draw(axes, rows, f"eval_{name}", f"{label}, held out", color=colour, linestyle="--")
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    return to_png(figure)


def _draw(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, label: str, **style: Any) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, marker="." if len(points) < 30 else None, label=label, **style)


def plot_rates(bars: Sequence[RateBar], null: RateBar | None) -> bytes:
    """Return a PNG of win rates from the top down, the first in blue, against one half and `null` (a band)."""
    figure = new_figure(5.6, 1.7 + 0.5 * len(bars))
    axes = figure.subplots()
    axes.axvline(50, color=INK, linestyle="--", linewidth=1, label="no better, no worse")
    if null is not None:
        axes.axvspan(100 * null.rate.lower, 100 * null.rate.upper, color=ORANGE, alpha=0.15)
        axes.axvline(100 * null.rate.win_rate, color=ORANGE, linewidth=1.5, label=null.name)
    for row, (_, rate, wider) in enumerate(bars):
        colour = INK if row else BLUE
        if wider is not None:
            axes.hlines(row, 100 * wider.lower, 100 * wider.upper, color=colour, linewidth=1, alpha=0.6)
        axes.hlines(row, 100 * rate.lower, 100 * rate.upper, color=colour, linewidth=5)
        axes.plot(100 * rate.win_rate, row, "o", color=colour, markeredgecolor="white", markersize=10)
    names = [bar.name if len(bar.name) <= 48 else f"{bar.name[:47]}…" for bar in bars]
    axes.set_yticks(range(len(bars)), names)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlabel("wins over the SFT adapter (%)")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return to_png(figure)
