"""The picture of a quality report: position lift and lengths."""

from collections.abc import Sequence
from typing import Any

from tasks.report.plots import BLUE, INK, ORANGE, legend_below, new_figure, to_png
from tasks.store.measures import QualityReport


def plot_quality(report: QualityReport) -> bytes:
    """Return a PNG: best and worst by position against chance (95 % Wilson intervals), and lengths of both sides."""
    figure = new_figure(9, 8)
    positions, lengths = figure.subplots(2, 1)
    _plot_positions(positions, report)
    _plot_lengths(lengths, report)
    for axes in (positions, lengths):
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    return to_png(figure)


def _plot_positions(axes: Any, report: QualityReport) -> None:
    axes.set_title("Where the judge finds the best and the worst")
    found = {m.name: m for m in report.metrics if m.name.startswith("position_") and m.detail}
    if not found:
        axes.text(0.5, 0.5, "no positions are known", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    for side, colour, offset in (("best", BLUE, -0.2), ("worst", ORANGE, 0.2)):
        detail = found[f"position_{side}"].detail
        _bars(axes, detail["positions"], offset, colour, f"{side} ({_p_text(detail['p_value'])})")
    places = [row["position"] for row in detail["positions"]]
    for row in detail["positions"]:
        x, chance = row["position"], 100 * row["chance"]
        axes.plot([x - 0.45, x + 0.45], [chance, chance], color=INK, linestyle="--", linewidth=1.2)
    axes.plot([], [], color=INK, linestyle="--", linewidth=1.2, label="chance")
    axes.set_xticks(places if len(places) <= 16 else places[:: -(-len(places) // 16)])
    axes.set_xlabel(f"position in the judge's prompt ({detail['verdicts']:,} verdicts)")
    axes.set_ylabel("share of verdicts (%)")
    legend_below(axes, 3)


def _bars(axes: Any, table: Sequence[dict[str, Any]], offset: float, colour: str, label: str) -> None:
    below = [100 * max(0.0, row["rate"] - row["interval"][0]) for row in table]
    above = [100 * max(0.0, row["interval"][1] - row["rate"]) for row in table]
    axes.bar(
        [row["position"] + offset for row in table],
        [100 * row["rate"] for row in table],
        0.36,
        color=colour,
        yerr=[below, above],
        capsize=3,
        ecolor=INK,
        error_kw={"linewidth": 1},
        label=label,
    )


def _p_text(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def _plot_lengths(axes: Any, report: QualityReport) -> None:
    axes.set_title("Length of chosen and rejected")
    histogram = report.detail.get("lengths")
    if not histogram:
        axes.text(0.5, 0.5, "there are no pairs", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    edges = histogram["edges"]
    for side, colour in (("chosen", BLUE), ("rejected", ORANGE)):
        counts, middle = histogram[side], histogram["medians"][side]
        axes.stairs(counts, edges, color=colour, alpha=0.2, fill=True)
        axes.stairs(counts, edges, color=colour, linewidth=1.8, label=f"{side} (median {middle:.0f})")
        axes.axvline(middle, color=colour, linestyle=":", linewidth=1.5)
    longer = report.metric("longer_chosen")
    if longer.value is not None:
        low, high = longer.detail["interval"]
        label = f"longer is chosen: {100 * longer.value:.1f} % ({100 * low:.1f}-{100 * high:.1f} %)"
        axes.plot([], [], " ", label=label)
    axes.set_xlabel("length in characters (last bin: that and longer)")
    axes.set_ylabel("pairs")
    axes.set_ylim(0, 1.05 * max(*histogram["chosen"], *histogram["rejected"], 1))
    axes.set_xlim(edges[0], edges[-1])
    legend_below(axes, 3)
