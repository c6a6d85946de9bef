"""How long each phase of a training takes: said while it lasts, and kept for timing.json."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tasks.train.spec import Progress

LOG = logging.getLogger(__name__)

# Nobody doubts a program that is silent for ten seconds; then it speaks, ever more rarely, up to every five minutes.
FIRST_WORD_SECONDS = 10.0
RAREST_WORD_SECONDS = 300.0


class Phases:
    """The seconds that each phase took, by name.

    Args:
        tell: told from another thread, while a phase lasts, that it does.
    """

    def __init__(self, tell: Callable[[Progress], None]) -> None:
        self._tell = tell
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block; one that takes long says so."""
        started, done = time.monotonic(), threading.Event()
        watch = threading.Thread(target=self._watch, args=(name, started, done), name="phase", daemon=True)
        watch.start()
        try:
            yield
        finally:
            done.set()
            seconds = time.monotonic() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            if seconds > FIRST_WORD_SECONDS:
                LOG.info("%s took %.0f s", name, seconds)

    def _watch(self, name: str, started: float, done: threading.Event) -> None:
        pause = FIRST_WORD_SECONDS
        while not done.wait(pause):
            self._tell(Progress("loading", f"{name}, for {time.monotonic() - started:.0f} s so far"))
            pause = min(2 * pause, RAREST_WORD_SECONDS)
