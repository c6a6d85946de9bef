"""The first page of a run's report, what went into the run, and what a person is asked to approve."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tasks.batch.costs import format_usd
from tasks.config import JudgingConfig
from tasks.report.page import Cell, Picture, ReportSection, Table
from tasks.report.plots import RateBar, plot_rates
from tasks.report.sections import metric_row
from tasks.store.measures import Evaluation, Health, Metric, QualityReport, WinRate
from tasks.store.workspace import Manifest

Row = Mapping[str, Any]
SHOWN_METRICS = (
    "pair_yield",
    "position_best",
    "flip_rate",
    "longer_chosen",
    "parse_failures",
)
SHOWN_READINGS = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "weights/moved")
MOST_ADVICE = 3
OPEN_EXAMPLES = 3
# Below this share of the gain the labelling judge's own taste is the likelier explanation.
LEAST_TRANSFER = 0.5
RATES_CAPTION = "How often the new adapter wins; bars are the intervals, the band is SFT against itself."


def verdict(found: Evaluation, bar: float) -> tuple[str, str]:
    """Say in a few words, and in one sentence, whether the new adapter is better than the SFT adapter, and how surely.

    Args:
        found: the evaluation.
        bar: what the intervals' lower bounds must be over to be promoted.
    """
    rate = f"it wins {found.text()} of the comparisons ({100 * found.confidence:.3g} % interval in brackets)"
    if found.null is not None and not found.null_holds:
        return (
            "Not to be trusted",
            f"{rate[0].upper()}{rate[1:]}, but the SFT adapter against itself comes out at {found.null.text()}.",
        )
    if found.upper < 0.5:
        return "Worse", f"The new adapter is worse: {rate}, fewer than half."
    if found.lower <= 0.5:
        return "Not shown to be better", f"The interval holds 50 %: {rate}."
    if found.proven <= 0.5 and found.length_controlled is not None:
        controlled = found.length_controlled.text()
        return "Not shown to be better", f"It wins by length: {rate}, and with length taken out {controlled}."
    if found.proven <= bar:
        return "Better, but not by enough", f"{rate[0].upper()}{rate[1:]}; the bar is {100 * bar:.3g} %."
    return "Better", f"The new adapter is better: {rate}, more than half."


def glance_section(
    found: Evaluation, bar: float, served: str, figures: Sequence[Metric], details: Sequence[ReportSection]
) -> ReportSection:
    """Show the verdict, what became of the adapter, the win rates as one picture, and what to do next.

    Args:
        found: the evaluation.
        bar: what the intervals' lower bounds must be over.
        served: what became of the adapter, as a sentence.
        figures: what carries the verdict.
        details: the pages that follow: the first one's comparisons are shown, and their advice if nothing is proven.
    """
    headline, sentence = verdict(found, bar)
    is_better = found.null_holds and found.proven > bar
    advice = [f"{page.title}: {text}" for page in details for text in page.advice[:MOST_ADVICE]]
    notes: tuple[str, ...] = ()
    if is_better and advice:
        notes = (f"It won. What could still be better stands under {_places(details)}.",)
    return ReportSection(
        "At a glance",
        f"{sentence} {served}",
        () if is_better else tuple(advice),
        (Table("The run in figures", ("figure", "state", "value", "healthy"), tuple(map(metric_row, figures))),),
        (Picture(plot_rates(*rate_bars(found)), RATES_CAPTION, is_wide=False),),
        notes,
        tuple(replace(example, is_open=True) for page in details[:1] for example in page.examples[:OPEN_EXAMPLES]),
        headline=headline,
        is_good=is_better,
    )


def _places(details: Sequence[ReportSection]) -> str:
    return " and ".join(page.title for page in details if page.advice)


def rate_bars(found: Evaluation) -> tuple[list[RateBar], RateBar | None]:
    """Return what to draw of an evaluation: every win rate there is, and SFT against itself."""
    rates = {"new adapter": found, "length taken out": found.length_controlled}
    if found.second is not None:
        rates["second judge"] = found.second.rate
    bars = [RateBar(name, rate.win_rate, rate.lower, rate.upper) for name, rate in rates.items() if rate is not None]
    if (null := found.null) is None:
        return bars, None
    return bars, RateBar("SFT against itself", null.win_rate, null.lower, null.upper)


def win_rate_figures(found: Evaluation, bar: float) -> Iterator[Metric]:
    """Yield the win rates, the test that they can be believed, and what this evaluation could have seen."""
    yield _share("Win rate", found, f"lower bound over {100 * bar:.3g} %", found.lower > bar)
    if (controlled := found.length_controlled) is not None:
        yield _share("Win rate, length taken out", controlled, f"the same: {100 * bar:.3g} %", controlled.lower > bar)
    if (second := found.second) is not None:
        yield _share(f"By {', '.join(second.judges)}", second.rate, "lower bound over 50 %", second.rate.lower > 0.5)
        if second.transfer is not None:
            healthy = "about 1; a low one says that the first judge's taste was learned"
            yield _figure("Gain that the second judge sees too", f"{100 * second.transfer:.0f} %", healthy,
                          second.transfer > LEAST_TRANSFER)  # fmt: skip
    if (null := found.null) is not None:
        yield _share("SFT against itself", null, "50 % within the interval", found.null_holds)
    if found.silent:
        yield _figure("Lost because the new adapter wrote nothing", found.silent, "0", False)
    if found.detectable is not None:
        healthy = "what this gate finds in 4 runs of 5"
        yield _figure("Smallest true win rate that passes", f"{100 * found.detectable:.1f} %", healthy, None)


def _share(name: str, rate: WinRate, healthy: str, ok: bool) -> Metric:
    return _figure(name, rate.text(), healthy, ok)


def _figure(name: str, value: str | float, healthy: str = "", ok: bool | None = None) -> Metric:
    if isinstance(value, str):
        return Metric(name=name, title=name, value=None, meaning=value, healthy=healthy, ok=ok)
    return Metric(name=name, title=name, value=value, healthy=healthy, ok=ok)


def run_figures(
    found: Evaluation, bar: float, quality: QualityReport, health: Health, training: Mapping[str, float]
) -> list[Metric]:
    """Return the figures of the first page: evaluation, judge, training.

    Args:
        found: the evaluation.
        bar: what its lower bounds must be over.
        quality: what was measured about the judge and its pairs.
        health: the readings of the training.
        training: `figures` of the training's manifest; first_loss is the DPO loss before the first update.
    """
    judged = {metric.name: metric for metric in quality.metrics}
    read = {metric.name: metric for metric in health.readings}
    figures = [*win_rate_figures(found, bar), *(judged[name] for name in SHOWN_METRICS if name in judged)]
    if (first := training.get("first_loss")) is not None:
        healthy = "ln 2 = 0.6931 for the sigmoid loss"
        figures.append(_figure("Loss before the first update", f"{first:.4f}", healthy))
    if (share := training.get("sampled_tokens_share")) is not None:
        figures.append(
            _figure("Sides trained on exactly the sampled tokens", f"{100 * share:.1f} %", "100 %", share == 1)
        )
    return figures + [read[name] for name in SHOWN_READINGS if name in read]


def inputs_section(manifests: Sequence[Manifest], changed: Mapping[str, Any]) -> ReportSection:
    """Show the prompts, models and judges that a run was made from, and the settings that are not the defaults.

    Args:
        manifests: the artifacts' manifests.
        changed: dotted name of a setting to its value.
    """
    used = [manifest for manifest in manifests if manifest.stage == "prompts"]
    prompts = tuple(_prompts_row(number, manifest) for number, manifest in enumerate(used))
    settings = tuple((name, _value(value)) for name, value in changed.items())
    tables = (
        Table("Prompts", ("for", "file", "rows", "duplicates", "in training pairs", "used", "sha256"), prompts),
        Table("Models and judges", ("what", "name", "sha256"), tuple(_models(manifests))),
        Table("Settings that are not the defaults", ("setting", "value"), settings),
    )
    summary = "The prompts, models, judges and settings that the run was made from."
    return ReportSection("What went in", summary, tables=tuple(table for table in tables if table.rows))


def _prompts_row(number: int, manifest: Manifest) -> tuple[Cell, ...]:
    counts, file = manifest.counts, manifest.upstream[0]
    return (
        "comparison" if number else "pairs",
        file.uri.rsplit("/", 1)[-1],
        counts.get("read"),
        counts.get("duplicates"),
        counts.get("in_training"),
        manifest.artifact.rows,
        manifest.artifact.sha256[:12],
    )


def _models(manifests: Sequence[Manifest]) -> Iterable[tuple[Cell, ...]]:
    """Yield what was sampled from, trained on, and asked, each once."""
    rows: dict[tuple[Cell, ...], None] = {}
    for manifest in manifests:
        if manifest.stage == "training":
            for kind, title in (("base_model", "base model"), ("sft_adapter", "SFT adapter")):
                if origin := manifest.origin(kind):
                    rows[title, origin.uri, origin.sha256[:12]] = None
        elif manifest.stage == "judging":
            judging = manifest.settings(JudgingConfig)
            for judge in judging.judges():
                rows["judge", judge.model, None] = None
            rows["rubric", judging.rubric, None] = None
    yield from rows


def _value(value: Any) -> str:
    return "empty" if value is None else str(value)


def approval_section(estimates: Sequence[Row], comparisons: int) -> ReportSection:
    """Show what the judges are about to be asked and what that will cost.

    Args:
        estimates: one for each judge: model, requests, known, prompt_tokens, completion_tokens,
            most_completion_tokens, usd, most_usd.
        comparisons: verdicts that the evaluation will want later, at most.
    """
    columns = (
        "judge", "requests", "answered before", "prompt tokens", "completion tokens", "tokens at most", "US$",
        "US$ at most",
    )  # fmt: skip
    rows = tuple(
        (
            str(row["model"]), row["requests"], row["known"], row["prompt_tokens"], row["completion_tokens"],
            row["most_completion_tokens"], format_usd(row["usd"]), format_usd(row["most_usd"]),
        )
        for row in estimates
    )  # fmt: skip
    requests, usd, most = (sum(row[name] for row in estimates) for name in ("requests", "usd", "most_usd"))
    priced = f"about {format_usd(usd)} US$, at most {format_usd(most)}" if most else "no price is set"
    advice = () if most else ("Set judging.prompt_price and completion_price to see what this will cost.",)
    summary = (
        f"The judge is about to be asked {requests:,} questions ({priced}); the evaluation will want up to "
        f"{comparisons:,} verdicts more."
    )
    how = (
        "Prompt tokens: the mean length of up to 200 of the questions, at 4 characters a token. Completion tokens: 30 "
        "for a verdict; at most: max_tokens for each, as a thinking model may use."
    )
    return ReportSection("Before judging", summary, advice, (Table("What will be asked", columns, rows),), notes=(how,))
