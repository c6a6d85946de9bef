"""Stand-ins for what costs money or is not here; all of them speak HTTP."""

from tests.fakes.process import FakeOpenAI

__all__ = ["FakeOpenAI"]
