"""SIGTERM as a flag that the trainer looks at between two micro-batches."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

LOG = logging.getLogger(__name__)


class StopTraining(BaseException):
    """The trainer was asked to stop. A BaseException: no library's `except Exception` may swallow it."""


class StopFlag:
    """Set by SIGTERM or SIGINT, by the heartbeat of a lost lease, or by the death of the parent.

    Until training begins there is nothing to save, so a signal raises at once; inside `deferred()` it only sets the
    flag, and `check()` raises.
    """

    def __init__(self) -> None:
        self._set = threading.Event()
        self._reason = "asked to stop"
        self._deferred = False

    def install(self) -> None:
        """Take over SIGTERM and SIGINT; to be called in the main thread."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self._set.is_set()
        self._set.set()
        if not again and not self._deferred:
            raise StopTraining(f"{signal.Signals(number).name} before training began")

    @property
    def is_set(self) -> bool:
        """Whether the trainer was asked to stop."""
        return self._set.is_set()

    def set(self, reason: str = "asked to stop") -> None:
        """Ask the trainer to stop, if nobody has; from any thread."""
        if not self._set.is_set():
            self._reason = reason
        self._set.set()

    def check(self) -> None:
        """Raise `StopTraining` if the trainer was asked to stop."""
        if self._set.is_set():
            raise StopTraining(self._reason)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let signals only set the flag while this block runs, and after it."""
        self._deferred = True
        self.check()
        yield
