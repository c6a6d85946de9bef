"""The pages of a sweep as sections: the plan before it, the ranking after it."""

import json
import logging
import re
import shlex
from collections.abc import Iterator, Sequence

from prefect.client.schemas.objects import State
from prefect.states import Completed

from tasks.batch.costs import add_up
from tasks.config import SweepConfig
from tasks.errors import PreflowError
from tasks.report.page import Cell, Picture, ReportSection, Table
from tasks.report.plots import RateBar, plot_rates
from tasks.report.render import render_html, render_text_table
from tasks.report.run import gather_manifests, has_prices, publish, run_sections
from tasks.report.sections import NULL, cost_section, lineage_section
from tasks.run.estimate import TRAINING, Plan
from tasks.run.estimate_page import how_estimated, money_text, number_ranges, plan_lines, work_table
from tasks.store.measures import percent
from tasks.store.workspace import Workspace
from tasks.sweep.points import Point
from tasks.sweep.ranking import SweepResult, sweep_folder

CAPTION = "Win rates; thick: the interval of each alone, thin: the one that holds for all points at once."
logger = logging.getLogger(__name__)


def plan_section(plan: Plan, points: Sequence[Point], sweep: SweepConfig, duplicates: int) -> ReportSection:
    """Show what a sweep is going to do and cost, before it does."""
    left_out = f" {duplicates} equal to another were left out." if duplicates else ""
    new = sum(not work.finished for work in plan.of(TRAINING).work)
    alone = sum(len(work.points) * work.requests for work in plan.work)
    summary = (
        f"{len(points)} points.{left_out} Still to come: {new} trainings and {plan.total().to_ask:,} requests, "
        f"{money_text(plan)}. One by one, the points would take {len(points)} trainings and {alone:,} requests."
    )
    changes = Table("Points", ("point", "change"), tuple((point.number, point.name) for point in points))
    tables = (work_table(plan, "What is to be done, each once for all its points"), changes)
    return ReportSection("Sweep plan", summary, tables=tables, notes=(how_estimated(sweep),))


def ranking_section(result: SweepResult, points: Sequence[Point]) -> ReportSection:
    """Show the points from the best down, and what the best one's configuration is."""
    ranked, best, count = result.ranked(), result.best(), len(result.points)
    if best is None or best.rate is None or best.widened is None:
        summary = f"None of the {count} points could be finished."
        return ReportSection("Sweep", summary, tuple(_advice(result)), tuple(_tables(result)))
    null = next((point.null for point in ranked if point.null), None)
    # Without the sections, "training.": there is room for little, and the number says which it is.
    names = {point.number: f"{point.number}. {re.sub(r'[a-z]+[.](?=[a-z_]+=)', '', point.name)}" for point in ranked}
    bars = [RateBar(names[point.number], point.rate, point.widened) for point in ranked if point.rate]
    part = "" if len(ranked) == count else f" of the {len(ranked)} that finished, out of {count}"
    # The best one's configuration, for the form and for the command line; what it leaves out is default.
    config = next(point.config for point in points if point.number == best.number)
    values = config.model_dump(mode="json", exclude_defaults=True)
    argument = shlex.quote(f"config={json.dumps(values, ensure_ascii=False)}")
    return ReportSection(
        title="Sweep",
        summary=(
            f"Best{part}: point {best.number} ({best.name}) wins {best.rate.text()} against the SFT adapter. The best "
            f"of {len(ranked)} looks better than it is, since chance had so many tries: the interval that holds for "
            f"all points at once is {best.widened.interval()} (each at {100 * result.widened_confidence:.2f} %, "
            f"together at least {100 * result.confidence:.3g} %; Sidak 1967)."
        ),
        advice=tuple(_advice(result)),
        tables=tuple(_tables(result)),
        pictures=(Picture(plot_rates(bars, RateBar(NULL, null) if null else None), CAPTION),),
        blocks=(
            (f"Configuration of point {best.number}", json.dumps(values, ensure_ascii=False, indent=2)),
            ("Promote it", f"prefect deployment run dpo-pipeline/local --param {argument}"),
        ),
    )


def _advice(result: SweepResult) -> Iterator[str]:
    ranked, best = result.ranked(), result.best()
    if failed := result.failed():
        numbers = number_ranges([point.number for point in failed])
        yield f"Points {numbers} failed, see the table; start the sweep again and only they are run."
    if len({point.evaluation_fingerprint for point in ranked}) > 1:
        yield (
            "The points were not all measured on the same prompts with the same settings and judge, so their win rates "
            "compare only roughly. Give eval_prompts that no training prompt is in, and sweep nothing of evaluation."
        )
    if best is None or best.widened is None:
        return
    if best.null is not None and not best.null.holds(0.5):
        yield (
            f"Two draws of the SFT adapter come out at {best.null.text()}, where it must be near 50 %: do not trust "
            "these win rates. Look at the judge's positions, and take more evaluation.num_samples."
        )
    second = ranked[1].widened if len(ranked) > 1 else None
    if second is not None and best.widened.lower <= second.upper:
        yield (
            f"The intervals of points {best.number} and {ranked[1].number} overlap: the sweep does not show which "
            "of them is better. More evaluation.num_samples or held-out prompts narrow them."
        )
    if best.widened.lower <= 0.5:
        yield "Not even the best point is surely better than the SFT adapter: promote none of them on these figures."
    elif best.proven is not None and best.proven <= 0.5:
        yield (
            f"Point {best.number} may have won by length alone: with length taken out, the lower bound that holds for "
            f"all points at once is {percent(best.proven)}. Say in judging.rubric that length does not count."
        )
    if result.declined:
        yield f"Point {best.number} is not served: {result.declined}"


def _tables(result: SweepResult) -> Iterator[Table]:
    alone, together = f"{100 * result.confidence:.3g} % interval", "interval for all at once"
    rows: list[tuple[Cell, ...]] = [
        (place, point.number, point.name, percent(point.rate.win_rate), point.rate.interval(), point.widened.interval(),
         point.made.preferences.rows if point.made else None)
        for place, point in enumerate(result.ranked(), 1)
        if point.rate is not None and point.widened is not None
    ]  # fmt: skip
    if null := next((point.null for point in result.ranked() if point.null), None):
        interval = f"{null.interval()} ({percent(null.confidence, '.3g')})"
        rows.append((None, None, NULL, percent(null.win_rate), interval, None, None))
    columns = ("place", "point", "change", "win rate", alone, together, "training pairs")
    failed = tuple((point.number, point.name, point.error) for point in result.failed())
    tables = (("The points, the best first", columns, tuple(rows)),
              ("Points that failed", ("point", "change", "error"), failed))  # fmt: skip
    yield from (Table(*table) for table in tables if table[2])


async def report_plan(plan: Plan, points: Sequence[Point], sweep: SweepConfig, duplicates: int) -> None:
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
        uri, promotion = f"{folder}/point-{point.number}.html", result.promotion
        is_served = promotion is not None and promotion.adapter_sha256 == run.adapter.sha256
        declined = result.declined if point.number == result.ranking[0] else None
        if is_served or declined or not store.exists(uri):
            why = declined or "a sweep promotes no point by itself"
            became = {"promotion": promotion} if is_served else {"declined": why}
            sections = run_sections(point.config, run.model_copy(update=became))
            page = render_html(f"preflow: point {point.number}, {point.name}", sections)
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
