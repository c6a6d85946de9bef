"""The points of a sweep: presets, a grid and single changes, each a whole and valid configuration of the pipeline."""

import difflib
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.config import PipelineConfig, Preset, StageConfig, SweepConfig
from tasks.errors import PreflowError

# Dotted parameter names with their values.
Change: TypeAlias = dict[str, Any]

# What all points have in common: stages are shared through the workspace, and no point is promoted by itself.
SHARED = ("workspace", "promotion")
# Above this a grid is refused without being multiplied out.
MOST_COMBINATIONS = 10_000
PROBLEMS_SHOWN = 10
EXAMPLE = '{"training.beta": [0.05, 0.1]}'
logger = logging.getLogger(__name__)


class Point(BaseModel):
    """One run of a sweep: what it changes, and the whole configuration that comes of it."""

    model_config = ConfigDict(frozen=True)

    number: int
    change: Change
    config: PipelineConfig

    @property
    def name(self) -> str:
        """What the point changes, for people."""
        return name_change(self.change)


class Points(BaseModel):
    """All points of a sweep, numbered from 1, and how many were left out as equal to one of them."""

    model_config = ConfigDict(frozen=True)

    points: tuple[Point, ...]
    duplicates: int = 0


def name_change(change: Change) -> str:
    """Return a valid change as text."""
    return ", ".join(f"{name}={_short(value)}" for name, value in change.items()) or "unchanged"


def _name_wrong(change: Change) -> str:
    """Return a change that may be wrong as text, without what could be a key that stands where a name belongs."""
    shown = (
        f"{name}={'...' if name.endswith('api_key') or isinstance(value, dict | list) else _short(value)}"
        for name, value in change.items()
    )
    return ", ".join(shown)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if text.startswith("/"):  # a path: its end tells it from others
        text = f"…/{text.rpartition('/')[2]}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def expand_points(config: PipelineConfig, sweep: SweepConfig) -> Points:
    """Return every point that `sweep` makes of `config`, validated whole; equal ones are dropped and counted.

    Raises:
        PreflowError: naming every point and parameter that is wrong; a preset lacks something; there is no point, or
            there are more than `max_points`.
    """
    changes = [*_preset_changes(config, sweep), *_combinations(sweep.grid), *sweep.changes]
    if not changes:
        raise PreflowError(f"the sweep has no points: give sweep.presets, sweep.grid (such as {EXAMPLE}) or .changes")
    _check_names(name for change in changes for name in change)
    base, found, problems = _with_one_ruler(config), list[Point](), list[str]()
    for number, change in enumerate(changes, 1):
        try:
            found.append(Point(number=number, change=change, config=apply_change(base, change)))
        except ValidationError as error:
            problems.append(f"point {number} ({_name_wrong(change)}): {_explain(error)}")
    if problems:
        more = f"\n... and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        listed = "\n".join(problems[:PROBLEMS_SHOWN])
        raise PreflowError(f"{len(problems)} of {len(changes)} points are wrong; nothing was spent:\n{listed}{more}")
    return limited(drop_equal(found, lambda point: point.config), sweep)


def drop_equal(points: Sequence[Point], key: Callable[[Point], object]) -> Points:
    """Return the points without those whose key an earlier one has, numbered anew."""
    kept: list[Point] = []
    seen: list[object] = []
    for point in points:
        if (found := key(point)) not in seen:
            seen.append(found)
            kept.append(point.model_copy(update={"number": len(kept) + 1}))
    return Points(points=tuple(kept), duplicates=len(points) - len(kept))


def limited(points: Points, sweep: SweepConfig) -> Points:
    """Return the points if they are not too many.

    Raises:
        PreflowError: there are more than `max_points`.
    """
    if len(points.points) > sweep.max_points:
        raise PreflowError(
            f"the sweep has {len(points.points)} points, over sweep.max_points ({sweep.max_points}): every one is a "
            "training. Take fewer values, or raise max_points."
        )
    return points


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
    return PipelineConfig.model_validate(values).filled()


def _with_one_ruler(config: PipelineConfig) -> PipelineConfig:
    """Write the evaluation out before anything is changed: all points are measured by one judge on like samples."""
    return config.model_copy(update={"evaluation": config.filled().evaluation})


def _explain(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())


# ---- names


def parameter_names(model: type[StageConfig] = PipelineConfig, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every parameter that a sweep can change."""
    for name, field in model.model_fields.items():
        nested = _stage_of(field.annotation)
        if prefix == "" and name in SHARED:
            continue
        if nested is None:
            yield f"{prefix}{name}"
        else:
            yield from parameter_names(nested, f"{prefix}{name}.")


def _stage_of(annotation: Any) -> type[StageConfig] | None:
    """Return the configuration model that a field holds, or may hold; None for a plain value or a list."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, StageConfig) and not hasattr(annotation, "__origin__"):
            return kind
    return None


def _check_names(names: Iterable[str]) -> None:
    known = list(parameter_names())
    if problems := [_name_problem(name, known) for name in dict.fromkeys(names) if name not in known]:
        raise PreflowError("; ".join(problems))


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


# ---- what makes points


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
    """Return the configuration as it is, and each preset's changes to it.

    Raises:
        PreflowError: a preset lacks something only the user can give.
    """
    wanted = list(dict.fromkeys(sweep.presets))
    found = [change for preset in wanted for change in _PRESETS[preset](config, sweep)]
    return [{}, *found] if found else []


def _lower_beta(config: PipelineConfig, sweep: SweepConfig) -> list[Change]:
    return [{"training.beta": _rounded(config.training.beta / by)} for by in (2, 10)]


def _stronger_judge(config: PipelineConfig, sweep: SweepConfig) -> list[Change]:
    if sweep.stronger_judge is None:
        raise PreflowError(
            "preset judge: name the stronger judge in sweep.stronger_judge, a model that judging.endpoint "
            f"({config.judging.endpoint}) serves; one that is elsewhere or has another price goes into sweep.changes"
        )
    return [{"judging.model": sweep.stronger_judge}]


def _more_completions(config: PipelineConfig, sweep: SweepConfig) -> list[Change]:
    return [{"generation.num_completions": max(5, config.generation.num_completions + 2)}]


def _higher_temperature(config: PipelineConfig, sweep: SweepConfig) -> list[Change]:
    return [{"generation.temperature": temperature} for temperature in (1.0, 1.2)]


def _more_data(config: PipelineConfig, sweep: SweepConfig) -> list[Change]:
    if sweep.more_prompts is None:
        raise PreflowError(
            "preset more_data: give the larger prompts file in sweep.more_prompts; the prompts of "
            f"{config.prompts} may be in it too, they cost nothing again"
        )
    return [{"prompts": sweep.more_prompts}]


def _more_epochs(config: PipelineConfig, sweep: SweepConfig) -> list[Change]:
    rate = _rounded(config.training.learning_rate / 5)
    return [
        {"training.num_train_epochs": epochs, "training.max_steps": None, "training.learning_rate": rate}
        for epochs in (2, 3)
    ]


def _shorter_warmup(config: PipelineConfig, sweep: SweepConfig) -> list[Change]:
    return [{"training.warmup_steps": steps} for steps in (5, 10)]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


_PRESETS: dict[Preset, Callable[[PipelineConfig, SweepConfig], list[Change]]] = {
    "beta": _lower_beta,
    "judge": _stronger_judge,
    "completions": _more_completions,
    "temperature": _higher_temperature,
    "more_data": _more_data,
    "epochs": _more_epochs,
    "warmup": _shorter_warmup,
}
