"""The pictures of a quality report: position lift and lengths."""

from collections.abc import Iterator

from tasks.report.page import Picture
from tasks.report.plots import BLUE, INK, ORANGE, new_axes, to_png
from tasks.store.measures import QualityReport, p_text, percent, percent_range


def plot_quality(report: QualityReport) -> Iterator[Picture]:
    """Yield best and worst by position against chance, and the lengths of both sides, as far as they were measured."""
    if png := _positions(report):
        yield Picture(png, "Where the judge finds the best and the worst; bars with 95 % intervals.")
    if png := _lengths(report):
        yield Picture(png, "Length of chosen and rejected; dotted: the medians.")


def _positions(report: QualityReport) -> bytes | None:
    found = {metric.name: metric.detail for metric in report.metrics if "positions" in metric.detail}
    if not found:
        return None
    axes = new_axes()
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
    axes.set_xticks(places if len(places) <= 10 else places[:: -(-len(places) // 10)])
    axes.set_xlabel(f"position in the judge's prompt ({detail['verdicts']:,} verdicts)")
    axes.set_ylabel("share of verdicts (%)")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return to_png(axes)


def _lengths(report: QualityReport) -> bytes | None:
    if not (histogram := report.detail.get("lengths")):
        return None
    axes, edges = new_axes(), histogram["edges"]
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
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return to_png(axes)
