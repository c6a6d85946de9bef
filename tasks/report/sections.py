"""The sections of a run's report, each built from what its stage left behind."""

import heapq
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from tasks.batch.costs import COLUMNS, StageCost, format_usd
from tasks.report.page import Cell, Example, ReportSection, Side, Table
from tasks.report.plots import plot_metrics, plot_quality
from tasks.store.measures import (
    Choice,
    Evaluation,
    Health,
    Metric,
    QualityReport,
    WinRate,
    p_text,
    percent,
    percent_range,
)
from tasks.store.workspace import Manifest

EXAMPLES = 20
# Raw and length-controlled win rate differ by so much only where length decides.
LENGTH_EXPLAINS = 0.02
TRAINING_FIGURES = (
    ("loss", "Training loss"),
    ("eval_loss", "Held-out loss"),
    ("rewards/accuracies", "Training accuracy (chosen over rejected)"),
    ("eval_rewards/accuracies", "Held-out accuracy"),
    ("rewards/margins", "Training margin"),
    ("eval_rewards/margins", "Held-out margin"),
    ("rewards/chosen", "Reward of chosen"),
    ("rewards/rejected", "Reward of rejected"),
)
Row = Mapping[str, Any]


def sample_rows(rows: Iterable[Row], count: int = EXAMPLES, seed: int = 42) -> list[Row]:
    """Return `count` rows drawn evenly from a stream, in its order, holding no more than that."""
    rng = random.Random(seed)
    drawn = heapq.nsmallest(count, ((rng.random(), number, row) for number, row in enumerate(rows)))
    return [row for _, _, row in sorted(drawn, key=itemgetter(1))]


def quality_section(report: QualityReport) -> ReportSection:
    """Show what was measured about the judge and its pairs, and what to change."""
    columns = ("measurement", "state", "value", "healthy")
    details = (_detail_table(metric) for metric in report.metrics)
    return ReportSection(
        title="Preferences",
        summary=report.summary() + ".",
        advice=tuple(metric.advice for metric in report.metrics if metric.advice),
        tables=(
            Table("Measurements", columns, tuple(map(metric_row, report.metrics))),
            *(table for table in details if table),
            Table("Why rows gave no pair", ("reason", "rows"), tuple(report.reasons.items())),
        ),
        pictures=tuple(plot_quality(report)),
    )


def metric_row(metric: Metric) -> tuple[Cell, ...]:
    """Return a measurement's title, whether it lies in its range, its value with its unit, and the range."""
    return metric.title, metric.ok, metric.text(), metric.healthy


def _detail_table(metric: Metric) -> Table | None:
    detail, rows = metric.detail, list[tuple[Cell, ...]]()
    if "positions" in detail:
        for at in detail["positions"]:
            shares = percent(at["rate"]), percent_range(*at["interval"]), percent(at["chance"])
            rows.append((at["position"], at["observed"], *shares, at["lift"]))
        caption = f"{metric.title} (chi-squared {detail['chi_squared']:.4g}, {p_text(detail['p_value'])})"
        return Table(caption, ("position", "verdicts", "share", "95 % interval", "chance", "lift"), tuple(rows))
    if "speakers" in detail:
        rows = [(of["speaker"], percent(of["chosen"]), percent(of["rejected"])) for of in detail["speakers"]]
        return Table("Lines by speaker", ("speaker", "in chosen", "in rejected"), tuple(rows))
    if "histogram" in detail:
        columns = ("score", "prompts") if metric.name == "best_score" else ("confidence", "votes")
        return Table(metric.title, columns, tuple(detail["histogram"].items()))
    if metric.name == "distinct_2":
        rows = [(f"{n}-grams", percent(detail[f"distinct_{n}"])) for n in (1, 2, 3)]
        return Table("Distinct n-grams in two completions of a prompt", ("of", "distinct"), tuple(rows))
    if metric.name == "tokens_per_verdict" and metric.value is not None:
        return Table("Tokens of the judge", tuple(detail), (tuple(detail.values()),))
    return None


