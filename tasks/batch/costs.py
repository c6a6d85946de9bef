"""What a run used and cost, stage by stage, and what the cache saved."""

import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable
from typing import TypeVar

from pydantic import BaseModel, Field

from tasks.config import EndpointConfig
from tasks.errors import PreflowError
from tasks.store.workspace import Cost, Manifest, Workspace

COLUMNS = ("stage", "requests", "prompt tokens", "completion tokens", "thinking tokens", "GPU", "time", "US$")


class StageCost(BaseModel, frozen=True, extra="forbid"):
    """One stage: what it used, what rows that others had paid for saved, and its wall-clock seconds."""

    stage: str = Field(min_length=1)
    used: Cost = Cost()
    cached: Cost = Cost()
    seconds: float = Field(0.0, ge=0)

    def row(self) -> tuple[str | int | None, ...]:
        """Return what was used as cells under `COLUMNS`."""
        used = self.used
        counts = (used.requests, used.prompt_tokens, used.completion_tokens, used.thinking_tokens)
        gpu = format_seconds(used.gpu_seconds) if used.gpu_seconds else None
        usd = format_usd(used.usd) if used.usd else None
        return (self.stage, *(count or None for count in counts), gpu, format_seconds(self.seconds), usd)


def add_up(manifests: Iterable[Manifest]) -> list[StageCost]:
    """Return what artifacts cost to make, whichever run made them, by stage; the last one is the total."""
    stages: dict[str, StageCost] = {}
    for made in manifests:
        if made.cost != Cost() or made.seconds:
            before = stages.get(made.stage, StageCost(stage=made.stage))
            used, seconds = before.used + made.cost, before.seconds + made.seconds
            stages[made.stage] = StageCost(stage=made.stage, used=used, seconds=seconds)
    used, seconds = sum((one.used for one in stages.values()), Cost()), sum(one.seconds for one in stages.values())
    return [*stages.values(), StageCost(stage="total", used=used, seconds=seconds)]


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it: 8.4 s, 3 min 20 s, 2 h 05 min."""
    if round(seconds) < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_usd(usd: float) -> str:
    """Return US$ with two decimals, or with two significant digits where that would hide them."""
    return f"{usd:,.2f}" if usd >= 0.1 or usd == 0 else f"{usd:.2g}" if usd >= 1e-4 else "< 0.0001"


ConfigT = TypeVar("ConfigT", bound=EndpointConfig)
logger = logging.getLogger(__name__)


class CostLog:
    """What was used for one artifact of one model: a small file for each process, in the artifact's folder.

    Failed requests and lost answers are in it too.
    """

    def __init__(self, workspace: str, folder: str, model: str) -> None:
        self._store, self.folder, self._model = Workspace(workspace), folder, model
        self._uri = f"{folder}/attempts/{uuid.uuid4().hex}.json"
        self._start = time.monotonic()
        self.earlier = sum(cost.usd for of, cost, _ in read_log(self._store, folder) if of == model)

    def note(self, used: Cost) -> None:
        """Write down what this process has used so far."""
        seconds = round(time.monotonic() - self._start, 3)
        self._store.write_json(self._uri, {"model": self._model, "cost": used.model_dump(), "seconds": seconds})

    def left_of(self, config: ConfigT) -> ConfigT:
        """Return `config` with what earlier processes have left of its budget.

        Raises:
            PreflowError: they have left nothing.
        """
        if config.budget_usd is None or not self.earlier:
            return config
        left = config.budget_usd - self.earlier
        if left <= 0:
            raise PreflowError(
                f"budget_usd is {config.budget_usd:.4g} US$ for {config.model}, and earlier attempts at this stage "
                f"have cost {self.earlier:.4g}. Everything answered is kept: raise budget_usd and run again to go on."
            )
        return config.model_copy(update={"budget_usd": left})


def read_log(store: Workspace, folder: str) -> list[tuple[str, Cost, float]]:
    """Return what was noted for the artifact in a folder: model, cost and seconds of each process."""
    noted = map(store.read_json, store.list(f"{folder}/attempts"))
    return [(str(one["model"]), Cost.model_validate(one["cost"]), float(one["seconds"])) for one in noted]


def write_manifest(store: Workspace, made: Manifest) -> None:
    """Write the manifest of what was paid for, and `cost.json`: what all attempts used, and what others had paid.

    The cost in `made` is that of all rows, whoever paid for them.
    """
    folder = made.artifact.folder
    noted = read_log(store, folder)
    used = sum((cost for _, cost, _ in noted), Cost())
    saved = Cost(**{name: max(0, value - getattr(used, name)) for name, value in made.cost.model_dump().items()})
    by_model: dict[str, float] = defaultdict(float)
    for model, _, seconds in noted:
        by_model[model] += seconds
    # Judges of a panel work at the same time.
    stage = StageCost(stage=made.stage, used=used, cached=saved, seconds=max(by_model.values(), default=0.0))
    store.write_json(f"{folder}/cost.json", stage.model_dump())
    together = ", all attempts together" if len(noted) > 1 else ""
    logger.info("%s: %s in %s%s", made.stage, _used(used), format_seconds(stage.seconds), together)
    if saved.requests:
        logger.info("%s: rows that other runs have paid for saved %s", made.stage, _used(saved))
    store.write_manifest(made.model_copy(update={"seconds": stage.seconds}))


def _used(cost: Cost) -> str:
    usd = f", {format_usd(cost.usd)} US$" if cost.usd else ""
    return f"{cost.requests:,} requests, {cost.prompt_tokens + cost.completion_tokens:,} tokens{usd}"


def say_prices(config: EndpointConfig) -> str:
    """Return the prices of a model's tokens, for a log line."""
    if not (config.prompt_price or config.completion_price):
        return "no prices set: its cost is not counted"
    half = ", half of that in a batch" if getattr(config, "batch", False) else ""
    return f"{config.prompt_price:g} and {config.completion_price:g} US$ a million prompt and completion tokens{half}"
