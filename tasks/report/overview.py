"""The first page of a run's report, what went into the run, and what a person is asked to approve."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tasks.config import JudgingConfig
from tasks.report.page import Cell, Picture, ReportSection, Table
from tasks.report.plots import RateBar, plot_rates
from tasks.report.sections import NULL, metric_row, rates_of
from tasks.store.measures import MOST_SFT_SILENT, Evaluation, Health, Metric, QualityReport, percent
from tasks.store.workspace import Manifest

Row = Mapping[str, Any]
SHOWN_METRICS = ("pair_yield", "position_best", "flip_rate", "longer_chosen", "parse_failures")
SHOWN_READINGS = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "weights/moved")
MOST_ADVICE = 3
OPEN_EXAMPLES = 3
# Below this share of the gain the labelling judge's own taste is the likelier explanation.
LEAST_TRANSFER = 0.5
BETTER = "Better"


def verdict(found: Evaluation, bar: float) -> tuple[str, str]:
    """Say in a few words, and in one sentence, whether the new adapter is better than the SFT adapter, how surely."""
    rate = f"it wins {found.text()} of the comparisons ({percent(found.confidence, '.3g')} interval in brackets)"
    if found.null is not None and not found.null_holds:
        said = f"I{rate[1:]}, but the SFT adapter against itself comes out at {found.null.text()}."
        return "Not to be trusted", said
    if found.sft_is_silent:
        said = f"the SFT adapter wrote nothing in {found.sft_silent:,} of {found.samples:,}"
        return "Not to be trusted", f"I{rate[1:]}, but {said}."
    if found.upper < 0.5:
        return "Worse", f"The new adapter is worse: {rate}, fewer than half."
    if found.lower <= 0.5:
        return "Not shown to be better", f"The interval holds 50 %: {rate}."
    if found.proven <= 0.5 and found.length_controlled is not None:
        controlled = found.length_controlled.text()
        return "Not shown to be better", f"It wins by length: {rate}, and with length taken out {controlled}."
    if found.proven <= bar:
        return "Better, but not by enough", f"I{rate[1:]}; the bar is {percent(bar, '.3g')}."
    if found.agreement is not None and not found.agrees:
        said = f"a person agrees with it in {found.agreement.share.text()}, and would with a coin in 50 %"
        return "Better for the judge alone", f"By the judge {rate}, more than half; {said}."
    return BETTER, f"The new adapter is better: {rate}, more than half."


def glance_section(
    found: Evaluation, bar: float, served: str, figures: Sequence[Metric], details: Sequence[ReportSection]
) -> ReportSection:
    """Show the verdict, what became of the adapter, the win rates as one picture, and what to do next.

    `details` are the pages that follow: the first one's comparisons are shown, and their advice if nothing is proven.
    """
    headline, sentence = verdict(found, bar)
    is_better = headline == BETTER  # not by the bar alone: one under 50 % lets worse ones pass
    advice = tuple(f"{page.title}: {text}" for page in details for text in page.advice[:MOST_ADVICE])
    places = " and ".join(page.title for page in details if page.advice)
    bars = [RateBar(name, rate) for name, rate, _, _ in rates_of(found, 0.5)]
    null = bars.pop() if bars[-1].name == NULL else None
    band = ", the band is SFT against itself." if null else "."
    return ReportSection(
        "At a glance",
        f"{sentence} {served}",
        () if is_better else advice,
        (Table("The run in figures", ("figure", "state", "value", "healthy"), tuple(map(metric_row, figures))),),
        (Picture(plot_rates(bars, null), f"How often the new adapter wins; bars are the intervals{band}"),),
        (f"It won. What could still be better stands under {places}.",) if is_better and places else (),
        tuple(replace(example, is_open=True) for page in details[:1] for example in page.examples[:OPEN_EXAMPLES]),
        headline=headline,
        is_good=is_better,
    )


def win_rate_figures(found: Evaluation, bar: float) -> Iterator[Metric]:
    """Yield the win rates, the test that they can be believed, and what this evaluation could have seen."""
    for name, rate, healthy, ok in rates_of(found, bar):
        yield _figure(name, rate.text(), healthy, ok)
    if found.second is not None and (transfer := found.second.transfer) is not None:
        healthy = "about 1; a low one says that the first judge's taste was learned"
        yield _figure("Gain that the second judge sees too", percent(transfer, ".0f"), healthy,
                      transfer > LEAST_TRANSFER)  # fmt: skip
    if (agreement := found.agreement) is not None:
        healthy = f"over 50 %, which is chance; {agreement.labels} labels"
        yield _figure("Judge and person agree", agreement.share.text(), healthy, found.agrees)
        if (kappa := agreement.kappa) is not None:
            value = f"{kappa.value:.2f} ({kappa.lower:.2f} to {kappa.upper:.2f})"
            yield _figure("The same beyond chance, kappa", value, "over 0", kappa.lower > 0)
    if found.silent:
        yield _figure("Lost because the new adapter wrote nothing", f"{found.silent:,}", "0", False)
    if found.sft_silent:
        healthy = f"below {percent(MOST_SFT_SILENT, '.0f')} of {found.samples:,}"
        yield _figure("The SFT adapter wrote nothing", f"{found.sft_silent:,}", healthy, not found.sft_is_silent)
    if found.detectable is not None:
        healthy = "found in 4 runs of 5; more samples find a smaller one"
        value = percent(found.detectable) if found.detectable < 1 else "none: too few comparisons"
        yield _figure("Smallest true win rate told from 50 %", value, healthy)


def _figure(name: str, value: str, healthy: str, ok: bool | None = None) -> Metric:
    return Metric(name=name, title=name, value=None, meaning=value, healthy=healthy, ok=ok)


def run_figures(
    found: Evaluation, bar: float, quality: QualityReport, health: Health, training: Mapping[str, float]
) -> list[Metric]:
    """Return the figures of the first page: evaluation, judge, training.

    `training` are the `figures` of the training's manifest; first_loss is the DPO loss before the first update.
    """
    judged = {metric.name: metric for metric in quality.metrics}
    read = {metric.name: metric for metric in health.readings}
    figures = [*win_rate_figures(found, bar), *(judged[name] for name in SHOWN_METRICS if name in judged)]
    if (first := training.get("first_loss")) is not None:
        figures.append(_figure("Loss before the first update", f"{first:.4f}", "ln 2 = 0.6931 for the sigmoid loss"))
    if (share := training.get("exact_share")) is not None:
        figures.append(_figure("Sides trained on exactly the sampled tokens", percent(share), "100 %", share == 1))
    return figures + [read[name] for name in SHOWN_READINGS if name in read]


def inputs_section(manifests: Sequence[Manifest], changed: Mapping[str, Any]) -> ReportSection:
    """Show the prompts, models and judges that a run was made from, and the settings that are not the defaults."""
    prompts, purpose = list[tuple[Cell, ...]](), "pairs"
    for manifest in manifests:
        if manifest.stage == "training":  # all that it was made from comes before it
            purpose = "comparison"
        if manifest.stage == "prompts":
            counts = (manifest.counts.get(name) for name in ("read", "duplicates", "in_training"))
            file, used = manifest.upstream[0].uri.rsplit("/", 1)[-1], manifest.artifact
            prompts.append((purpose, file, *counts, used.rows, used.sha256[:12]))
    settings = tuple((name, "empty" if value is None else str(value)) for name, value in changed.items())
    return ReportSection(
        "What went in",
        "The prompts, models, judges and settings that the run was made from.",
        tables=(
            Table("Prompts", ("for", "file", "rows", "duplicates", "in training pairs", "used", "sha256"),
                  tuple(prompts)),
            Table("Models and judges", ("what", "name", "sha256"), tuple(dict.fromkeys(_models(manifests)))),
            Table("Settings that are not the defaults", ("setting", "value"), settings),
        ),
    )  # fmt: skip


def _models(manifests: Sequence[Manifest]) -> Iterator[tuple[Cell, ...]]:
    """Yield what was sampled from, trained on, and asked."""
    for manifest in manifests:
        if manifest.stage == "training":
            for kind, title in (("base_model", "base model"), ("sft_adapter", "SFT adapter")):
                if origin := manifest.origin(kind):
                    yield title, origin.uri, origin.sha256[:12]
        elif manifest.stage == "judging":
            judging = manifest.settings(JudgingConfig)
            yield from (("judge", judge.model, None) for judge in judging.judges())
            yield "rubric", judging.rubric, None
