"""What making an artifact has cost: kept for each attempt, so that a budget holds over all of them."""

import logging
import time
import uuid
from collections import defaultdict
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from tasks.config import EndpointConfig
from tasks.errors import PreflowError
from tasks.ledger import Spent, StageCost, format_seconds, format_usd
from tasks.storage import Workspace
from tasks.wire import Usage

ConfigT = TypeVar("ConfigT", bound=EndpointConfig)
logger = logging.getLogger(__name__)


class Attempt(BaseModel):
    """What one process used of one model for an artifact, failed requests and lost answers included."""

    model_config = ConfigDict(frozen=True)

    model: str
    usage: Usage = Usage()
    usd: float = 0.0
    seconds: float = 0.0


class Spending:
    """The attempts at one artifact with one model: one small file each, in the artifact's folder."""

    def __init__(self, workspace: str, folder: str, model: str) -> None:
        self._store, self._folder, self._model = Workspace(workspace), f"{folder}/attempts", model
        self._uri = f"{self._folder}/{uuid.uuid4().hex}.json"
        self._start = time.monotonic()
        self.earlier = sum(a.usd for a in read_attempts(self._store, self._folder) if a.model == model)

    def note(self, usage: Usage, usd: float) -> None:
        """Write down what this process has used so far."""
        seconds = round(time.monotonic() - self._start, 3)
        attempt = Attempt(model=self._model, usage=usage, usd=round(usd, 9), seconds=seconds)
        self._store.write_json(self._uri, attempt.model_dump())

    def left_of(self, config: ConfigT) -> ConfigT:
        """Return `config` with what earlier attempts have left of its budget.

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


def read_attempts(store: Workspace, folder: str) -> list[Attempt]:
    """Return the attempts that were noted in a folder."""
    return [Attempt.model_validate(store.read_json(uri)) for uri in store.list(folder)]


def write_cost(store: Workspace, folder: str, stage: str, rows: Spent) -> StageCost:
    """Write `cost.json`: what the attempts at an artifact used, and what its rows had cost before them.

    Args:
        store: the workspace.
        folder: the artifact's folder.
        stage: the stage's name in the ledger.
        rows: what all rows of the artifact cost, whoever made them.
    """
    attempts = read_attempts(store, f"{folder}/attempts")
    used = sum((Spent(**attempt.usage.model_dump(), usd=attempt.usd) for attempt in attempts), Spent())
    saved = {name: max(0, value - getattr(used, name)) for name, value in rows.model_dump().items()}
    by_model: dict[str, float] = defaultdict(float)
    for attempt in attempts:
        by_model[attempt.model] += attempt.seconds
    # Judges of a panel work side by side.
    seconds = max(by_model.values(), default=0.0)
    cost = StageCost(stage=stage, used=used, cached=Spent(**saved), seconds=seconds)
    store.write_json(f"{folder}/cost.json", cost.model_dump())
    return cost


def log_cost(cost: StageCost) -> None:
    """Say what a stage has used, and what the rows that were known before had cost."""
    tokens = [spent.prompt_tokens + spent.completion_tokens for spent in (cost.used, cost.cached)]
    logger.info(
        "%s: %s requests, %s tokens, %s US$ in %s; rows known before saved %s tokens, %s US$",
        cost.stage, f"{cost.used.requests:,}", f"{tokens[0]:,}", format_usd(cost.used.usd),
        format_seconds(cost.seconds), f"{tokens[1]:,}", format_usd(cost.cached.usd),
    )  # fmt: skip


def price(usage: dict[str, int], config: EndpointConfig) -> Spent:
    """Return what `usage` costs at the prices of `config`."""
    return Spent.of_usage(Usage(**usage), config)
