"""Paths as people write them, `~`, relative and file://, mean the same in every field and are resolved once."""

import json
from pathlib import Path

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from tasks.config import (
    GenerationConfig,
    JudgingConfig,
    Location,
    PipelineConfig,
    SweepConfig,
    TrainingConfig,
    resolve_location,
)
from tasks.errors import PreflowError
from tasks.judge.prompt import read_rubric
from tasks.store.prompts import import_prompts
from tasks.store.workspace import folder_digest
from tasks.train.launch import base_digest

FIELDS: list[tuple[type[BaseModel], str]] = [
    (PipelineConfig, "prompts"), (PipelineConfig, "eval_prompts"), (PipelineConfig, "workspace"),
    (GenerationConfig, "adapter"), (TrainingConfig, "sft_adapter"), (TrainingConfig, "base_model"),
    (JudgingConfig, "rubric"), (SweepConfig, "more_prompts"),
]  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder that is the working directory too, with a file and a model folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "a b" / name).write_text("{}")
    return tmp_path


@pytest.mark.parametrize(("model", "field"), FIELDS, ids=lambda value: value if isinstance(value, str) else None)
def test_every_way_to_write_a_path_is_one_path(home: Path, model: type[BaseModel], field: str) -> None:
    for text in ("~/a b", "./a b", str(home / "a b"), "file://" + str(home / "a b").replace(" ", "%20")):
        assert getattr(model.model_validate({field: text}), field) == str(home / "a b"), text


@pytest.mark.parametrize("text", ["gs://bucket/a b", "gs://bucket/a b/", "gs://block@bucket/a b"])
def test_addresses_stay_as_they_are(text: str) -> None:
    assert resolve_location(text) == text.rstrip("/")
    assert resolve_location("~nobody-of-this-name/a").endswith("/~nobody-of-this-name/a")


@pytest.mark.parametrize(
    "text", ["gs:/bucket/a", "s3:bucket", "file:a", "C:\\data\\p.jsonl", "c:/data", "\\\\server\\a"]
)
def test_an_address_that_is_miswritten_makes_no_folder_here(text: str) -> None:
    with pytest.raises(PreflowError, match="write gs://bucket/prefix, or a path of this machine"):
        resolve_location(text)
    with pytest.raises(ValidationError, match=r"workspace\n.*write gs://bucket/prefix"):
        PipelineConfig(workspace=text)


def test_names_are_no_paths(home: Path) -> None:
    assert TrainingConfig(base_model="org/model").base_model == "org/model"
    assert JudgingConfig(rubric="seinfeld").rubric == "seinfeld"
    (home / "org" / "model").mkdir(parents=True)
    assert TrainingConfig(base_model="org/model").base_model == str(home / "org" / "model")


def test_defaults_are_resolved_too_and_empty_means_none(home: Path) -> None:
    config = PipelineConfig()
    assert config.workspace == str(home / "workspace")
    assert config.training.sft_adapter == str(home / "adapters" / "sft")
    assert PipelineConfig(eval_prompts="").eval_prompts is None
    with pytest.raises(ValidationError):
        TypeAdapter(Location).validate_python("")


def test_where_a_base_lies_is_not_part_of_what_it_makes(home: Path) -> None:
    (home / "copy").symlink_to(home / "a b")
    here, there = (TrainingConfig(base_model=name) for name in ("~/a b", "~/copy"))
    assert here.identity() == there.identity()
    assert base_digest(here) == base_digest(there)
    assert base_digest(here) != base_digest(TrainingConfig(base_model="org/model"))


def test_prompts_adapters_and_rubrics_are_found_below_home(home: Path) -> None:
    (home / "p.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "x"}]}) + "\n")
    (home / "house.md").write_text("Judge.")
    for text in ("~/p.jsonl", "p.jsonl", f"file://{home}/p.jsonl"):
        assert import_prompts(text, "~/ws").rows == 1
    assert (home / "ws" / "prompts").is_dir()
    assert folder_digest("~/a b") == folder_digest(str(home / "a b"))
    assert read_rubric(JudgingConfig(rubric="~/house.md").rubric) == "Judge."