def pairs_section(pairs: Sequence[Row]) -> ReportSection:
    """Show preference pairs to read: what the policy is taught to prefer to what."""
    shown = pairs[:EXAMPLES]
    examples = []
    for number, pair in enumerate(shown, 1):
        known = {"confidence": pair.get("confidence")}
        known |= {f"{side} scores": pair.get(f"{side}_score") for side in ("chosen", "rejected")}
        note = ", ".join(f"{name} {value:.3g}" for name, value in known.items() if isinstance(value, int | float))
        sides = Side("chosen", pair["chosen"][-1]["content"]), Side("rejected", pair["rejected"][-1]["content"])
        examples.append(_example(number, pair["prompt"], note, sides))
    summary = f"{len(shown)} preference pairs, drawn at random. Would you have chosen the left ones?"
    return ReportSection(title="Example pairs", summary=summary, examples=tuple(examples))


def _example(number: int, prompt: Sequence[Row], note: str, sides: tuple[Side, Side]) -> Example:
    """Return two texts on a prompt, titled by a note and the end of the prompt."""
    last = " ".join(str(prompt[-1]["content"]).split())
    end = last if len(last) <= 80 else f"… {last[-80:].partition(' ')[2]}"
    scene = "\n\n".join(f"({message['role']})\n{message['content']}" for message in prompt)
    return Example(f"{number}. {note}: {end}" if note else f"{number}. {end}", scene, sides)


def training_section(health: Health, metrics: Sequence[Row], counts: Mapping[str, int] | None = None) -> ReportSection:
    """Show the readings and curves of a training.

    `metrics` are the rows of `metrics.jsonl`, `counts` those of the training's manifest: what became of the pairs.
    """
    counts, pairs = counts or {}, list[tuple[Cell, ...]]()
    for name, side in (("to train", "train"), ("held out", "val")):
        if f"{side}_pairs" in counts:
            shown = (counts[f"{side}_{figure}"] for figure in ("pairs", "used", "refused", "cut_sides", "longest"))
            used = 2 * counts[f"{side}_used"]
            exact = percent(counts.get(f"{side}_exact", 0) / used) if used else None
            pairs.append((name, *shown, exact, counts.get(f"{side}_unfinished", 0)))
    return ReportSection(
        title="Training",
        summary=f"{'Healthy' if health.ok else 'Needs attention'}: readings from {health.source}.",
        advice=(*health.warnings, *health.advice),
        tables=(
            Table("Readings", ("metric", "state", "value", "healthy", "meaning"),
                  tuple((*metric_row(reading), reading.meaning) for reading in health.readings)),
            _course(metrics),
            Table("Pairs", ("pairs", "given", "used", "refused", "sides cut at max_length", "longest, tokens",
                            "share on exactly the sampled tokens", "sides cut in sampling"), tuple(pairs)),
        ),
        pictures=tuple(plot_metrics(metrics)),
    )  # fmt: skip


def live_section(summary: str, metrics: Sequence[Row]) -> ReportSection:
    """Show a training that is still running: how far it is, and the rows of `metrics.jsonl` so far."""
    pictures = tuple(plot_metrics(metrics))
    return ReportSection("Training live", summary, tables=(_course(metrics),), pictures=pictures)


def _course(metrics: Sequence[Row]) -> Table:
    rows = []
    for name, title in TRAINING_FIGURES:
        values = [float(row[name]) for row in metrics if isinstance(row.get(name), int | float)]
        if values:
            rows.append((title, values[0], values[-1], min(values), max(values)))
    return Table("From first to last", ("figure", "first", "last", "lowest", "highest"), tuple(rows))


class Rate(NamedTuple):
    """One of the win rates of an evaluation, what it should be, and whether it is."""

    name: str
    rate: WinRate
    healthy: str
    ok: bool


NULL = "SFT against itself"


