"""What a sweep shows: its plan before it starts, and at its end the ranking, as artifacts and as pages to keep."""

import logging
from collections.abc import Sequence

from prefect.client.schemas.objects import State
from prefect.states import Completed

from tasks.config import SweepConfig
from tasks.errors import PreflowError
from tasks.report import add_up, gather_manifests, publish, run_sections
from tasks.reporting import cost_section, lineage_section, render_html, render_text_table
from tasks.storage import Workspace
from tasks.sweeping.plan import SweepPlan
from tasks.sweeping.points import Point
from tasks.sweeping.results import SweepResult, sweep_folder
from tasks.sweeping.sections import plan_section, ranking_section

logger = logging.getLogger(__name__)


async def report_plan(plan: SweepPlan, points: Sequence[Point], sweep: SweepConfig, duplicates: int) -> None:
    """Show what the sweep is going to do and cost, in the log and as an artifact."""
    section = plan_section(plan, points, sweep, duplicates)
    logger.info("%s\n%s", section.summary, "\n".join(_text(table.columns, table.rows) for table in section.tables))
    await publish(section)


async def report_sweep(result: SweepResult, points: Sequence[Point]) -> None:
    """Show the ranking, in the log and as an artifact, and write the pages of the sweep and of its points."""
    section = ranking_section(result, points)
    logger.info("%s\n%s", section.summary, "\n".join(_text(table.columns, table.rows) for table in section.tables))
    for advice in section.advice:
        logger.warning("%s", advice)
    await publish(section)
    workspace = points[0].config.workspace
    store, folder = Workspace(workspace), sweep_folder(workspace, result.key)
    made = [(point, found.made) for point, found in zip(points, result.points, strict=True) if found.made]
    manifests = gather_manifests(store, *(run for _, run in made))
    sections = [section, cost_section(add_up(store, manifests)), lineage_section(manifests, store.root)]
    store.write_bytes(f"{folder}/report.html", render_html("preflow: sweep", sections).encode())
    for point, run in made:
        uri = f"{folder}/point-{point.number}.html"
        if not store.exists(uri):
            page = render_html(f"preflow: point {point.number}, {point.name}", run_sections(point.config, run))
            store.write_bytes(uri, page.encode())
    logger.info("the pages of the sweep and of its points are in %s", folder)


def _text(columns: Sequence[str], rows: Sequence[Sequence[str | int | float | bool | None]]) -> str:
    return render_text_table([columns, *rows])


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
