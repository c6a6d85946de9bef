"""The picture of a sweep: every point's win rate with its interval, and SFT against itself."""

import io
from collections.abc import Sequence

from tasks.sweeping.results import PointResult, WinRate

POINT_COLOUR, BEST_COLOUR, NULL_COLOUR = "#5b6677", "#2a6fb0", "#d9722e"


def plot_points(ranked: Sequence[PointResult], null: WinRate | None) -> bytes:
    """Return a PNG: the points from the best down, each with its interval, the best with the widened one behind.

    Args:
        ranked: the points that finished, the best first.
        null: SFT against itself, drawn as a line with a band.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.6 + 0.45 * len(ranked)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axvline(0.5, color="black", linestyle="--", linewidth=1, label="no better, no worse")
    if null is not None:
        axes.axvspan(null.lower, null.upper, color=NULL_COLOUR, alpha=0.12)
        axes.axvline(null.win_rate, color=NULL_COLOUR, linewidth=1.5, label="SFT against itself")
    for row, point in enumerate(ranked):
        if point.rate is None or point.widened is None:
            continue
        colour = BEST_COLOUR if row == 0 else POINT_COLOUR
        axes.hlines(row, point.widened.lower, point.widened.upper, color=colour, linewidth=1, alpha=0.6)
        axes.hlines(row, point.rate.lower, point.rate.upper, color=colour, linewidth=4)
        axes.plot(point.rate.win_rate, row, "o", color=colour, markeredgecolor="white", markersize=9)
    axes.set_yticks(range(len(ranked)), [f"{point.number}. {_shorten(point.name)}" for point in ranked])
    axes.set_ylim(len(ranked) - 0.5, -0.5)
    axes.set_xlabel("win rate over the SFT adapter")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.9 / (1.6 + 0.45 * len(ranked))), ncols=2)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _shorten(name: str) -> str:
    return name if len(name) <= 48 else f"{name[:47]}…"
