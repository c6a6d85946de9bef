"""The first page of a run's report, what went into the run, and what a person is asked to approve."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from tasks.batch.costs import format_usd
from tasks.config import JudgingConfig
from tasks.judge.quality import QualityReport
from tasks.report.page import Cell, ReportSection, Table
from tasks.report.sections import ENOUGH_DECIDED, ENOUGH_FOR_60, metric_row, null_is_near, rate_text
from tasks.store.workspace import Manifest

Row = Mapping[str, Any]
# Name, value, healthy range, and whether the value lies in it (None: there is nothing to hold it against).
Figure: TypeAlias = tuple[str, Cell, str, bool | None]
SHOWN_METRICS = (
    "pair_yield",
    "position_best",
    "flip_rate",
    "longer_chosen_tokens",
    "parse_failures",
)
SHOWN_READINGS = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "weights/moved")
MOST_ADVICE = 3


def verdict(win_rate: Row, bar: float) -> str:
    """Say in one sentence whether the new adapter is better than the SFT adapter, and how sure that is.

    Args:
        win_rate: `win_rate.json`.
        bar: what the interval's lower bound must be over to be promoted.
    """
    sure = f"{100 * win_rate['confidence']:.3g} % interval"
    found = f"it wins {rate_text(win_rate)} of the comparisons ({sure} in brackets)"
    null = win_rate.get("null")
    if null and not null_is_near(null):
        return f"Not to be trusted: {found}, but the SFT adapter against itself comes out at {rate_text(null)}."
    if win_rate["upper"] < 0.5:
        return f"Worse: {found}, fewer than half."
    if win_rate["lower"] <= 0.5:
        return f"Not shown to be better: {found}, and the interval holds 50 %."
    if win_rate["lower"] <= bar:
        return f"Better, but not by enough: {found}, and the bar is {100 * bar:.3g} %."
    return f"Better: {found}, more than half."


def glance_section(
    win_rate: Row,
    bar: float,
    served: str,
    figures: Iterable[Figure],
    details: Sequence[ReportSection],
) -> ReportSection:
    """Show the verdict, what became of the adapter, the figures that carry it, and what to do next.

    Args:
        win_rate: `win_rate.json`.
        bar: what the interval's lower bound must be over.
        served: what became of the adapter, as a sentence.
        figures: what carries the verdict.
        details: the pages that follow; their first advice is repeated here.
    """
    advice = [f"{page.title}: {text}" for page in details for text in page.advice[:MOST_ADVICE]]
    if not advice:
        advice = ["Read a few of the comparisons below yourself before you rely on the figures."]
    table = Table("The run in figures", ("figure", "value", "healthy", "state"), tuple(figures))
    return ReportSection("At a glance", f"{verdict(win_rate, bar)} {served}", tuple(advice), (table,))


def win_rate_figures(win_rate: Row, bar: float) -> list[Figure]:
    """Return the win rate, how many comparisons it rests on, and the test that it can be believed."""
    decided = round(win_rate["samples"] * (1 - win_rate["ties"]))
    rows: list[Figure] = [
        ("Win rate", rate_text(win_rate), f"lower bound over {100 * bar:.3g} %", win_rate["lower"] > bar),
        (
            "Decided comparisons", decided, f"{ENOUGH_DECIDED} to see 55 %, {ENOUGH_FOR_60} to see 60 %",
            decided >= ENOUGH_DECIDED or win_rate["lower"] > 0.5,
        ),
    ]  # fmt: skip
    if null := win_rate.get("null"):
        rows.append(("SFT against itself", rate_text(null), "50 % within the interval", null_is_near(null)))
    return rows


def quality_figures(quality: QualityReport) -> list[Figure]:
    """Return the measurements of the judge and its pairs that belong on the first page."""
    found = {metric.name: metric for metric in quality.metrics}
    return [metric_row(found[name]) for name in SHOWN_METRICS if name in found]


def training_figures(health: Row, first_loss: float | None) -> list[Figure]:
    """Return the readings of a training that belong on the first page.

    Args:
        health: `health.json`.
        first_loss: the DPO loss before the first update; that it is right was checked when the training started.
    """
    rows: list[Figure] = []
    if first_loss is not None:
        rows.append(("Loss before the first update", f"{first_loss:.4f}", "ln 2 = 0.6931 for the sigmoid loss", None))
    known = {reading["name"]: reading for reading in health["readings"]}
    rows += [(n, known[n]["value"], known[n]["healthy"], known[n]["ok"]) for n in SHOWN_READINGS if n in known]
    return rows


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
        "judge",
        "requests",
        "answered before",
        "prompt tokens",
        "completion tokens",
        "at most",
        "US$",
        "at most ",
    )
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
