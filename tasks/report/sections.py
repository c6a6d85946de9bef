"""The sections of a run's report, each built from what its stage left behind."""

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.batch.costs import Ledger, format_usd
from tasks.report.page import Cell, Example, Picture, ReportSection, Table
from tasks.store.measures import Evaluation, Health, Metric, QualityReport, WinRate
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
    """Return `count` rows drawn evenly from a stream, in its order, holding no more than that (reservoir sampling)."""
    rng = random.Random(seed)
    kept: list[tuple[int, Row]] = []
    for number, row in enumerate(rows):
        if number < count:
            kept.append((number, row))
        elif (place := rng.randint(0, number)) < count:
            kept[place] = (number, row)
    return [row for _, row in sorted(kept, key=lambda item: item[0])]


def quality_section(report: QualityReport, png: bytes | None = None) -> ReportSection:
    """Show what was measured about the judge and its pairs, and what to change."""
    columns = ("measurement", "state", "value", "healthy")
    tables = [Table("Measurements", columns, tuple(map(metric_row, report.metrics)))]
    tables += [table for metric in report.metrics if (table := _detail_table(metric))]
    if report.reasons:
        tables.append(Table("Why rows gave no pair", ("reason", "rows"), tuple(report.reasons.items())))
    caption = "Positions of best and worst against chance with 95 % intervals, and lengths of chosen and rejected."
    return ReportSection(
        title="Preferences",
        summary=report.summary() + ".",
        advice=tuple(metric.advice for metric in report.metrics if metric.advice),
        tables=tuple(tables),
        pictures=(Picture(png, caption),) if png else (),
    )


def metric_row(metric: Metric) -> tuple[Cell, ...]:
    """Return a measurement's title, whether it lies in its range, its value with its unit, and the range."""
    return metric.title, metric.ok, metric.text(), metric.healthy


def _detail_table(metric: Metric) -> Table | None:
    detail = metric.detail
    if "positions" in detail:
        return _position_table(metric)
    if "speakers" in detail:
        rows = (
            (row["speaker"], f"{100 * row['chosen']:.1f} %", f"{100 * row['rejected']:.1f} %")
            for row in detail["speakers"]
        )
        return Table("Lines by speaker", ("speaker", "in chosen", "in rejected"), tuple(rows))
    if "histogram" in detail:
        return Table(metric.title, ("confidence", "votes"), tuple(detail["histogram"].items()))
    if metric.name == "distinct_2":
        shares = ((f"{n}-grams", f"{100 * detail[f'distinct_{n}']:.1f} %") for n in (1, 2, 3))
        return Table("Distinct n-grams in two completions of a prompt", ("of", "distinct"), tuple(shares))
    if metric.name == "tokens_per_verdict" and metric.value is not None:
        return Table("Tokens of the judge", tuple(detail), (tuple(detail.values()),))
    return None


def _position_table(metric: Metric) -> Table:
    detail = metric.detail
    rows = tuple(
        (
            row["position"],
            row["observed"],
            f"{100 * row['rate']:.1f} %",
            f"{100 * row['interval'][0]:.1f}-{100 * row['interval'][1]:.1f} %",
            f"{100 * row['chance']:.1f} %",
            row["lift"],
        )
        for row in detail["positions"]
    )
    caption = f"{metric.title} (chi-squared {detail['chi_squared']:.4g}, p {_p_text(detail['p_value'])})"
    return Table(caption, ("position", "verdicts", "share", "95 % interval", "chance", "lift"), rows)


