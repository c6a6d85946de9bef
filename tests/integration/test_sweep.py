"""A sweep with real parts: a Prefect server, trainings of a tiny model, endpoints that log what they are asked."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flows.sweep import dpo_sweep
from tasks.config import PipelineConfig, SweepConfig
from tasks.sweeping.results import SweepResult
from tests.fakes import FakeOpenAI
from tests.fakes.tiny_training import WORDS, build_adapter, build_base

pytestmark = pytest.mark.timeout(900)

PROMPTS, HELD_OUT, CONCURRENCY = 14, 5, 4
BETAS, JUDGES = [0.05, 0.1, 0.2], ["judge-hash", "judge-length"]
GRID = {"training.beta": BETAS, "judging.model": JUDGES}
PLAN = {"latency_ms": 15, "oracle_every": 3}
Row = dict[str, Any]


@dataclass
class Bench:
    """Models, prompts and an endpoint, with a workspace that tests fill one after another."""

    folder: Path
    fake: FakeOpenAI
    api: str

    @property
    def workspace(self) -> Path:
        return self.folder / "workspace"

    def config(self, **judging: Any) -> PipelineConfig:
        common = {"endpoint": self.fake.url, "max_concurrency": CONCURRENCY, "max_outage_seconds": 0.5}
        return PipelineConfig.model_validate(
            {
                "prompts": str(self.folder / "prompts.jsonl"),
                "eval_prompts": str(self.folder / "held-out.jsonl"),
                "workspace": str(self.workspace),
                "generation": {**common, "model": "sampler"},
                "judging": {**common, "model": "judge-hash", "api_key": None, "rubric": "demo", **judging},
                "training": {
                    "base_model": str(self.folder / "base"), "sft_adapter": str(self.folder / "sft"),
                    "load_in_4bit": False, "bf16": False, "gradient_checkpointing": False, "learning_rate": 1e-2,
                    "max_steps": 3, "warmup_steps": 1, "gradient_accumulation_steps": 2, "max_length": 512,
                    "save_steps": 1, "logging_steps": 1,
                },
                "evaluation": {"num_samples": 2},
                "promotion": {"endpoint": None, "min_win_rate": 0.0},
            }
        )  # fmt: skip

    def asked(self, start: int = 0) -> list[Row]:
        """The chat requests that the endpoint answered, from the `start`-th on."""
        return [row for row in self.fake.requests()[start:] if row["status"] == 200]

    def trainings(self) -> list[Path]:
        """The folders of the finished trainings."""
        return [marker.parents[1] for marker in self.workspace.glob("training/*/adapter/COMMITTED.json")]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("sweep")
    build_base(folder / "base")
    build_adapter(folder / "sft", folder / "base")
    for name, first, count in (("prompts", 0, PROMPTS), ("held-out", 50, HELD_OUT)):
        rows = [
            {"prompt": [{"role": "user", "content": " ".join(WORDS[number : number + 6])}]}
            for number in range(first, first + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with FakeOpenAI(PLAN, folder / "fake") as fake:
        yield Bench(folder, fake, prefect_server)


async def swept(bench: Bench, **sweep: Any) -> SweepResult:
    result = await dpo_sweep(bench.config(), SweepConfig.model_validate(sweep))
    assert isinstance(result, SweepResult)
    return result


async def test_every_stage_is_done_once_for_all_points_that_share_it(bench: Bench) -> None:
    result = await swept(bench, grid=GRID)
    assert [point.error for point in result.points] == [None] * 6
    asked = bench.asked()
    assert len({row["sha"] for row in asked}) == len(asked), "something was asked twice"
    print(Counter(row["model"] for row in asked))
