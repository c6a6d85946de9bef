"""The page of a run from what is in its workspace, and of one that is missing something."""

from pathlib import Path

import pytest

from tasks.config import PipelineConfig, PromotionConfig
from tasks.errors import PreflowError
from tasks.judge.quality.metrics import measure_judgements
from tasks.report.run import run_sections
from tasks.store.measures import Health
from tasks.store.workspace import AdapterRef, PipelineResult, PreferencesRef, PromotionRef, Workspace
from tests.fakes.evaluated import evaluated

PARTS = ("preferences/train.jsonl", "preferences/quality.json", "training/health.json", "training/metrics.jsonl",
         "evaluation/comparisons.jsonl", "evaluation/win_rate.json")  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    config = PipelineConfig(workspace=str(tmp_path), promotion=PromotionConfig(name="mine"))
    return config.model_copy(update={"training": config.training.model_copy(update={"base_model": "gpt2"})})


@pytest.fixture
def result(tmp_path: Path) -> PipelineResult:
    """A run whose pairs were given, and whose adapter won."""
    store, facts = Workspace(tmp_path), {"sha256": "a" * 64, "size": 1, "rows": 1}
    store.write_json(str(tmp_path / "preferences/quality.json"), measure_judgements([]).model_dump(mode="json"))
    store.write_json(str(tmp_path / "training/health.json"), Health(source="step 1").model_dump(mode="json"))
    store.write_bytes(str(tmp_path / "preferences/train.jsonl"), b"")
    store.write_bytes(str(tmp_path / "training/metrics.jsonl"), b'{"step": 1, "loss": 0.7}\n')
    return PipelineResult(
        preferences=PreferencesRef(uri=str(tmp_path / "preferences/train.jsonl"), **facts),
        adapter=AdapterRef(uri=str(tmp_path / "training/adapter"), **facts),
        evaluation=evaluated(tmp_path, lambda _: [1, 1]),
    )


def test_the_first_page_says_what_became_of_the_adapter(config: PipelineConfig, result: PipelineResult) -> None:
    pointer = PromotionRef(uri="p", sha256="b" * 64, size=1, rows=1, name="mine", adapter_sha256="a" * 64)
    for change, said in (
        ({}, " It is not served."),
        ({"declined": "it was rolled back."}, " It is not served: it was rolled back."),
        ({"promotion": pointer}, " Adapter aaaaaaaaaaaa is served as 'mine'."),
    ):
        first = run_sections(config, result.model_copy(update=change))[0]
        assert first.summary.endswith(f"more than half.{said}")
    assert first.tables[0].rows[0] == ("Base model", "gpt2")


@pytest.mark.parametrize("part", PARTS)
def test_what_is_missing_or_of_another_version_is_named(
    config: PipelineConfig, result: PipelineResult, part: str
) -> None:
    file = Path(config.workspace, part)
    if part.startswith("evaluation"):
        file = Path(result.evaluation.sibling(file.name))
    if file.suffix == ".json":
        file.write_text("{}")
        with pytest.raises(PreflowError, match="not as this version of preflow writes it; run the pipeline again"):
            run_sections(config, result)
    file.unlink()
    with pytest.raises(PreflowError, match=f"{file.name}: missing, and the report shows it; run the pipeline again"):
        run_sections(config, result)
