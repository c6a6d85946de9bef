"""A sweep over settings."""

from typing import Any, Literal

from pydantic import Field

from tasks.config.base import MaybeLocation, Schema, StageConfig, secrets_by_name


def _in_lists(schema: Schema) -> Schema:
    """Return the JSON schema of an object as one whose every value is a list."""
    named = {name: {**values, "type": "array"} for name, values in schema["patternProperties"].items()}
    return {"patternProperties": named, "additionalProperties": {**schema["additionalProperties"], "type": "array"}}


Preset = Literal["beta", "judge", "completions", "temperature", "more_data", "epochs", "warmup"]


class SweepConfig(StageConfig):
    """What a sweep varies and where its limits are. Presets, grid and changes are added up; equal points run once."""

    presets: tuple[Preset, ...] = ()
    """Ready-made points, each against the configuration as it is, which runs as a point too."""
    grid: dict[str, list[Any]] = Field({}, json_schema_extra=_in_lists(secrets_by_name()))
    """Values by dotted name, e.g. {"training.beta": [0.05, 0.1]}; every combination is a point."""
    changes: list[dict[str, Any]] = Field([], json_schema_extra={"items": {**secrets_by_name(), "type": "object"}})
    """One point each, e.g. {"training.num_train_epochs": 3, "training.learning_rate": 1e-6}; {} is the configuration as
    it is."""
    stronger_judge: str | None = Field(None, min_length=1)
    """For the preset judge: a model at the judge's endpoint, such as a larger one."""
    more_prompts: MaybeLocation = None
    """For the preset more_data: a larger prompts file (JSONL); prompts that are in the first too cost nothing again."""
    max_points: int = Field(24, title="Points, at most", ge=1, le=1000)
    """A sweep of more points is refused."""
    budget_usd: float | None = Field(None, gt=0, title="Budget of the sweep (US$)")
    """A sweep whose estimate is higher, in US$, is refused; empty: no limit."""
    gpu_price: float = Field(0.0, ge=0, title="GPU price (US$ an hour)")
    """Price of a GPU hour for training, in US$ (a spot L4: 0.3-0.4); 0: not counted."""
    pairs_per_second: float = Field(1.14, gt=0)
    """Pairs trained a second, for the estimate; 1.14 is published for a 3B model on an L4."""
    parallel: int = Field(1, ge=1, le=64)
    """Trainings at once, where the configuration trains through a deployment."""
    promote_best: bool = False
    """Promote the best point if its interval, widened for the number of points, is over the bar."""