def _p_text(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"


def pairs_section(pairs: Sequence[Row]) -> ReportSection:
    """Show preference pairs to read: what the policy is taught to prefer to what."""
    shown = pairs[:EXAMPLES]
    examples = tuple(
        Example(
            title=_example_title(number, pair["prompt"], _confidence(pair)),
            prompt=_prompt_text(pair["prompt"]),
            left_label="chosen",
            left=pair["chosen"][-1]["content"],
            right_label="rejected",
            right=pair["rejected"][-1]["content"],
        )
        for number, pair in enumerate(shown, 1)
    )
    summary = f"{len(shown)} preference pairs, drawn at random. Would you have chosen the left ones?"
    return ReportSection(title="Example pairs", summary=summary, examples=examples)


def training_section(
    health: Health, metrics: Sequence[Row], png: bytes | None = None, counts: Mapping[str, int] | None = None
) -> ReportSection:
    """Show the readings and curves of a training.

    Args:
        health: the readings.
        metrics: the rows of `metrics.jsonl`: {step, loss, eval_loss, rewards/..., ...}, each with some of them.
        png: the curves, from `tasks.report.plots.plot_metrics`.
        counts: `counts` of the training's manifest: what became of the pairs.
    """
    readings = tuple((*metric_row(reading), reading.meaning) for reading in health.readings)
    tables = (
        Table("Readings", ("metric", "state", "value", "healthy", "meaning"), readings),
        _figures(metrics),
        _pairs_used(counts or {}),
    )
    verdict = "Healthy" if health.ok else "Needs attention"
    return ReportSection(
        title="Training",
        summary=f"{verdict}: readings from {health.source}.",
        advice=(*health.warnings, *health.advice),
        tables=tuple(table for table in tables if table.rows),
        pictures=(_curves(png),) if png else (),
    )


def _pairs_used(counts: Mapping[str, int]) -> Table:
    columns = ("pairs", "given", "used", "refused", "sides cut at max_length", "longest, tokens",
               "share on exactly the sampled tokens", "sides cut in sampling")  # fmt: skip
    shown = ("pairs", "used", "refused", "cut_sides", "longest")

    def exact(side: str) -> str:
        used = 2 * counts[f"{side}_used"]
        return f"{counts.get(f'{side}_exact', 0) / used:.3f}" if used else "-"

    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (name, *(counts[f"{side}_{figure}"] for figure in shown), exact(side), counts.get(f"{side}_unfinished", 0))
        for name, side in (("to train", "train"), ("held out", "val"))
        if f"{side}_pairs" in counts
    )
    return Table("Pairs", columns, rows)


def live_section(summary: str, metrics: Sequence[Row], png: bytes) -> ReportSection:
    """Show a training that is still running.

    Args:
        summary: how far it is.
        metrics: the rows of `metrics.jsonl` so far.
        png: their curves, from `tasks.report.plots.plot_metrics`.
    """
    return ReportSection("Training live", summary, tables=(_figures(metrics),), pictures=(_curves(png),))


def _curves(png: bytes) -> Picture:
    return Picture(png, "Loss, accuracy and rewards over the optimizer steps.")


def _figures(metrics: Sequence[Row]) -> Table:
    rows = tuple(row for name, title in TRAINING_FIGURES if (row := _course(metrics, name, title)))
    return Table("From first to last", ("figure", "first", "last", "lowest", "highest"), rows)


def _course(metrics: Sequence[Row], name: str, title: str) -> tuple[Cell, ...] | None:
    values = [float(row[name]) for row in metrics if isinstance(row.get(name), int | float)]
    return (title, values[0], values[-1], min(values), max(values)) if values else None


@dataclass
class SampleLengths:
    """Words and empty samples of both adapters, counted over a stream of comparisons."""

    samples: int = 0
    words: tuple[int, int] = (0, 0)
    empty: tuple[int, int] = (0, 0)

    def watch(self, comparisons: Iterable[Row]) -> Iterator[Row]:
        """Yield the comparisons, counting them."""
        for row in comparisons:
            before, after = (len(text.split()) for text in row["completions"])
            self.samples += 1
            self.words = (self.words[0] + before, self.words[1] + after)
            self.empty = (self.empty[0] + (before == 0), self.empty[1] + (after == 0))
            yield row

    def table(self) -> Table:
        """Return the mean length of both adapters' samples."""
        names = ("before (SFT)", "after (DPO)")
        rows = tuple(
            (name, round(words / max(1, self.samples), 1), empty)
            for name, words, empty in zip(names, self.words, self.empty, strict=True)
        )
        return Table("Length of the samples", ("adapter", "mean words", "empty"), rows)


