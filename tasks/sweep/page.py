"""The pages of a sweep as sections: the plan before it, the ranking after it."""

import json
import logging
import re
import shlex
from collections.abc import Iterator, Sequence

from prefect.client.schemas.objects import State
from prefect.states import Completed

from tasks.batch.costs import add_up, format_seconds, format_usd
from tasks.config import PipelineConfig, SweepConfig
from tasks.errors import PreflowError
from tasks.report.page import Cell, Picture, ReportSection, Table
from tasks.report.plots import RateBar, plot_rates
from tasks.report.render import render_html, render_text_table
from tasks.report.run import gather_manifests, has_prices, publish, run_sections
from tasks.report.sections import NULL, cost_section, lineage_section
from tasks.store.measures import WinRate, percent
from tasks.store.workspace import Workspace
from tasks.sweep.estimate import TRAINING, SweepPlan, Work
from tasks.sweep.points import Point
from tasks.sweep.ranking import PointResult, SweepResult, sweep_folder

logger = logging.getLogger(__name__)
HOW_ESTIMATED = (
    "Tokens: 4 characters each in prompts; a completion as long as those measured in this workspace, or else at its "
    "limit (max_tokens); a verdict 30 tokens until it is measured, at most the judge's max_tokens, as a thinking model "
    "may use. Before there are pairs, every prompt counts as one. Training: as fast as this workspace's on the same "
    "base, or else {rate:g} pairs a second (sweep.pairs_per_second; 1.14 was measured for a 3B model with QLoRA on an "
    "L4, batches of 2 x 8), without evaluations and start-up; sampling runs on your own endpoint and takes no GPU time "
    "here. Money: the prices in the configuration; where there is none, nothing is counted. Retries come on top."
)


def plan_section(plan: SweepPlan, points: Sequence[Point], sweep: SweepConfig, duplicates: int) -> ReportSection:
    """Show what a sweep is going to do and cost, before it does."""
    total, left_out = plan.total(), f" {duplicates} equal to another were left out." if duplicates else ""
    new = sum(work.stage == TRAINING and not work.finished for work in plan.work)
    alone, money = sum(len(work.points) * work.requests for work in plan.work), money_text(plan)
    summary = (
        f"{len(points)} points.{left_out} Still to come: {new} trainings and {total.to_ask:,} requests, {money}. "
        f"One by one, the points would take {len(points)} trainings and {alone:,} requests."
    )
    return ReportSection(
        title="Sweep plan",
        summary=summary,
        tables=(
            Table(
                "What is to be done, each once for all its points",
                ("work", "by", "points", "requests", "known", "tokens in", "tokens out", "training", "US$"),
                (
                    *(_work_row(work, format_price(work.usd)) for work in plan.work),
                    _work_row(total, format_price(total.usd if plan.is_priced or total.usd else None)),
                ),
            ),
            Table("Points", ("point", "change"), tuple((point.number, point.name) for point in points)),
        ),
        notes=(HOW_ESTIMATED.format(rate=sweep.pairs_per_second),),
    )


def format_price(usd: float | None) -> str:
    """Return US$ as text, also where they are not known."""
    return "no price set" if usd is None else format_usd(usd)


def money_text(plan: SweepPlan) -> str:
    """Return what a plan will cost, and what it can cost at most."""
    total = plan.total()
    if not plan.is_priced and not total.usd:
        return format_price(None)
    money = f"about {format_price(total.usd)} US$, at most {format_usd(total.most_usd)}"
    return money + ("" if plan.is_priced else " and what has no price set")


