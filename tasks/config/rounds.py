"""Several rounds, each from what the round before has learned."""

from typing import Literal

from pydantic import Field

from tasks.config.base import StageConfig


class RoundsConfig(StageConfig):
    """How many rounds, and where each begins."""

    rounds: int = Field(2, ge=1, le=10)
    """Rounds, at most: it ends by itself with one that does not win against the last."""
    start: Literal["sft", "previous"] = "sft"
    """Adapter that each round's training begins with and is held to as reference: sft, the SFT adapter; previous, the
    adapter that the round before made, which goes further and may go astray."""