def evaluation_section(
    found: Evaluation, comparisons: Sequence[Row] = (), bar: float = 0.5, lengths: SampleLengths | None = None
) -> ReportSection:
    """Show whether the new adapter won, and before/after comparisons to read.

    Args:
        found: the evaluation.
        comparisons: rows of `comparisons.jsonl`: prompt, completions [SFT, new], outcome (1: the new one won).
        bar: what the intervals' lower bounds must be over.
        lengths: of all samples, if they were counted: a judge may like longer texts better.
    """
    passed = found.proven > bar
    summary = (
        f"The new adapter wins {found.text()} of the comparisons with the SFT adapter on {found.prompts:,} held-out "
        f"prompts (ties count half). The lower bound that counts is {100 * found.proven:.1f} %, "
        f"{'over' if passed else 'not over'} the bar of {100 * bar:.3g} %."
    )
    table = Table(
        f"Win rates with {100 * found.confidence:.3g} % intervals",
        ("comparison", "state", "win rate", "interval", "samples", "prompts", "ties"),
        tuple(_rate_rows(found, bar)),
    )
    return ReportSection(
        title="Evaluation",
        summary=summary,
        advice=tuple(_evaluation_advice(found, passed)),
        tables=(table, lengths.table()) if lengths and lengths.samples else (table,),
        examples=tuple(_comparison(number, row) for number, row in enumerate(comparisons[:EXAMPLES], 1)),
    )


def _rate_rows(found: Evaluation, bar: float) -> Iterator[tuple[Cell, ...]]:
    yield _rate_row("new adapter against SFT", found, found.lower > bar)
    if (controlled := found.length_controlled) is not None:
        yield _rate_row("the same, length taken out", controlled, controlled.lower > bar)
    if found.second is not None:
        yield _rate_row(f"by {', '.join(found.second.judges)}", found.second.rate, None)
    if found.null is not None:
        yield _rate_row(f"SFT against itself ({100 * found.null.confidence:.3g} %)", found.null, found.null_holds)


def _rate_row(name: str, rate: WinRate, ok: bool | None) -> tuple[Cell, ...]:
    interval = f"{100 * rate.lower:.1f}-{100 * rate.upper:.1f} %"
    share, ties = f"{100 * rate.win_rate:.1f} %", f"{100 * rate.ties:.1f} %"
    return name, ok, share, interval, rate.samples, rate.prompts, ties


def _evaluation_advice(found: Evaluation, passed: bool) -> Iterator[str]:
    if found.null is not None and not found.null_holds:
        yield (
            f"Two draws of the SFT adapter come out at {found.null.text()}, where it must be near 50 %: do not trust "
            "this win rate. Look at the judge's positions, and take more evaluation.num_samples."
        )
    if (controlled := found.length_controlled) and abs(controlled.win_rate - found.win_rate) > LENGTH_EXPLAINS:
        yield (
            f"With length taken out the win rate is {controlled.text()}: the samples of both adapters differ in length "
            "(see the table), and the judge decides by it. Say in judging.rubric that length does not count."
        )
    if not passed:
        yield _why_not(found)
    if found.second is None:
        yield (
            "No other judge was asked: a taste of the judge that made the labels cannot be told from a gain. Name "
            "another model in evaluation.judges; the samples are there, only its verdicts are paid."
        )


def _why_not(found: Evaluation) -> str:
    if found.upper > 0.5 and found.detectable is not None and found.win_rate < found.detectable:
        return (
            f"This evaluation finds a true win rate of {100 * found.detectable:.1f} % or more in 4 runs of 5, and a "
            "smaller one seldom: raise evaluation.num_samples or max_prompts, or give more held-out prompts."
        )
    return (
        "The adapter is not better, so it is not promoted. In this order: fix what is out of range under "
        "Preferences, try a higher training.learning_rate with training.sft_weight 1, a lower training.beta, a "
        "stronger judging.model, more generation.num_completions, more prompts."
    )


def _comparison(number: int, row: Row) -> Example:
    winner = {1.0: 1, 0.0: 0}.get(row.get("outcome", 0.5))
    outcome = "undecided" if winner is None else ("the SFT adapter won", "the new adapter won")[winner]
    before, after = row["completions"]
    return Example(
        title=_example_title(number, row["prompt"], outcome),
        prompt=_prompt_text(row["prompt"]),
        left_label="before (SFT)",
        left=before,
        right_label="after (DPO)",
        right=after,
        winner=winner,
    )


