"""The points of a sweep: presets, a grid and single changes, each a whole and valid configuration of the pipeline."""

import difflib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, get_args

from pydantic import BaseModel, JsonValue, ValidationError

from tasks.config import ChatSettings, PipelineConfig, Preset, StageConfig, SweepConfig
from tasks.errors import PreflowError

# Dotted parameter names with their values.
Change: TypeAlias = dict[str, JsonValue]

# What all points have in common: stages are shared through the workspace, and no point is promoted by itself.
SHARED = ("workspace", "promotion")
# Above this a grid is refused without being multiplied out.
MOST_COMBINATIONS = 10_000
PROBLEMS_SHOWN = 10
EXAMPLE = '{"training.beta": [0.05, 0.1]}'


class Point(BaseModel, frozen=True):
    """One run of a sweep: what it changes, and the whole configuration that comes of it."""

    number: int
    change: Change
    config: PipelineConfig

    @property
    def name(self) -> str:
        """What the point changes, for people."""
        return name_change(self.change)


def name_change(change: Change, is_checked: bool = True) -> str:
    """Return a change as text; before it is checked, without what could be a key that stands where a name belongs."""
    shown = []
    for name, value in change.items():
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        if text.startswith("/"):  # a path: its end tells it from others
            text = f"…/{text.rpartition('/')[2]}"
        is_harmless = is_checked or not (name.endswith("api_key") or isinstance(value, dict | list))
        short = text if len(text) <= 60 else f"{text[:57]}..."
        shown.append(f"{name}={short if is_harmless else '...'}")
    return ", ".join(shown) or "unchanged"


def expand_points(config: PipelineConfig, sweep: SweepConfig) -> list[Point]:
    """Return every point that `sweep` makes of `config`, validated whole and numbered from 1.

    Raises:
        PreflowError: naming every point and parameter that is wrong; a preset lacks something; there is no point, or
            there are more than `max_points`.
    """
    changes = [*_preset_changes(config, sweep), *_combinations(sweep.grid), *sweep.changes]
    if not changes:
        raise PreflowError(f"the sweep has no points: give sweep.presets, sweep.grid (such as {EXAMPLE}) or .changes")
    known = parameter_names()
    if wrong := [name for name in dict.fromkeys(name for change in changes for name in change) if name not in known]:
        raise PreflowError("; ".join(_name_problem(name, known) for name in wrong))
    # The evaluation is written out before anything is changed: all points are measured by one judge on like samples.
    base = config.model_copy(update={"evaluation": config.filled().evaluation})
    found, problems = list[Point](), list[str]()
    for number, change in enumerate(changes, 1):
        try:
            found.append(Point(number=number, change=change, config=apply_change(base, change)))
        except ValidationError as error:
            what = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            problems.append(f"point {number} ({name_change(change, is_checked=False)}): {what}")
    if problems:
        more = f"\n... and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        listed = "\n".join(problems[:PROBLEMS_SHOWN])
        raise PreflowError(f"{len(problems)} of {len(changes)} points are wrong; nothing was spent:\n{listed}{more}")
    distinct = len({point.config.model_dump_json() for point in found})
    if distinct > sweep.max_points:
        raise PreflowError(
            f"the sweep has {distinct} points, over sweep.max_points ({sweep.max_points}): every one is a training. "
            "Take fewer values, or raise max_points."
        )
    return found


def apply_change(base: PipelineConfig, change: Change) -> PipelineConfig:
    """Return `base` with the parameters of `change`, written out in full.

    Raises:
        ValidationError: a value is wrong, or does not go with the others.
    """
    values = base.model_dump()
    for name, value in change.items():
        *path, last = name.split(".")
        stage = values
        for part in path:
            stage = stage[part]
        stage[last] = value
        if path == ["generation"] and last in ChatSettings.model_fields:  # a run trains and evaluates with it, too
            values["training"][last] = values["evaluation"]["generation"][last] = value
    return PipelineConfig.model_validate(values).filled()


def setting_names(model: type[StageConfig] = PipelineConfig, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting and of every section of them."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, StageConfig) and not hasattr(field.annotation, "__origin__"):
                yield from setting_names(kind, f"{prefix}{name}.")


def parameter_names() -> list[str]:
    """Return the dotted name of every setting that a sweep can change."""
    names = [name for name in setting_names() if name.split(".")[0] not in SHARED]
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]


def _name_problem(name: str, known: Sequence[str]) -> str:
    if name.split(".")[0] in SHARED:
        return f"{name!r} cannot be swept: all points share one workspace, and none is promoted by itself"
    inside = [other for other in known if other.startswith(f"{name}.")]
    if inside:
        return f"{name!r} is a whole stage; name one of its parameters, such as {inside[0]}"
    same_end = [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]]
    near = list(dict.fromkeys([*same_end, *difflib.get_close_matches(name, known, n=3, cutoff=0.8)]))[:3]
    meant = f"; did you mean {' or '.join(near)}?" if near else "; names are like training.beta or judging.model"
    return f"there is no parameter {name!r}{meant}"


def _combinations(grid: dict[str, list[Any]]) -> list[Change]:
    if not grid:
        return []
    if empty := [name for name, values in grid.items() if not values]:
        raise PreflowError(f"sweep.grid: {', '.join(empty)} has no values; give a list of at least one")
    count = math.prod(len(values) for values in grid.values())
    if count > MOST_COMBINATIONS:
        raise PreflowError(f"sweep.grid: {count:,} combinations; take fewer values, every combination is a training")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _preset_changes(config: PipelineConfig, sweep: SweepConfig) -> list[Change]:
    """Return the configuration as it is, and each preset's changes to it; docs/sweeps.md says why these.

    Raises:
        PreflowError: a preset lacks something only the user can give.
    """
    if "judge" in sweep.presets and sweep.stronger_judge is None:
        raise PreflowError(
            "preset judge: name the stronger judge in sweep.stronger_judge, a model that judging.endpoint "
            f"({config.judging.endpoint}) serves; one that is elsewhere or has another price goes into sweep.changes"
        )
    if "more_data" in sweep.presets and sweep.more_prompts is None:
        raise PreflowError(
            "preset more_data: give the larger prompts file in sweep.more_prompts; the prompts of "
            f"{config.prompts} may be in it too, they cost nothing again"
        )
    slower = {"training.max_steps": None, "training.learning_rate": _rounded(config.training.learning_rate / 5)}
    changes: dict[Preset, list[Change]] = {
        "beta": [{"training.beta": _rounded(config.training.beta / by)} for by in (2, 10)],
        "judge": [{"judging.model": sweep.stronger_judge}],
        "completions": [{"generation.num_completions": max(5, config.generation.num_completions + 2)}],
        "temperature": [{"generation.temperature": temperature} for temperature in (1.0, 1.2)],
        "more_data": [{"prompts": sweep.more_prompts}],
        "epochs": [{"training.num_train_epochs": epochs, **slower} for epochs in (2, 3)],
        "warmup": [{"training.warmup_steps": steps} for steps in (5, 10)],
    }
    found = [change for preset in dict.fromkeys(sweep.presets) for change in changes[preset]]
    return [{}, *found] if found else []


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
