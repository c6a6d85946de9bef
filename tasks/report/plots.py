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
# In inches: as wide as a phone, where a page scales it down by a quarter at most.
WIDTH = 4.0
# In characters, of the names in a picture so wide, and of two entries of a legend in one line.
LONGEST_NAME = 40
LONGEST_OF_TWO = 24
PANELS = (
    ("Loss", "nats", ("loss",)),
    ("Accuracy", "share of pairs", ("rewards/accuracies",)),
    ("Margin", "reward", ("rewards/margins",)),
    ("Rewards", "beta x nats", ("rewards/chosen", "rewards/rejected")),
    ("Log-probs", "nats", ("logps/chosen", "logps/rejected")),
    ("Gradient norm", "norm", ("grad_norm",)),
)


class RateBar(NamedTuple):
    """A win rate in a picture, and one with a wider interval to stand behind it, if there is one."""

    name: str
    rate: WinRate
    wider: WinRate | None = None


def new_axes(height: float = 3.0) -> Axes:
    """Return the axes of an empty figure of WIDTH and a height, in inches, that `to_png` draws."""
    figure = Figure(figsize=(WIDTH, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.subplots()


def to_png(axes: Axes) -> bytes:
    """Draw a picture in the colours of the report, its legend below the axes; always the same bytes."""
    figure = axes.get_figure(root=True)
    assert figure is not None, "the axes of new_axes are in a figure"
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK)
    for text in (axes.xaxis.label, axes.yaxis.label, *axes.texts):
        text.set_color(INK)
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = 2 if len(max(labels, key=len)) <= LONGEST_OF_TWO else 1
        figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False, labelcolor=INK
        )
    out = io.BytesIO()
    figure.savefig(out, format="png", transparent=True, metadata={"Software": None})
    return out.getvalue()


def plot_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """Return a PNG each of loss, accuracy, margin, rewards, log-probs and gradient norm over the steps.

    `rows` are those of `metrics.jsonl`; what they have nothing of is left out. Solid: training, dashed: held out.
    """
    pictures = {}
    for title, unit, names in PANELS:
        axes = new_axes()
        for name, colour in zip(names, (BLUE, ORANGE), strict=False):
            label = name.rpartition("/")[2] if len(names) > 1 else "training"
            _draw(axes, rows, name, label, color=colour)
            held_out = f"{label}, held out" if len(names) > 1 else "held out"
            _draw(axes, rows, f"eval_{name}", held_out, color=colour, linestyle="--")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        if axes.lines:
            pictures[title] = to_png(axes)
    return pictures


def _draw(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, label: str, **style: Any) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, marker="." if len(points) < 30 else None, label=label, **style)


def plot_rates(bars: Sequence[RateBar], null: RateBar | None) -> bytes:
    """Return a PNG of win rates from the top down, the first in blue, against one half and `null` (a band)."""
    axes = new_axes(1.4 + 0.55 * len(bars))
    # Between the names: no line crosses a text.
    tops, ends = [row - 0.1 for row in range(len(bars))], [row + 0.4 for row in range(len(bars))]
    axes.vlines([50] * len(bars), tops, ends, color=INK, linestyle="--", linewidth=1, label="no better, no worse")
    if null is not None:
        band, middle = 100 * (null.rate.upper - null.rate.lower), 100 * null.rate.win_rate
        axes.bar([100 * null.rate.lower] * len(bars), 0.5, band, tops, align="edge", color=ORANGE, alpha=0.15)
        axes.vlines([middle] * len(bars), tops, ends, color=ORANGE, linewidth=1.5, label=null.name)
    for row, (name, rate, wider) in enumerate(bars):
        colour = INK if row else BLUE
        at = row + 0.15
        if wider is not None:
            axes.hlines(at, 100 * wider.lower, 100 * wider.upper, color=colour, linewidth=1, alpha=0.6)
        axes.hlines(at, 100 * rate.lower, 100 * rate.upper, color=colour, linewidth=5)
        axes.plot(100 * rate.win_rate, at, "o", color=colour, markeredgecolor="white", markersize=10)
        # Above its bar: next to it, long names would leave no room for the bars.
        short = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
        across = axes.get_yaxis_transform()
        axes.text(0.01, row - 0.3, short, transform=across, va="center", parse_math=False)  # a name may hold dollars
    axes.set_yticks([])
    axes.set_ylim(len(bars) - 0.5, -0.55)
    axes.set_xlabel("wins over the SFT adapter (%)")
    return to_png(axes)