def cost_text(ledger: Ledger, is_priced: bool) -> str:
    """Return what everything cost in US$, or that it is not known."""
    usd = ledger.total().used.usd
    return format_usd(usd) if is_priced or usd else "not known: prompt_price and completion_price are not set"


def cost_section(ledger: Ledger, is_priced: bool = True) -> ReportSection:
    """Show tokens, GPU time and money by stage, and what the cache saved; without prices no sum of money is claimed."""
    heading, *rows = ledger.rows()
    total = ledger.total()
    if is_priced or total.used.usd:
        summary = f"Making everything in this run cost {format_usd(total.used.usd)} US$, whichever run made it."
    else:
        summary = "What this run cost is not known: set prompt_price and completion_price of the models to see it."
    if total.cached.usd:
        summary += f" Results kept from earlier runs saved another {format_usd(total.cached.usd)} US$."
    elif total.cached.requests:
        summary += f" Results kept from earlier runs saved {total.cached.requests:,} requests."
    return ReportSection(
        title="Cost", summary=summary, tables=(Table("By stage", tuple(heading), tuple(map(tuple, rows))),)
    )


def lineage_section(manifests: Sequence[Manifest], root: str = "") -> ReportSection:
    """Show what was made from what: digests, rows, package versions, and each stage's settings.

    Args:
        manifests: of the artifacts, each after those of what it was made from.
        root: of the workspace: addresses below it are shown without it.
    """
    rows = tuple(_lineage_row(manifest, root) for manifest in manifests)
    tables = [Table("Artifacts", ("stage", "rows", "sha256", "made from", "where"), rows)]
    advice = []
    packages = _package_rows(manifests)
    if packages:
        tables.append(Table("Package versions", ("package", "version", "stages"), packages))
    mixed = sorted({str(name) for name, _, _ in packages if [row[0] for row in packages].count(name) > 1})
    if mixed:
        advice.append(f"Stages ran with different versions of {', '.join(mixed)}: see the table of packages.")
    blocks = tuple(
        (f"Settings of {manifest.stage}, {manifest.artifact.sha256[:12]}", _json(manifest.config))
        for manifest in manifests
        if manifest.config
    )
    return ReportSection(
        title="Lineage",
        summary="Every artifact, by the digest of its content, with what it was made from.",
        advice=tuple(advice),
        tables=tuple(tables),
        blocks=blocks,
    )


def _lineage_row(manifest: Manifest, root: str) -> tuple[Cell, ...]:
    artifact = manifest.artifact
    upstream = ", ".join(f"{origin.kind} {origin.sha256[:8]}" for origin in manifest.upstream)
    return manifest.stage, artifact.rows, artifact.sha256[:8], upstream or None, _place(artifact.uri, root)


def _place(uri: str, root: str) -> str:
    """Shorten an address: without the workspace, and with the first digits of keys, which no table has room for."""
    below = uri.removeprefix(root).removeprefix("/") if root else uri
    return re.sub(r"([0-9a-f]{8})[0-9a-f]{24,}", r"\1…", below)


def _package_rows(manifests: Sequence[Manifest]) -> tuple[tuple[Cell, ...], ...]:
    stages: dict[tuple[str, str], dict[str, None]] = {}
    for manifest in manifests:
        for package in manifest.packages.items():
            stages.setdefault(package, {})[manifest.stage] = None
    return tuple((package, version, ", ".join(names)) for (package, version), names in sorted(stages.items()))


def _confidence(pair: Row) -> str:
    confidence = pair.get("confidence")
    return f"confidence {confidence:.3g}" if isinstance(confidence, int | float) else ""


def _example_title(number: int, prompt: Sequence[Row], note: str) -> str:
    last = " ".join(str(prompt[-1]["content"]).split())
    end = last if len(last) <= 80 else f"… {last[-80:].partition(' ')[2]}"
    return f"{number}. {note}: {end}" if note else f"{number}. {end}"


def _prompt_text(prompt: Sequence[Row]) -> str:
    return "\n\n".join(f"({message['role']})\n{message['content']}" for message in prompt)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True)