def rates_of(found: Evaluation, bar: float) -> Iterator[Rate]:
    """Yield every win rate of an evaluation, SFT against itself last; `bar` is what lower bounds must be over."""
    over_bar = f"lower bound over {percent(bar, '.3g')}"
    yield Rate("New adapter against SFT", found, over_bar, found.lower > bar)
    if (controlled := found.length_controlled) is not None:
        yield Rate("The same, length taken out", controlled, over_bar, controlled.lower > bar)
    if (second := found.second) is not None:
        name = f"The same, by {', '.join(second.judges)}"
        yield Rate(name, second.rate, "lower bound over 50 %", second.rate.lower > 0.5)
    if (agreement := found.agreement) is not None:
        name = f"Corrected by {agreement.labels} labels of a person"
        yield Rate(name, agreement.corrected, "lower bound over 50 %", agreement.corrected.lower > 0.5)
    if (null := found.null) is not None:
        yield Rate(NULL, null, f"50 % within the {percent(null.confidence, '.3g')} interval", found.null_holds)


def evaluation_section(
    found: Evaluation, comparisons: Sequence[Row] = (), bar: float = 0.5, lengths: Table | None = None
) -> ReportSection:
    """Show whether the new adapter won, by lower bounds over `bar`, and rows of `comparisons.jsonl` to read.

    `lengths` are of all samples, from `sample_lengths`: a judge may like longer texts better.
    """
    rows = tuple(
        (name, ok, percent(rate.win_rate), rate.interval(), percent(rate.confidence, ".3g"),
         rate.samples, rate.prompts, percent(rate.ties))
        for name, rate, _, ok in rates_of(found, bar)
    )  # fmt: skip
    columns = ("comparison", "state", "win rate", "interval", "confidence", "samples", "prompts", "ties")
    examples = []
    for number, row in enumerate(comparisons[:EXAMPLES], 1):
        (before, after), lost, won = row["completions"], row.get("outcome") == 0, row.get("outcome") == 1
        note = "the new adapter won" if won else "the SFT adapter won" if lost else "undecided"
        sides = Side("before (SFT)", before, lost), Side("after (DPO)", after, won)
        examples.append(_example(number, row["prompt"], note, sides))
    return ReportSection(
        title="Evaluation",
        summary=(
            f"The new adapter wins {found.text()} of the comparisons with the SFT adapter on {found.prompts:,} "
            f"held-out prompts (ties count half). The lower bound that counts is {percent(found.proven)}, "
            f"{'over' if found.proven > bar else 'not over'} the bar of {percent(bar, '.3g')}."
        ),
        advice=tuple(_evaluation_advice(found, bar)),
        tables=(Table("Win rates", columns, rows), *([lengths] if lengths else [])),
        examples=tuple(examples),
    )


def choice_section(choice: Choice) -> ReportSection:
    """Show the checkpoints of a training as the judge compared them, and which one was chosen."""
    best = choice.best
    rows = tuple(
        (one.step, "chosen" if one is best else None, percent(one.win_rate), one.interval(),
         one.length_controlled.text() if one.length_controlled else None, one.samples, one.adapter_sha256[:12])
        for one in choice.tried
    )  # fmt: skip
    columns = ("optimizer step", "state", "win rate", "interval", "length taken out", "samples", "adapter")
    return ReportSection(
        title="Best checkpoint",
        summary=(
            f"Of {len(choice.tried)} checkpoints the one of step {best.step} is chosen, by {len(choice.prompts):,} "
            "held-out prompts. The verdict on it comes from the other held-out prompts."
        ),
        tables=(Table("Checkpoints against the SFT adapter", columns, rows),),
        notes=(
            "Chosen is the highest lower bound, of the two that the gate looks at. The rate of the chosen one is too "
            "high here, because it was chosen for it; that of the evaluation is not.",
        ),
    )


def sample_lengths(comparisons: Iterable[Row]) -> Table:
    """Return the mean length of both adapters' samples."""
    words = [[len(text.split()) for text in row["completions"]] for row in comparisons]
    rows = tuple(
        (name, round(sum(counts) / len(counts), 1), counts.count(0))
        for name, counts in zip(("before (SFT)", "after (DPO)"), zip(*words, strict=True), strict=False)
    )
    return Table("Length of the samples", ("adapter", "mean words", "empty"), rows)