def plan_lines(plan: SweepPlan) -> Iterator[str]:
    """Yield a line for each piece of work still to do, and one for what all of it costs, for logs and terminals."""
    for work in plan.work:
        points = f", points {_span(work.points)}" if len(plan.points()) > 1 else ""
        if work.to_ask:
            tokens = f"{work.prompt_tokens:,.0f} + {work.completion_tokens:,.0f} tokens"
            known = f" ({work.known:,} more known)" if work.known else ""
            price = format_price(work.usd) + (" US$" if work.usd is not None else "")
            yield f"  {work.stage} ({work.who}{points}): {work.to_ask:,} requests{known}, about {tokens}, {price}"
        elif work.gpu_minutes:
            by = "as measured here" if work.is_measured else "on an L4; not measured here yet"
            yield f"  {work.stage} ({work.who}{points}): about {format_seconds(60 * work.gpu_minutes)} {by}"
    yield f"cost: {money_text(plan)}"


def _work_row(work: Work, money: str) -> tuple[Cell, ...]:
    known = "finished" if work.finished else f"{work.known:,}" if work.requests else None
    return (
        work.stage, work.who or None, _span(work.points) or None, work.requests or None, known,
        round(work.prompt_tokens) or None, round(work.completion_tokens) or None,
        format_seconds(60 * work.gpu_minutes) if work.gpu_minutes else None, money,
    )  # fmt: skip


def _span(numbers: Sequence[int]) -> str:
    """Return numbers as runs: 1-3, 5."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def ranking_section(result: SweepResult, points: Sequence[Point]) -> ReportSection:
    """Show the points from the best down, and what the best one's configuration is."""
    ranked, best = result.ranked(), result.best()
    null = next((point.null for point in ranked if point.null), None)
    null_bar = RateBar(NULL, null) if null else None
    # Without the sections, "training.": there is room for little, and the number says which it is.
    names = {point.number: f"{point.number}. {re.sub(r'[a-z]+[.](?=[a-z_]+=)', '', point.name)}" for point in ranked}
    bars = [RateBar(names[point.number], point.rate, point.widened) for point in ranked if point.rate]
    caption = "Win rates; thick: the interval of each alone, thin: the one that holds for all points at once."
    configs = {point.number: point.config for point in points}
    return ReportSection(
        title="Sweep",
        summary=_summary(result),
        advice=tuple(_advice(result)),
        tables=tuple(_tables(result, null)),
        pictures=(Picture(plot_rates(bars, null_bar), caption),) if ranked else (),
        blocks=tuple(_to_copy(best, configs[best.number])) if best else (),
    )


def _summary(result: SweepResult) -> str:
    best, count = result.best(), len(result.points)
    if best is None or best.rate is None or best.widened is None:
        return f"None of the {count} points could be finished."
    part = "" if len(result.ranking) == count else f" of the {len(result.ranking)} that finished, out of {count}"
    return (
        f"Best{part}: point {best.number} ({best.name}) wins {best.rate.text()} against the SFT adapter. The best of "
        f"{len(result.ranking)} looks better than it is, since chance had so many tries: the interval that holds for "
        f"all points at once is {best.widened.interval()} (each at {100 * result.widened_confidence:.2f} %, "
        f"together at least {100 * result.confidence:.3g} %; Sidak 1967)."
    )


def _advice(result: SweepResult) -> Iterator[str]:
    ranked = result.ranked()
    if failed := result.failed():
        numbers = _span([point.number for point in failed])
        yield f"Points {numbers} failed, see the table; start the sweep again and only they are run."
    if len({point.evaluation_fingerprint for point in ranked}) > 1:
        yield (
            "The points were not all measured on the same prompts with the same settings and judge, so their win rates "
            "compare only roughly. Give eval_prompts that no training prompt is in, and sweep nothing of evaluation."
        )
    first, second = ([point.widened for point in ranked] + [None, None])[:2]
    if first and second and first.lower <= second.upper:
        yield (
            f"The intervals of points {ranked[0].number} and {ranked[1].number} overlap: the sweep does not show which "
            "of them is better. More evaluation.num_samples or held-out prompts narrow them."
        )
    if first and first.lower <= 0.5:
        yield "Not even the best point is surely better than the SFT adapter: promote none of them on these figures."


