"""The sections of a run's report, each built from what its stage left behind."""

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.batch.costs import Ledger, format_usd
from tasks.judge.quality import Metric, QualityReport
from tasks.report.page import Cell, Example, Picture, ReportSection, Table
from tasks.store.workspace import Manifest

EXAMPLES = 20
# One-sided 5 %, power 80 %: decided comparisons that it takes to see a win rate of 55 % and of 60 %.
ENOUGH_DECIDED, ENOUGH_FOR_60 = 615, 152
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
    columns = ("measurement", "value", "healthy", "state")
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


def metric_row(metric: Metric) -> tuple[str, Cell, str, bool | None]:
    """Return a measurement's title, its value with its unit, the healthy range, and whether it lies in it."""
    value: Cell = metric.value
    if metric.value is not None:
        is_share = (metric.unit or "").startswith("share")
        value = f"{100 * metric.value:.1f} %" if is_share else f"{metric.value:,.3g} {metric.unit or ''}".strip()
    return metric.title, value, metric.healthy, metric.ok


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
    health: Row, metrics: Sequence[Row], png: bytes | None = None, counts: Mapping[str, int] | None = None
) -> ReportSection:
    """Show the readings and curves of a training.

    Args:
        health: `health.json`: ok, source, readings (name, value, healthy, ok, meaning), warnings, advice.
        metrics: the rows of `metrics.jsonl`: {step, loss, eval_loss, rewards/..., ...}, each with some of them.
        png: the curves, from `tasks.report.plots.plot_metrics`.
        counts: `counts` of the training's manifest: what became of the pairs.
    """
    readings = tuple((r["name"], r["value"], r["healthy"], r["ok"], r["meaning"]) for r in health["readings"])
    tables = (
        Table("Readings", ("metric", "value", "healthy", "state", "meaning"), readings),
        _figures(metrics),
        _pairs_used(counts or {}),
    )
    verdict = "Healthy" if health["ok"] else "Needs attention"
    return ReportSection(
        title="Training",
        summary=f"{verdict}: readings from {health['source']}.",
        advice=(*health["warnings"], *health["advice"]),
        tables=tuple(table for table in tables if table.rows),
        pictures=(_curves(png),) if png else (),
    )


def _pairs_used(counts: Mapping[str, int]) -> Table:
    columns = ("pairs", "given", "used", "refused", "sides cut at max_length", "longest, tokens")
    shown = ("pairs", "used", "refused", "cut_sides", "longest")
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (name, *(counts[f"{side}_{figure}"] for figure in shown))
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
    win_rate: Row, comparisons: Sequence[Row] = (), bar: float = 0.5, lengths: SampleLengths | None = None
) -> ReportSection:
    """Show whether the new adapter won, and before/after comparisons to read.

    Args:
        win_rate: `win_rate.json`: win_rate, lower, upper, confidence, samples, prompts, ties, and `null` of the same.
        comparisons: rows of `comparisons.jsonl`: prompt, completions [SFT, new], outcome (1: the new one won).
        bar: what the interval's lower bound must be over.
        lengths: of all samples, if they were counted: a judge may like longer texts better.
    """
    passed = win_rate["lower"] > bar
    summary = (
        f"The new adapter wins {rate_text(win_rate)} of the comparisons with the SFT adapter on "
        f"{win_rate['prompts']:,} held-out prompts (ties count half). The interval "
        f"{'lies' if passed else 'does not lie'} over the bar of "
        f"{100 * bar:.3g} %."
    )
    rows: list[tuple[Cell, ...]] = [_rate_row("new adapter against SFT", win_rate, passed)]
    null = win_rate.get("null")
    if null:
        rows.append(_rate_row("SFT against itself", null, null_is_near(null)))
    columns = ("comparison", "win rate", "interval", "samples", "prompts", "ties", "state")
    table = Table(f"Win rates with {100 * win_rate['confidence']:.3g} % intervals", columns, tuple(rows))
    return ReportSection(
        title="Evaluation",
        summary=summary,
        advice=tuple(_evaluation_advice(win_rate, passed)),
        tables=(table, lengths.table()) if lengths and lengths.samples else (table,),
        examples=tuple(_comparison(number, row) for number, row in enumerate(comparisons[:EXAMPLES], 1)),
    )


def null_is_near(null: Row) -> bool:
    """Tell whether the SFT adapter against itself comes out even, as it must."""
    return bool(null["lower"] <= 0.5 <= null["upper"])


def rate_text(found: Row) -> str:
    """Return a win rate with its interval, in percent."""
    return f"{100 * found['win_rate']:.1f} % ({100 * found['lower']:.1f}-{100 * found['upper']:.1f} %)"


def _rate_row(name: str, found: Row, ok: bool) -> tuple[Cell, ...]:
    interval = f"{100 * found['lower']:.1f}-{100 * found['upper']:.1f} %"
    share, ties = f"{100 * found['win_rate']:.1f} %", f"{100 * found['ties']:.1f} %"
    return name, share, interval, found["samples"], found["prompts"], ties, ok


def _evaluation_advice(win_rate: Row, passed: bool) -> Iterable[str]:
    null = win_rate.get("null")
    if null and not null_is_near(null):
        yield (
            f"Two draws of the SFT adapter come out at {rate_text(null)}, where it must be near 50 %: do not trust "
            "this win rate. Look at the judge's positions, and take more evaluation.num_samples."
        )
    decided = round(win_rate["samples"] * (1 - win_rate["ties"]))
    if not passed and win_rate["upper"] > 0.5 and decided < ENOUGH_DECIDED:
        yield (
            f"Only {decided:,} comparisons were decided (ties left out). To see a win rate of 55 % takes about "
            f"{ENOUGH_DECIDED} of them, 60 % about {ENOUGH_FOR_60}: raise evaluation.num_samples or max_prompts."
        )
    elif not passed:
        yield (
            "The adapter is not better, so it is not promoted. In this order: mend what is out of range under "
            "Preferences, try a higher training.learning_rate with training.sft_weight 1, a lower training.beta, a "
            "stronger judging.model, more generation.num_completions, more prompts."
        )


def _comparison(number: int, row: Row) -> Example:
    outcome = {1.0: "the new adapter won", 0.0: "the SFT adapter won"}.get(row.get("outcome", 0.5), "undecided")
    before, after = row["completions"]
    return Example(
        title=_example_title(number, row["prompt"], outcome),
        prompt=_prompt_text(row["prompt"]),
        left_label="before (SFT)",
        left=before,
        right_label="after (DPO)",
        right=after,
    )


def cost_section(ledger: Ledger) -> ReportSection:
    """Show tokens, GPU time and money by stage, and what the cache saved."""
    heading, *rows = ledger.rows()
    total = ledger.total()
    summary = f"Making everything in this run cost {format_usd(total.used.usd)} US$, whichever run made it."
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
    tables = [Table("Artifacts", ("stage", "artifact", "rows", "sha256", "made from", "where"), rows)]
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
    upstream = ", ".join(f"{origin.kind} {origin.sha256[:12]}" for origin in manifest.upstream)
    place = _place(artifact.uri, root)
    return manifest.stage, artifact.kind, artifact.rows, artifact.sha256[:12], upstream or None, place


def _place(uri: str, root: str) -> str:
    """Shorten an address: without the workspace, and with the first digits of keys, which no table has room for."""
    below = uri.removeprefix(root).removeprefix("/") if root else uri
    return re.sub(r"([0-9a-f]{12})[0-9a-f]{20,}", r"\1…", below)


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
