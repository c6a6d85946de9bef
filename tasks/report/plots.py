"""Pictures of a run as PNG bytes: one look for all, readable on a light page and on a dark one."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tasks.report.page import Picture
from tasks.store.measures import Metric, QualityReport, WinRate, p_text, percent, percent_range

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


def plot_metrics(rows: Sequence[Mapping[str, Any]]) -> Iterator[Picture]:
    """Yield pictures of loss, accuracy, margin, rewards, log-probs and gradient norm over the steps.

    `rows` are those of `metrics.jsonl`; what they have nothing of is left out. Solid: training, dashed: held out.
    """
    for title, unit, names in PANELS:
        axes = new_axes()
        for name, colour in zip(names, (BLUE, ORANGE), strict=False):
            label = name.rpartition("/")[2] if len(names) > 1 else "training"
            held_out = f"{label}, held out" if len(names) > 1 else "held out"
            for figure, shown, style in ((name, label, "-"), (f"eval_{name}", held_out, "--")):
                points = [(row["step"], row[figure]) for row in rows if figure in row]
                if points:
                    marker = "." if len(points) < 30 else None
                    axes.plot(*zip(*points, strict=True), marker=marker, label=shown, color=colour, linestyle=style)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        if axes.lines:
            yield Picture(to_png(axes), f"{title}, by optimizer step.")


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


def plot_quality(report: QualityReport) -> Iterator[Picture]:
    """Yield best and worst by position against chance, and the lengths of both sides, as far as they were measured."""
    if found := {metric.name: metric.detail for metric in report.metrics if "positions" in metric.detail}:
        png = _plot_positions(found["position_best"], found["position_worst"])
        yield Picture(png, "Where the judge finds the best and the worst; bars with 95 % intervals.")
    if histogram := report.detail.get("lengths"):
        png = _plot_lengths(histogram, report.metric("longer_chosen"))
        yield Picture(png, "Length of chosen and rejected; dotted: the medians.")


def _plot_positions(best: Mapping[str, Any], worst: Mapping[str, Any]) -> bytes:
    axes = new_axes()
    for side, detail, colour, offset in (("best", best, BLUE, -0.2), ("worst", worst, ORANGE, 0.2)):
        table = detail["positions"]
        error = [[100 * abs(row["rate"] - row["interval"][k]) for row in table] for k in (0, 1)]
        axes.bar(
            [row["position"] + offset for row in table], [100 * row["rate"] for row in table], 0.36, color=colour,
            yerr=error, capsize=3, ecolor=INK, error_kw={"linewidth": 1}, label=f"{side} ({p_text(detail['p_value'])})",
        )  # fmt: skip
    places, chances = [row["position"] for row in table], [100 * row["chance"] for row in table]
    starts, ends = [place - 0.45 for place in places], [place + 0.45 for place in places]
    axes.hlines(chances, starts, ends, color=INK, linestyle="--", linewidth=1.2, label="chance")
    axes.set_xticks(places if len(places) <= 10 else places[:: -(-len(places) // 10)])
    axes.set_xlabel(f"position in the judge's prompt ({worst['verdicts']:,} verdicts)")
    axes.set_ylabel("share of verdicts (%)")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return to_png(axes)


def _plot_lengths(histogram: Mapping[str, Any], longer: Metric) -> bytes:
    axes, edges = new_axes(), histogram["edges"]
    for side, colour in (("chosen", BLUE), ("rejected", ORANGE)):
        counts, middle = histogram[side], histogram["medians"][side]
        axes.stairs(counts, edges, color=colour, alpha=0.2, fill=True)
        axes.stairs(counts, edges, color=colour, linewidth=1.8, label=f"{side} (median {middle:.0f})")
        axes.axvline(middle, color=colour, linestyle=":", linewidth=1.5)
    if longer.value is not None:
        interval = percent_range(*longer.detail["interval"])
        axes.plot([], [], " ", label=f"longer is chosen: {percent(longer.value)} ({interval})")
    axes.set_xlabel("length in characters (last bin: that and longer)")
    axes.set_ylabel("pairs")
    axes.set_ylim(0, 1.05 * max(*histogram["chosen"], *histogram["rejected"], 1))
    axes.set_xlim(edges[0], edges[-1])
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return to_png(axes)
