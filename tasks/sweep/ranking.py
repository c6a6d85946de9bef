"""What came of a sweep's points: their win rates, who is best and how sure that is, and the result that is kept."""

import logging
from collections.abc import Awaitable, Callable, Sequence

from pydantic import BaseModel

from tasks.errors import PreflowError
from tasks.evaluate.comparisons import length_controlled, read_comparison, win_rate
from tasks.run.stages import fingerprint
from tasks.store.measures import Evaluation, WinRate
from tasks.store.workspace import PipelineResult, PromotionRef, Workspace, digest, stage_key
from tasks.sweep.points import Change, Point

VERSION = 2
logger = logging.getLogger(__name__)


class PointResult(BaseModel, frozen=True):
    """What came of one point: what it made and how often that won, or the error it ended with.

    `widened` is the interval that holds for all points of the sweep at once, and `proven` its lower bound or that with
    length taken out, the lower one; `null` is SFT against itself; `evaluation_fingerprint` is the digest of what the
    win rate was measured with: prompts, sampling settings and judge.
    """

    number: int
    change: Change
    name: str
    made: PipelineResult | None = None
    error: str | None = None
    rate: WinRate | None = None
    widened: WinRate | None = None
    proven: float | None = None
    null: WinRate | None = None
    evaluation_fingerprint: str | None = None


class SweepResult(BaseModel, frozen=True):
    """A sweep's points in their order, and the numbers of those that finished, the best first."""

    key: str
    points: tuple[PointResult, ...]
    ranking: tuple[int, ...]
    confidence: float
    widened_confidence: float
    promotion: PromotionRef | None = None
    declined: str | None = None

    def ranked(self) -> list[PointResult]:
        """Return the points that finished, the best first."""
        return [self.points[number - 1] for number in self.ranking]

    def failed(self) -> list[PointResult]:
        """Return the points that did not finish."""
        return [point for point in self.points if point.made is None]

    def best(self) -> PointResult | None:
        """Return the point with the highest win rate; None if none finished."""
        return self.points[self.ranking[0] - 1] if self.ranking else None


async def attempt(
    point: Point, run: Callable[[Point], Awaitable[PipelineResult]], unready: PreflowError | None
) -> PointResult:
    """Run one point, and keep its error if it fails: the others go on. `unready` is why it cannot run at all."""
    about = {"number": point.number, "change": point.change, "name": point.name}
    try:
        if unready is not None:
            raise unready
        return PointResult(**about, made=await run(point))
    except Exception as error:
        logger.warning("point %d (%s) failed; the others go on", point.number, point.name, exc_info=True)
        text = str(error) if isinstance(error, PreflowError) else f"{type(error).__name__}: {error}"
        return PointResult(**about, error=text)


def rank(points: Sequence[Point], results: Sequence[PointResult]) -> SweepResult:
    """Measure the points that finished, each with the interval of its own and the one that holds for all at once.

    The best of k looks better than it is, since chance had k tries. With the confidence of each interval raised to
    (1 - alpha)^(1/k), all of them cover together with at least 1 - alpha, the winner's too, also when they are
    correlated as here (they share the SFT draw): Sidak, "Rectangular Confidence Regions for the Means of Multivariate
    Normal Distributions", JASA 1967.
    """
    store = Workspace(points[0].config.workspace)
    confidence = points[0].config.evaluation.confidence
    widened = sidak(confidence, sum(result.made is not None for result in results))
    by_number = {point.number: point for point in points}
    measured = tuple(_measure(store, by_number[result.number], result, widened) for result in results)
    finished = [(point.rate.win_rate, -point.number) for point in measured if point.rate]
    ranking = tuple(-number for _, number in sorted(finished, reverse=True))
    return SweepResult(
        key=sweep_key(points), points=measured, ranking=ranking, confidence=confidence, widened_confidence=widened
    )


def sidak(confidence: float, intervals: int) -> float:
    """Return the confidence of each of `intervals` intervals that makes all of them hold together with `confidence`."""
    return float(confidence ** (1 / max(1, intervals)))


def _measure(store: Workspace, point: Point, result: PointResult, widened: float) -> PointResult:
    if result.made is None:
        return result
    evaluation = point.config.evaluation
    found = Evaluation.model_validate(store.read_json(result.made.evaluation.uri))
    judges = {judge.model for judge in evaluation.null_judge().judges()}
    rows = store.read_rows(result.made.evaluation.sibling("comparisons.jsonl"))
    comparisons = [read_comparison(row, judges) for row in rows]
    raw, controlled = win_rate(comparisons, widened), length_controlled(comparisons, widened)
    sampled = evaluation.generation.identity() if evaluation.generation else None
    judge = evaluation.comparison_judge().verdict_identity()
    prompts = sorted({one.prompt for one in comparisons})
    return result.model_copy(
        update={
            "rate": WinRate.model_validate(found.model_dump()),
            "widened": raw,
            "proven": min(raw.lower, controlled.lower),
            "null": found.null,
            "evaluation_fingerprint": digest([prompts, evaluation.num_samples, evaluation.seed, sampled, judge])[:16],
        }
    )


def point_keys(points: Sequence[Point]) -> list[str]:
    """Return what determines each point's outcome, by content: points with equal keys come out the same."""
    return [stage_key("point", VERSION, **fingerprint(point.config)) for point in points]


def sweep_key(points: Sequence[Point]) -> str:
    """Return the content key of a sweep: of its points, in their order."""
    return stage_key("sweep", VERSION, points=point_keys(points))


def sweep_folder(workspace: str, key: str) -> str:
    """Return where a sweep's result and pages lie."""
    return Workspace(workspace).uri("sweeps", key)


def find_sweep(points: Sequence[Point]) -> SweepResult | None:
    """Return the result of an equal sweep, if all its points finished and everything they made is still intact."""
    store = Workspace(points[0].config.workspace)
    result = store.read_kept(f"{sweep_folder(store.root, sweep_key(points))}/result.json", SweepResult)
    if result is None or result.failed():
        return None
    made = [ref for point in result.points if point.made for ref in point.made.references()]
    return result if all(store.is_intact(ref) for ref in dict.fromkeys(made)) else None


def record_sweep(result: SweepResult, workspace: str) -> None:
    """Keep a sweep's result under its key."""
    uri = f"{sweep_folder(workspace, result.key)}/result.json"
    Workspace(workspace).write_json(uri, result.model_dump(mode="json", exclude={"promotion", "declined"}))


def winner(result: SweepResult, points: Sequence[Point]) -> tuple[Point, PipelineResult] | None:
    """Return the best point and what it made, if the interval widened for all points is over the bar."""
    best = result.best()
    if best is None or best.made is None or best.proven is None:
        return None
    point = next(point for point in points if point.number == best.number)
    bar = point.config.promotion.min_win_rate
    if best.proven > bar:
        return point, best.made
    logger.info(
        "not promoted: the best point's lower bound, widened for %d points, is %.3f, which is not over %.3f",
        len(result.ranking), best.proven, bar,
    )  # fmt: skip
    return None
