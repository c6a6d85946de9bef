"""The pictures: nothing of them is cut off, no text lies on another or on a bar, and they can be read on a phone."""

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from tasks.judge.quality.metrics import measure_judgements
from tasks.report.plots import WIDTH, RateBar, plot_metrics, plot_quality, plot_rates
from tasks.store.measures import WinRate
from tests.fakes.pages import run_pages, sweep_pages

RATE = WinRate(win_rate=0.6, lower=0.5, upper=0.7)
SMALLEST_ON_A_PHONE = 8.0  # CSS pixels of a letter's height, on a screen of 390


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved from now on."""
    figures: list[Figure] = []
    save = Figure.savefig

    def spy(figure: Figure, *args: Any, **named: Any) -> None:
        figures.append(figure)
        save(figure, *args, **named)

    monkeypatch.setattr(Figure, "savefig", spy)
    return figures


def check(figure: Figure) -> None:
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer, page = canvas.get_renderer(), figure.bbox
    hidden = [
        tick.label1
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()  # those beyond the ends of an axis are there, but not shown
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    ]
    found = figure.findobj(lambda part: isinstance(part, Text) and part.get_visible() and bool(part.get_text().strip()))
    texts = [(text, text.get_window_extent(renderer)) for text in found if isinstance(text, Text)]
    texts = [(text, box) for text, box in texts if box.width and text not in hidden]
    for text, box in texts:
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1
        assert inside, f"cut off: {text.get_text()}"
        assert text.get_fontsize() * 326 / (72 * WIDTH) >= SMALLEST_ON_A_PHONE, f"too small: {text.get_text()}"
    for (text, box), (other, place) in combinations(texts, 2):
        assert not box.padded(-1).overlaps(place.padded(-1)), f"{text.get_text()!r} lies on {other.get_text()!r}"
    for axes in figure.axes:
        for label in axes.texts:
            box = label.get_window_extent(renderer).padded(-1)
            assert not any(box.overlaps(mark) for mark in marks(axes, renderer)), f"{label.get_text()!r} is crossed"


def marks(axes: Axes, renderer: Any) -> Iterator[Bbox]:
    """Yield where lines and bars are."""
    for mark in (*axes.lines, *axes.patches):
        yield mark.get_window_extent(renderer)
    for lines in axes.collections:
        assert isinstance(lines, LineCollection)
        for segment in lines.get_segments():
            (x0, y0), (x1, y1) = axes.transData.transform(segment)
            yield Bbox([[min(x0, x1) - 1, min(y0, y1) - 1], [max(x0, x1) + 1, max(y0, y1) + 1]])


@pytest.mark.slow  # ten pictures, each laid out with care
def test_of_the_hardest_pages_nothing_is_cut_or_lies_on_another_and_they_stay_small(figures: list[Figure]) -> None:
    pages = {page.title: page for page in (*run_pages(), *sweep_pages())}
    assert [len(pages[title].pictures) for title in ("At a glance", "Preferences", "Training", "Sweep")] == [1, 2, 6, 1]
    assert len(figures) == 10
    for figure in figures:
        check(figure)
    # The page of a training that goes on is sent to the server every half minute.
    assert sum(len(picture.png) for picture in pages["Training"].pictures) < 250_000


@pytest.mark.parametrize(("low", "middle", "high"), [(0.5, 0.5, 0.5), (0.0, 0.001, 0.002), (0.998, 0.999, 1.0)])
@pytest.mark.parametrize("null", [RateBar("SFT against itself", RATE), None])
def test_win_rates_of_any_size(
    figures: list[Figure], low: float, middle: float, high: float, null: RateBar | None
) -> None:
    rate = WinRate(win_rate=middle, lower=low, upper=high)
    bars = [RateBar("1. model=QWEN-72B $x^{$, " * 3, rate, rate), RateBar("The same, length taken out", RATE)]
    plot_rates(bars, null)
    check(figures[0])


def test_what_was_not_measured_has_no_picture_and_the_same_gives_the_same_bytes() -> None:
    rows = [{"step": 1, "loss": 0.7}]
    assert [list(plot_metrics([])), list(plot_quality(measure_judgements([])))] == [[], []]
    assert len(list(plot_metrics(rows))) == 1
    assert list(plot_metrics(rows)) == list(plot_metrics(rows))
