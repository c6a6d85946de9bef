"""The picture of a quality report: position lift and lengths."""

from typing import Any

from tasks.report.plots import BLUE, INK, ORANGE, legend_below, new_figure, to_png
from tasks.store.measures import QualityReport, p_text, percent, percent_range


def plot_quality(report: QualityReport) -> bytes:
    """Return a PNG: best and worst by position against chance (95 % Wilson intervals), and lengths of both sides."""
    figure = new_figure(9, 8)
    positions, lengths = figure.subplots(2, 1)
    for axes, title, draw, missing in (
        (positions, "Where the judge finds the best and the worst", _draw_positions, "no positions are known"),
        (lengths, "Length of chosen and rejected", _draw_lengths, "there are no pairs"),
    ):
        axes.set_title(title)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        if draw(axes, report):
            legend_below(axes, 3)
        else:
            axes.text(0.5, 0.5, missing, ha="center", va="center", transform=axes.transAxes)
            axes.set_axis_off()
    return to_png(figure)


def _draw_positions(axes: Any, report: QualityReport) -> bool:
    found = {metric.name: metric.detail for metric in report.metrics if "positions" in metric.detail}
    if not found:
        return False
    for side, colour, offset in (("best", BLUE, -0.2), ("worst", ORANGE, 0.2)):
        detail = found[f"position_{side}"]
        table = detail["positions"]
        error = [[100 * abs(row["rate"] - row["interval"][k]) for row in table] for k in (0, 1)]
        axes.bar(
            [row["position"] + offset for row in table], [100 * row["rate"] for row in table], 0.36, color=colour,
            yerr=error, capsize=3, ecolor=INK, error_kw={"linewidth": 1}, label=f"{side} ({p_text(detail['p_value'])})",
        )  # fmt: skip
    places, chances = [row["position"] for row in table], [100 * row["chance"] for row in table]
    starts, ends = [place - 0.45 for place in places], [place + 0.45 for place in places]
    axes.hlines(chances, starts, ends, color=INK, linestyle="--", linewidth=1.2, label="chance")
    axes.set_xticks(places if len(places) <= 16 else places[:: -(-len(places) // 16)])
    axes.set_xlabel(f"position in the judge's prompt ({detail['verdicts']:,} verdicts)")
    axes.set_ylabel("share of verdicts (%)")
    return True


def _draw_lengths(axes: Any, report: QualityReport) -> bool:
    if not (histogram := report.detail.get("lengths")):
        return False
    edges = histogram["edges"]
    for side, colour in (("chosen", BLUE), ("rejected", ORANGE)):
        counts, middle = histogram[side], histogram["medians"][side]
        axes.stairs(counts, edges, color=colour, alpha=0.2, fill=True)
        axes.stairs(counts, edges, color=colour, linewidth=1.8, label=f"{side} (median {middle:.0f})")
        axes.axvline(middle, color=colour, linestyle=":", linewidth=1.5)
    longer = report.metric("longer_chosen")
    if longer.value is not None:
        interval = percent_range(*longer.detail["interval"])
        axes.plot([], [], " ", label=f"longer is chosen: {percent(longer.value)} ({interval})")
    axes.set_xlabel("length in characters (last bin: that and longer)")
    axes.set_ylabel("pairs")
    axes.set_ylim(0, 1.05 * max(*histogram["chosen"], *histogram["rejected"], 1))
    axes.set_xlim(edges[0], edges[-1])
    return True
