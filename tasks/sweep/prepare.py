"""What is checked before a sweep spends anything: the points by their files, then the endpoints that are needed."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tasks.batch import leaving
from tasks.config import ChatSettings, PipelineConfig, SweepConfig
from tasks.errors import PreflowError
from tasks.run.estimate import Plan
from tasks.run.preflight import Asked, input_checks, service_checks
from tasks.store.workspace import Workspace, digest, server_path
from tasks.sweep.points import Point, expand_points
from tasks.sweep.ranking import point_keys

# The settings that `input_checks`, or `_check_files` itself, look at: of points with equal ones the first is checked.
CHECKED: Mapping[str, bool | set[str]] = {
    "prompts": True,
    "eval_prompts": True,
    "judging": {"rubric", "val_ratio", "seed"},
    "training": {"base_model", "base_revision", "sft_adapter", "max_length", "router_aux_loss_coef", "report_to",
                 *ChatSettings.model_fields},
    "training_deployment": True,
    "evaluation": {"checkpoints", "max_prompts", "seed", "adapter_root"},
}  # fmt: skip


class Points(NamedTuple):
    """All points of a sweep, numbered from 1, and how many were left out as equal to one of them."""

    points: tuple[Point, ...]
    duplicates: int


def prepare_points(config: PipelineConfig, sweep: SweepConfig) -> Points:
    """Return the points, checked as far as that goes without asking anybody; points of equal content count once.

    Raises:
        PreflowError: naming the point, what is wrong, and what to do.
    """
    if config.approve_before:
        raise PreflowError(
            "config.approve_before: a sweep does not wait for a person at every point. Leave it empty, and let "
            "sweep.budget_usd say what may be spent"
        )
    if config.completions or config.preferences:
        raise PreflowError("a sweep samples and judges: leave config.completions and config.preferences empty")
    expanded = expand_points(config, sweep)
    Workspace(config.workspace).check_writable()
    by_files, distinct = dict[str, Point](), dict[str, Point]()
    for point in expanded:
        by_files.setdefault(digest(point.config.model_dump(mode="json", include=CHECKED)), point)
    for point in by_files.values():
        _check_files(point)
    for key, point in zip(point_keys(expanded), expanded, strict=True):
        distinct.setdefault(key, point)
    points = tuple(point.model_copy(update={"number": number}) for number, point in enumerate(distinct.values(), 1))
    return Points(points=points, duplicates=len(expanded) - len(points))


def _check_files(point: Point) -> None:
    config = point.config
    try:
        for check in input_checks(config):
            check()
        # vLLM must see the new adapters: better said before the first training than after it.
        server_path(Workspace(config.workspace).uri("training"), config.workspace, config.evaluation.adapter_root)
    except PreflowError as error:
        raise PreflowError(f"point {point.number} ({point.name}): {error}") from error


def check_budget(plan: Plan, sweep: SweepConfig) -> None:
    """Refuse a sweep that is estimated over its budget.

    Raises:
        PreflowError: with both figures and what to do.
    """
    usd = plan.total().usd or 0.0
    if sweep.budget_usd is not None and usd > sweep.budget_usd:
        dearest = max(plan.work, key=lambda work: work.usd or 0.0)
        raise PreflowError(
            f"the sweep is estimated at {usd:.2f} US$, over sweep.budget_usd ({sweep.budget_usd:.2f}); the "
            f"dearest piece is {dearest.stage} ({dearest.who}) at {dearest.usd or 0:.2f}. Nothing was spent. Estimates "
            "come from limits until the first figures are measured: raise budget_usd, or take fewer points or prompts."
        )


async def find_unready(points: Sequence[Point], plan: Plan) -> dict[int, PreflowError]:
    """Ask the models of every point that is not finished, each once, and return why some cannot run, by their numbers.

    Raises:
        PreflowError: no point can run.
    """
    if leaving.has_left():
        return {}
    unfinished = plan.points(unfinished=True)
    asked: Asked = {}
    unready: dict[int, PreflowError] = {}
    for point in points:
        if point.number in unfinished:
            try:
                for check in service_checks(point.config, asked):
                    await check()
            except PreflowError as error:
                unready[point.number] = error
    if unready and len(unready) == len(points):
        raise next(iter(unready.values()))
    return unready


def trainings_at_once(points: Sequence[Point], sweep: SweepConfig) -> int:
    """Return how many points may be under way: local trainings share this machine, so then it is one."""
    elsewhere = all(point.config.training_deployment is not None for point in points)
    return sweep.parallel if elsewhere else 1
