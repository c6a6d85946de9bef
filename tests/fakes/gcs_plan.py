"""The seeded plan of a faulty bucket: which attempt at which request goes wrong, and how."""

import hashlib
from collections.abc import Mapping
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from tests.fakes.plan import pick

Fault = Literal[
    "unavailable",  # 503
    "error_500",
    "rate_limit",  # 429 with Retry-After
    "slow",  # answered after `slow_seconds`
    "cut_upload",  # connection reset after half of the upload; nothing is stored
    "cut_download",  # connection reset after half of the content
    "lost_reply",  # done, but the connection is reset before the answer
]
FAULTS = get_args(Fault)
# Faults that only make sense for some operations.
ONLY_FOR: dict[str, tuple[str, ...]] = {"cut_upload": ("upload",), "cut_download": ("download",)}


class GcsPlan(BaseModel):
    """All that a faulty bucket does; the defaults are a healthy, instant one.

    Faults are shares of attempts (name: probability). Which attempt is hit depends only on `seed`, the operation, the
    object and how often that has been tried before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    faults: Mapping[Fault, float] = {}
    max_faults: int = 3  # in a row; then the request is served
    latency_ms: float = 0.0
    slow_seconds: float = 1.0
    retry_after: int = 1

    def fault(self, operation: str, name: str, attempt: int, in_a_row: int) -> str | None:
        """Return what goes wrong at the `attempt`-th (from 0) attempt, or None."""
        if not self.faults or in_a_row >= self.max_faults or operation in ("bucket", "other"):
            return None
        shares = {name: share for name, share in self.faults.items() if operation in ONLY_FOR.get(name, (operation,))}
        digest = hashlib.sha256(f"{self.seed}:{operation}:{name}:{attempt}".encode()).digest()
        return pick(shares, int.from_bytes(digest[:8], "big") / 2**64)
