"""config.yaml: the model of the form, with paths relative to the file and every error named by its line."""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from tasks.config import PipelineConfig, RoundsConfig, SweepConfig
from tasks.errors import PreflowError
from tasks.sweep.points import setting_names

# Files and folders: taken relative to the file that names them. Hub names and addresses stay as they are.
PATHS = (
    "prompts", "eval_prompts", "workspace", "training.sft_adapter", "training.base_model", "generation.adapter",
    "judging.rubric", "evaluation.generation.adapter", "evaluation.judging.rubric", "sweep.more_prompts",
)  # fmt: skip
# The defaults that are paths themselves.
DEFAULTS = {"prompts": "prompts.jsonl", "workspace": "workspace", "training.sft_adapter": "adapters/sft"}
PLAINER = {"endpoint": "must be an address such as http://host:8000/v1, without a user, password or key in it"}
YAML_RULES = "indent with spaces, name a setting once, and quote values that hold a colon or brackets"


class RunFile(PipelineConfig):
    """A config.yaml: one whole run, what a sweep varies, and how far rounds go."""

    sweep: SweepConfig = Field(default_factory=SweepConfig, description="What `preflow sweep` varies.")
    rounds: RoundsConfig = Field(default_factory=RoundsConfig, description="How far `preflow rounds` goes.")


@dataclass(frozen=True)
class Settings:
    """What a config.yaml says."""

    file: Path
    config: PipelineConfig
    sweep: SweepConfig
    rounds: RoundsConfig

    @property
    def folder(self) -> Path:
        """Where the server that `preflow run` starts keeps its database, and where the logs are."""
        return self.file.parent / ".preflow"

    def parameters(self, *, sweep: bool = False) -> dict[str, Any]:
        """Return them as the parameters of a deployment: only what is not a default."""
        found = {"config": self.config.model_dump(mode="json", exclude_defaults=True)}
        return {**found, "sweep": self.sweep.model_dump(mode="json", exclude_defaults=True)} if sweep else found


def load_settings(file: Path, changes: Sequence[str] = ()) -> Settings:
    """Read a config.yaml and apply changes such as training.beta=0.05.

    Raises:
        PreflowError: naming everything that is wrong, each with its line and what is meant, if that can be guessed.
    """
    values, lines = _read(file)
    for name, path in DEFAULTS.items():
        if _get(values, name) is None:
            _put(values, name, path)
    for name in PATHS:
        if isinstance(path := _get(values, name), str):
            _put(values, name, _absolute(name, path, file.absolute().parent))
    changed = dict(parse_change(change) for change in changes)
    for name, value in changed.items():
        # A path on the command line is relative to the present folder.
        is_path = name in PATHS and isinstance(value, str)
        if not _put(values, name, _absolute(name, value, Path.cwd()) if is_path else value):
            raise PreflowError(f"--set {name}: {name.rpartition('.')[0]} is no section: it has no settings in it")
    return _validate(file, values, lines, changed)


def _read(file: Path) -> tuple[dict[str, Any], CommentedMap]:
    """Return what a file says, and the same with its lines."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        values, lines = YAML(typ="safe").load(text) or {}, YAML(typ="rt").load(text) or CommentedMap()
    except FileNotFoundError as error:
        raise PreflowError(f"{file.absolute()}: no such file; `preflow init {file}` writes one") from error
    except IsADirectoryError as error:
        raise PreflowError(f"{file.absolute()}: is a folder; name the config.yaml in it") from error
    except OSError as error:
        raise PreflowError(f"{file.absolute()}: cannot be read: {error.strerror}; see its rights") from error
    except UnicodeDecodeError as error:
        raise PreflowError(f"{file}: not text in UTF-8: save it in that encoding") from error
    except (YAMLError, ValueError) as error:  # ValueError: of a date that there is not
        mark = getattr(error, "problem_mark", None)
        line, problem = mark.line + 1 if mark else 1, getattr(error, "problem", None) or error
        raise PreflowError(f"{file}:{line}: not YAML: {problem}; {YAML_RULES}") from error
    if not isinstance(values, dict):
        raise PreflowError(f"{file}: must hold settings such as `prompts: a.jsonl`; `preflow init` writes an example")
    return values, lines


def _validate(file: Path, values: dict[str, Any], lines: CommentedMap, changed: dict[str, Any]) -> Settings:
    problems: list[str] = []
    sweep, rounds = values.pop("sweep", None) or {}, values.pop("rounds", None) or {}
    made: list[Any] = []
    for model, given, section in (
        (PipelineConfig, values, ""),
        (SweepConfig, sweep, "sweep"),
        (RoundsConfig, rounds, "rounds"),
    ):
        try:
            made.append(model.model_validate(given))
        except ValidationError as error:
            for item in error.errors():
                where = (*filter(None, [section]), *item["loc"])
                problems.append(f"{_place(file, lines, where, changed)}: {_explain(where, item)}")
    if problems:
        raise PreflowError("\n".join(problems))
    return Settings(file.absolute(), *made)


def _place(file: Path, lines: CommentedMap, where: Sequence[int | str], changed: dict[str, Any]) -> str:
    """Return `file:line` of a setting, or of the section that it belongs to; or the option that gave it."""
    if ".".join(map(str, where)) in changed:
        return "--set"
    line, found = 1, lines
    for part in where:
        if not isinstance(found, CommentedMap) or part not in found:
            break
        line, found = found.lc.key(part)[0] + 1, found[part]
    return f"{file}:{line}"


def _explain(where: Sequence[int | str], item: Mapping[str, Any]) -> str:
    name, last = ".".join(map(str, where)), str(where[-1]) if where else ""
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        known, section = list(setting_names(RunFile)), name.rpartition(".")[0]
        siblings = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == section}
        near = [siblings[one] for one in difflib.get_close_matches(last, siblings, n=1, cutoff=0.7)]
        near = near or [other for other in known if other.rpartition(".")[2] == last][:1]
        return f"there is no setting {name}" + (f"; did you mean {near[0]}?" if near else "; `preflow schema` has all")
    if item["type"] == "string_pattern_mismatch":
        message = PLAINER.get(last, message)
    elif item["type"] in ("model_type", "dict_type"):
        message = "must be a section, with settings in it"
    return f"{name}: {message}" if name else message


def parse_change(change: str, example: str = "training.beta=0.05") -> tuple[str, Any]:
    """Return name and value of a change such as training.beta=0.05."""
    name, equals, text = change.partition("=")
    if not equals or not all(part.strip() for part in name.split(".")):
        raise PreflowError(f"--set {change}: write it as {example}")
    try:
        return name.strip(), YAML(typ="safe").load(text)
    except (YAMLError, ValueError):
        return name.strip(), text


def _absolute(name: str, value: str, folder: Path) -> str:
    looks_like_a_path = value.startswith((".", "/", "~")) or (folder / value).exists()
    is_name = name.endswith(("base_model", "rubric")) and not value.endswith(".md") and not looks_like_a_path
    if "://" in value or not value or is_name:
        return value
    return os.path.normpath(folder / Path(value).expanduser())


def _get(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _put(values: dict[str, Any], name: str, value: Any) -> bool:
    """Put a value into its section; False where something else than a section stands there."""
    *path, last = name.split(".")
    for part in path:
        if values.get(part) is None:
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            return False
    values[last] = value
    return True
