"""What a sweep will do and cost: every piece of work once, with the points that share it and what is known already."""

from pydantic import BaseModel, ConfigDict

from tasks.config import SweepConfig
from tasks.errors import PreflowError

TRAINING = "train"


class Work(BaseModel):
    """One piece of work of a sweep, done once for all `points`; tokens, minutes and money are those still to come."""

    model_config = ConfigDict(frozen=True)

    stage: str
    who: str
    points: tuple[int, ...]
    requests: int = 0
    known: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    gpu_minutes: float = 0.0
    usd: float | None = 0.0
    finished: bool = False

    @property
    def to_ask(self) -> int:
        """Requests that are still to be sent."""
        return self.requests - self.known


class SweepPlan(BaseModel):
    """All work of a sweep, each piece once."""

    model_config = ConfigDict(frozen=True)

    work: tuple[Work, ...]

    def usd(self) -> float:
        """What the work still to come is estimated at, in US$; what has no price counts nothing."""
        return sum(work.usd or 0.0 for work in self.work)

    def unfinished_points(self) -> set[int]:
        """Return the points for which something is still to be done."""
        return {number for work in self.work if not work.finished for number in work.points}

    def trainings(self) -> list[Work]:
        """Return the trainings, finished ones too."""
        return [work for work in self.work if work.stage == TRAINING]


def check_budget(plan: SweepPlan, sweep: SweepConfig) -> None:
    """Refuse a sweep that is estimated over its budget.

    Raises:
        PreflowError: with both figures and what to do.
    """
    if sweep.budget_usd is not None and plan.usd() > sweep.budget_usd:
        dearest = max(plan.work, key=lambda work: work.usd or 0.0)
        raise PreflowError(
            f"the sweep is estimated at {plan.usd():.2f} US$, over sweep.budget_usd ({sweep.budget_usd:.2f}); the "
            f"dearest piece is {dearest.stage} ({dearest.who}) at {dearest.usd or 0:.2f}. Nothing was spent. Estimates "
            "are ceilings until the first figures are measured: raise budget_usd, or take fewer points or prompts."
        )