def _tables(result: SweepResult, null: WinRate | None) -> Iterator[Table]:
    alone, together = f"{100 * result.confidence:.3g} % interval", "interval for all at once"
    rows: list[tuple[Cell, ...]] = [
        (place, point.number, point.name, percent(point.rate.win_rate), point.rate.interval(), point.widened.interval(),
         point.made.preferences.rows if point.made else None)
        for place, point in enumerate(result.ranked(), 1)
        if point.rate is not None and point.widened is not None
    ]  # fmt: skip
    if null is not None:
        rows.append((None, None, NULL, percent(null.win_rate), null.interval(), None, None))
    if rows:
        columns = ("place", "point", "change", "win rate", alone, together, "training pairs")
        yield Table("The points, the best first", columns, tuple(rows))
    failed = tuple((point.number, point.name, point.error) for point in result.failed())
    if failed:
        yield Table("Points that failed", ("point", "change", "error"), failed)


def _to_copy(best: PointResult, config: PipelineConfig) -> Iterator[tuple[str, str]]:
    """Yield the best point's configuration, for the form and for the command line; what it leaves out is default."""
    values = config.model_dump(mode="json", exclude_defaults=True)
    yield f"Configuration of point {best.number}", json.dumps(values, ensure_ascii=False, indent=2)
    argument = shlex.quote(f"config={json.dumps(values, ensure_ascii=False)}")
    yield "Promote it", f"prefect deployment run dpo-pipeline/local --param {argument}"


async def report_plan(plan: SweepPlan, points: Sequence[Point], sweep: SweepConfig, duplicates: int) -> None:
    """Show what the sweep is going to do and cost, in the log and as an artifact."""
    section = plan_section(plan, points, sweep, duplicates)
    logger.info("%s\n%s", section.summary, "\n".join(plan_lines(plan)))
    await publish(section)


async def report_sweep(result: SweepResult, points: Sequence[Point]) -> None:
    """Show the ranking, in the log and as an artifact, and write the pages of the sweep and of its points."""
    section = ranking_section(result, points)
    tables = (render_text_table([table.columns, *table.rows]) for table in section.tables)
    logger.info("%s\n%s", section.summary, "\n".join(tables))
    await publish(section)
    for advice in section.advice:
        logger.warning("%s", advice)
    workspace = points[0].config.workspace
    store, folder = Workspace(workspace), sweep_folder(workspace, result.key)
    made = [(point, found.made) for point, found in zip(points, result.points, strict=True) if found.made]
    manifests = gather_manifests(store, *(reference for _, run in made for reference in run.references()))
    is_priced = any(has_prices(point.config) for point in points)
    sections = [section, cost_section(add_up(manifests), is_priced), lineage_section(manifests, store.root)]
    store.write_bytes(f"{folder}/report.html", render_html("preflow: sweep", sections).encode())
    for point, run in made:
        uri = f"{folder}/point-{point.number}.html"
        if not store.exists(uri):
            page = render_html(f"preflow: point {point.number}, {point.name}", run_sections(point.config, run))
            store.write_bytes(uri, page.encode())
    logger.info("the pages of the sweep and of its points are in %s", folder)


def conclude(result: SweepResult, workspace: str) -> SweepResult | State[SweepResult]:
    """Return the result, as a state that says so where some points failed.

    Raises:
        PreflowError: all points failed.
    """
    failed = result.failed()
    if len(failed) == len(result.points):
        reasons = "\n".join(f"point {point.number} ({point.name}): {point.error}" for point in failed)
        raise PreflowError(f"all {len(failed)} points failed; what succeeded on the way is kept:\n{reasons}")
    if not failed:
        return result
    message = f"{len(result.ranking)} of {len(result.points)} points finished; the others failed, see the page"
    return Completed(name="Partial", message=f"{message} in {sweep_folder(workspace, result.key)}", data=result)
