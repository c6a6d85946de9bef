"""config.yaml: the model of the form; every error has its line; paths are relative to the file."""

import json
from pathlib import Path

import pytest
from prefect.utilities.schema_tools.validation import validate

from flows.pipeline import dpo_pipeline
from preflow.settings import RunFile, load_settings
from tasks.config import PipelineConfig
from tasks.errors import PreflowError

KEY = "sk-abcdefghijklmnopqrstuvwxyz123456"


def write(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text)
    return file


def refusal(folder: Path, text: str, *changes: str) -> str:
    with pytest.raises(PreflowError) as refused:
        load_settings(write(folder, text), changes)
    return str(refused.value)


def test_paths_are_relative_to_the_file_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    (tmp_path / "rubric.md").write_text("good")
    (tmp_path / "base").mkdir()
    text = (
        "prompts: data/p.jsonl\njudging: {rubric: rubric.md}\ntraining:\n  sft_adapter: gs://b/a\n  base_model: base\n"
    )
    config = load_settings(write(tmp_path, text)).config
    assert config.prompts == f"{tmp_path}/data/p.jsonl"
    assert config.workspace == f"{tmp_path}/workspace", "the default is a path as well"
    assert config.judging.rubric == f"{tmp_path}/rubric.md"
    assert config.training.sft_adapter == "gs://b/a"
    assert config.training.base_model == f"{tmp_path}/base"
    other = load_settings(write(tmp_path, "judging: {rubric: demo}\ntraining: {base_model: org/base}\n")).config
    assert (other.judging.rubric, other.training.base_model) == ("demo", "org/base")


def test_a_change_on_the_command_line_wins_and_its_paths_are_of_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    file = write(tmp_path, "training: {beta: 0.2}\n")
    config = load_settings(file, ["training.beta=5e-2", "prompts=p.jsonl", "judging.seed=7"]).config
    assert (config.training.beta, config.judging.seed) == (0.05, 7)
    assert config.prompts == f"{tmp_path}/here/p.jsonl"


def test_everything_that_is_wrong_is_named_at_once_with_its_line(tmp_path: Path) -> None:
    text = "prompts: p\ngeneration:\n  max_tokns: 5\n  temperature: 9\ntraining:\n  beta: 20\nsweep:\n  max_points: 0\n"
    lines = refusal(tmp_path, text, "judging.orders=x").splitlines()
    assert any(":3: there is no setting generation.max_tokns; did you mean generation.max_tokens?" in x for x in lines)
    for place in (
        ":4: generation.temperature: ",
        ":6: training.beta: ",
        ":8: sweep.max_points: ",
        "--set: judging.orders",
    ):
        assert any(place in line for line in lines), (place, lines)
    assert len(lines) == 5


@pytest.mark.parametrize("place", ["judging", "generation", "promotion"])
def test_a_key_is_refused_and_not_shown(tmp_path: Path, place: str) -> None:
    message = refusal(tmp_path, f"{place}: {{api_key: {KEY}}}\n")
    assert "must name a secret" in message
    assert KEY not in message
    assert KEY not in refusal(tmp_path, "", f"{place}.api_key={KEY}")


def test_the_schema_is_that_of_the_form_and_takes_what_init_writes(tmp_path: Path) -> None:
    import yaml

    from preflow.commands.files import init

    init(tmp_path / "config.yaml")
    given = yaml.safe_load((tmp_path / "config.yaml").read_text())
    schema = json.loads((tmp_path / "preflow.schema.json").read_text())
    assert validate(given, schema) == []
    assert schema == RunFile.model_json_schema()
    assert set(PipelineConfig.model_fields) | {"sweep", "rounds"} == set(schema["properties"])
    assert load_settings(tmp_path / "config.yaml").sweep.grid == {"training.beta": [0.03, 0.1, 0.3]}


def test_the_parameters_are_what_the_deployment_takes(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, "training: {beta: 0.3}\n"))
    given = settings.parameters()
    assert validate(given, dpo_pipeline.parameters.model_dump()) == []
    assert PipelineConfig.model_validate(given["config"]) == settings.config
