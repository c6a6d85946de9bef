"""Many settings against each other: every point a run of the pipeline, every stage done once for all that share it."""

from prefect import flow
from prefect.client.schemas.objects import State

from flows.pipeline import improve, promote_if_better
from tasks.batch.leaving import sharing_endpoints
from tasks.batch.shards import settle
from tasks.config import PipelineConfig, SweepConfig
from tasks.run.estimate import plan_runs
from tasks.run.names import named
from tasks.store.workspace import PipelineResult
from tasks.sweep.page import conclude, report_plan, report_sweep
from tasks.sweep.points import Point
from tasks.sweep.prepare import check_budget, find_unready, prepare_points, trainings_at_once
from tasks.sweep.ranking import SweepResult, attempt, find_sweep, rank, record_sweep, winner


@flow(name="dpo-sweep", flow_run_name=named("{config.promotion.name}: sweep, {now:%d %b %H:%M}"))
async def dpo_sweep(config: PipelineConfig, sweep: SweepConfig) -> SweepResult | State[SweepResult]:
    """Run the pipeline at every point of a sweep, without promoting, and show which setting wins and how surely.

    Args:
        config: What dpo-pipeline takes; the points change it.
        sweep: What to vary, and what may be spent.
    """
    points, duplicates = prepare_points(config, sweep)
    result = find_sweep(points)
    if result is None:
        result = await run_points(points, sweep, duplicates)
        record_sweep(result, config.workspace)
    best = winner(result, points) if sweep.promote_best else None
    if best is not None:
        served = await promote_if_better(best[1], best[0].config)
        result = result.model_copy(update={"promotion": served.promotion, "declined": served.declined})
    await report_sweep(result, points)
    return conclude(result, config.workspace)


async def run_points(points: tuple[Point, ...], sweep: SweepConfig, duplicates: int) -> SweepResult:
    """Show what the points will cost, run those that can run, and rank them."""
    plan = plan_runs([point.config for point in points], sweep)
    await report_plan(plan, points, sweep, duplicates)
    check_budget(plan, sweep)
    unready = await find_unready(points, plan)
    at_once = trainings_at_once(points, sweep)
    async with sharing_endpoints(at_once):
        runs = (attempt(point, run_point, unready.get(point.number)) for point in points)
        return rank(points, await settle(runs, at_once))


@flow(name="sweep-point", flow_run_name="point {point.number}: {point.name}")
async def run_point(point: Point) -> PipelineResult:
    """Run the pipeline at one point, up to its win rate."""
    return await improve(point.config)