def _evaluation_advice(found: Evaluation, bar: float) -> Iterator[str]:
    if not found.null_holds and found.null is not None:
        yield (
            f"Two draws of the SFT adapter come out at {found.null.text()}, where it must be near 50 %: do not trust "
            "this win rate. Look at the judge's positions, and take more evaluation.num_samples."
        )
    if (agreement := found.agreement) is not None and not found.agrees:
        yield (
            f"The judge agrees with a person in {agreement.share.text()} of {agreement.labels} comparisons, and a coin "
            "would in 50 %: write into judging.rubric what the person looks at, or take another judging.model."
        )
    if (controlled := found.length_controlled) and abs(controlled.win_rate - found.win_rate) > LENGTH_EXPLAINS:
        yield (
            f"With length taken out the win rate is {controlled.text()}: the samples of both adapters differ in length "
            "(see the table), and the judge decides by it. Say in judging.rubric that length does not count."
        )
    if found.proven <= bar:
        if found.upper > 0.5 and found.detectable is not None and found.win_rate < found.detectable:
            finds = "no true win rate in 4 runs of 5"
            if (least := found.detectable) < 1:
                finds = f"a true win rate of {percent(least)} or more in 4 runs of 5, and a smaller one seldom"
            yield (
                f"This evaluation finds {finds}: raise evaluation.num_samples or max_prompts, or give more held-out "
                "prompts."
            )
        else:
            yield (
                f"The win rate is not proven to be over {percent(bar, '.3g')}. In this order: fix what is out of range "
                "under Preferences, try a higher training.learning_rate with training.sft_weight 1, a lower "
                "training.beta, a stronger judging.model, more generation.num_completions, more prompts."
            )
    if found.second is None:
        yield (
            "There is no verdict of another judge: a taste of the judge that made the labels cannot be told from a "
            "gain. Name another model in evaluation.judges; the samples are there, only its verdicts are paid."
        )


def cost_section(costs: Sequence[StageCost], is_priced: bool) -> ReportSection:
    """Show tokens, GPU time and money by stage, the total last; without prices no sum of money is claimed."""
    usd = costs[-1].used.usd
    if is_priced or usd:
        summary = f"Making everything in this run cost {format_usd(usd)} US$, whichever run made it."
    else:
        summary = "What this run cost is not known: set prompt_price and completion_price of the models to see it."
    return ReportSection("Cost", summary, tables=(Table("By stage", COLUMNS, tuple(c.row() for c in costs)),))


def lineage_section(manifests: Sequence[Manifest], root: str = "") -> ReportSection:
    """Show what was made from what: digests, rows, package versions, and each stage's settings.

    Addresses below `root`, that of the workspace, are shown without it.
    """
    made, packages = list[tuple[Cell, ...]](), dict[tuple[str, str], dict[str, None]]()
    for manifest in manifests:
        artifact = manifest.artifact
        upstream = ", ".join(f"{origin.kind} {origin.sha256[:8]}" for origin in manifest.upstream)
        where = artifact.uri.removeprefix(root).removeprefix("/") if root else artifact.uri
        # Of a key the first digits: no table has room for all.
        where = re.sub(r"([0-9a-f]{8})[0-9a-f]{24,}", r"\1…", where)
        made.append((manifest.stage, artifact.rows, artifact.sha256[:8], upstream or None, where))
        for package in manifest.packages.items():
            packages.setdefault(package, {})[manifest.stage] = None
    versions = tuple((name, version, ", ".join(stages)) for (name, version), stages in sorted(packages.items()))
    names = [name for name, _ in packages]
    mixed = ", ".join(sorted({name for name in names if names.count(name) > 1}))
    return ReportSection(
        title="Lineage",
        summary="Every artifact, by the digest of its content, with what it was made from.",
        advice=(f"Stages ran with different versions of {mixed}: see the table of packages.",) if mixed else (),
        tables=(
            Table("Artifacts", ("stage", "rows", "sha256", "made from", "where"), tuple(made)),
            Table("Package versions", ("package", "version", "stages"), versions),
        ),
        blocks=tuple(
            (f"Settings of {manifest.stage}, {manifest.artifact.sha256[:12]}",
             json.dumps(manifest.config, ensure_ascii=False, indent=2, sort_keys=True))
            for manifest in manifests
            if manifest.config
        ),
    )  # fmt: skip
