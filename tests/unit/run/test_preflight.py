"""When two runs are the same run: by everything that decides their outcome, and by nothing else."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tasks.config import EvaluationConfig, GenerationConfig, JudgingConfig, PipelineConfig, TrainingConfig
from tasks.errors import PreflowError
from tasks.run.preflight import run_key
from tasks.run.stages import check_split
from tests.fakes.process import ROOT


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    for name in ("sft", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_text(name)
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": [{"role": "user", "content": "a"}]}\n')
    return PipelineConfig(
        prompts=str(tmp_path / "prompts.jsonl"), workspace=str(tmp_path / "workspace"),
        judging=JudgingConfig(rubric="seinfeld"), training=TrainingConfig(sft_adapter=str(tmp_path / "sft")),
    )  # fmt: skip


def changed(config: PipelineConfig, **parts: Any) -> str:
    return run_key(config.model_copy(update=parts))


def test_what_changes_the_outcome_makes_another_run(config: PipelineConfig, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    keys = [
        run_key(config),
        changed(config, judging=JudgingConfig(model="stronger", rubric="seinfeld")),
        changed(config, judging=JudgingConfig(rubric="demo")),
        changed(config, training=config.training.model_copy(update={"beta": 0.2})),
        changed(config, training=config.training.model_copy(update={"sft_adapter": other})),
        changed(config, training=config.training.model_copy(update={"base_revision": "v2"})),
        changed(config, evaluation=EvaluationConfig(judging=JudgingConfig(model="stronger"))),
        changed(config, evaluation=EvaluationConfig(generation=GenerationConfig(temperature=0.5))),
        changed(config, evaluation=EvaluationConfig(confidence=0.99)),
        changed(config, evaluation=EvaluationConfig(null_test=False)),
        changed(config, eval_prompts=config.prompts),
    ]
    assert len(set(keys)) == len(keys)


def test_an_older_version_s_run_is_another_one(config: PipelineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the demo would start no model server for the stages that are made again."""
    before = run_key(config)
    for path in (ROOT / "tasks").glob("*/*.py"):
        if path.parent.name in ("run", "sweep") or not (
            found := re.search(r"^(?:STAGE_)?VERSION(?= = \d)", path.read_text(), re.MULTILINE)
        ):
            continue
        with monkeypatch.context() as patch:
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            patch.setattr(f"{module}.{found[0]}", 99)
            assert run_key(config) != before, path


def test_addresses_keys_and_limits_do_not(config: PipelineConfig) -> None:
    moved: dict[str, Any] = {"endpoint": "http://elsewhere:1/v1", "max_concurrency": 3, "api_key": "env:OTHER"}
    assert run_key(config) == changed(config, judging=JudgingConfig(rubric="seinfeld", **moved))
    assert run_key(config) == changed(config, generation=GenerationConfig(**moved))
    written_out = EvaluationConfig(judging=JudgingConfig(**moved))
    assert run_key(config) == changed(config, evaluation=written_out)


@pytest.mark.parametrize(
    ("groups", "ratio", "held_out", "said"),
    [(2, 0.1, False, "2 groups.*nothing would be left to evaluate on"), (2, 0.1, True, None), (40, 0.1, False, None),
     (2, 0.99, True, "nothing would be left to train on"), (None, 0.1, False, None)],
)  # fmt: skip
def test_a_split_with_an_empty_side_is_refused_before_anything_is_spent(
    config: PipelineConfig, groups: int | None, ratio: float, held_out: bool, said: str | None
) -> None:
    rows = [{"prompt": f"q{n}", "group": groups and f"g{n % groups}"} for n in range(80)]
    Path(config.prompts).write_text("".join(json.dumps(row) + "\n" for row in rows))
    judging = config.judging.model_copy(update={"val_ratio": ratio})
    config = config.model_copy(update={"judging": judging, "eval_prompts": config.prompts if held_out else None})
    if said is None:
        check_split(config)
        return
    with pytest.raises(PreflowError, match=said):
        check_split(config)


def test_a_changed_file_makes_another_run(config: PipelineConfig) -> None:
    before = run_key(config)
    with Path(config.prompts).open("a") as file:
        file.write('{"prompt": [{"role": "user", "content": "b"}]}\n')
    assert run_key(config) != before
