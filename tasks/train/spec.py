"""What the training child is told, and what it tells; no torch here."""

import os
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeAlias

from pydantic import BaseModel

from tasks.config import TrainingConfig
from tasks.store.workspace import PreferencesRef

STAGE_VERSION = 4
# A row of metrics.jsonl: the step and epoch, and what TRL logs, by its names.
MetricsRow: TypeAlias = dict[str, Any]


class ExitCode(IntEnum):
    """How the training child ends."""

    DONE = 0
    DEFECT = 1
    USER_ERROR = 2
    INVARIANT = 42
    PREEMPTED = 75


def is_main_process() -> bool:
    """Tell whether this is the process that writes; the launcher numbers them in RANK."""
    return os.environ.get("RANK", "0") == "0"


def kept_steps(total: int, checkpoints: int) -> list[int]:
    """Return the steps before the last of `total` whose adapters are kept, so that there are `checkpoints` in all."""
    return sorted({total * number // checkpoints for number in range(1, checkpoints)} - {0})


class TrainingSpec(BaseModel, frozen=True, extra="forbid"):
    """One training: everything the child needs to know."""

    preferences: PreferencesRef
    workspace: str
    training: TrainingConfig
    key: str
    sft_sha256: str
    base_sha256: str


@dataclass(frozen=True)
class Progress:
    """One sign of life of the trainer: optimizer steps done and in all (0: not known yet), and the newest readings.

    `phase` is waiting, loading, reference, training, evaluating or saving; `message` says more where there is more.
    """

    phase: str
    message: str = ""
    step: int = 0
    total: int = 0
    loss: float | None = None
    accuracy: float | None = None
    margin: float | None = None
    pairs_per_second: float | None = None
    eta_seconds: float | None = None

    def text(self) -> str:
        """Return one line for the terminal."""
        is_told = self.message or (self.phase == "training" and self.total)
        parts = ["" if is_told else self.phase, f"step {self.step}/{self.total}" if self.total else "", self.message]
        # At the start policy and reference are equal: there is no margin, and an accuracy of 0 would look broken.
        named = {"loss": self.loss} | ({"accuracy": self.accuracy, "margin": self.margin} if self.margin else {})
        parts += [f"{name} {value:.4f}" for name, value in named.items() if value is not None]
        if self.pairs_per_second is not None:
            parts.append(f"{self.pairs_per_second:.2f} pairs/s")
        if self.eta_seconds is not None:
            parts.append(f"{self.eta_seconds:.0f} s left")
        return ", ".join(part for part in parts if part)
