"""The whole pipeline on this machine, offline: an invented world, a model of its own, and a judge made of rules."""

from typing import Literal, TypeAlias

DemoModel: TypeAlias = Literal["tiny", "smollm2"]
TINY: DemoModel = "tiny"
SMOLLM2: DemoModel = "smollm2"
