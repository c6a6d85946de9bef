"""Two rounds with real trainings: what each samples from, what is paid, and how they end."""

import shutil
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
import pytest_asyncio

from flows.rounds import dpo_rounds
from tasks.config import RoundsConfig
from tasks.rounds.rounds import RoundsResult
from tests.chaos.test_pipeline_gcs import SAME
from tests.integration.test_sweep import CONCURRENCY, HELD_OUT, PROMPTS, Bench, bench, run_killed

__all__ = ["bench"]
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]  # two trainings, twice


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def result(bench: Bench) -> RoundsResult:
    return await dpo_rounds(bench.config(), RoundsConfig(rounds=2))


def test_the_second_round_samples_from_the_adapter_of_the_first(bench: Bench, result: RoundsResult) -> None:
    first, second = result.rounds
    count = Counter((row["model"], row["n"]) for row in bench.asked() if row["n"])
    assert count["sampler", 3] == PROMPTS
    assert count[f"round-{first.made.adapter.sha256[:12]}", 3] == PROMPTS
    assert second.made.adapter.sha256 != first.made.adapter.sha256
    assert second.made.preferences != first.made.preferences


def test_only_what_is_new_is_paid_for(bench: Bench, result: RoundsResult) -> None:
    asked = bench.asked()
    assert len({row["sha"] for row in asked}) == len(asked), "something was asked twice"
    count = Counter((row["model"], row["n"]) for row in asked)
    assert count["sampler", 2] == 2 * HELD_OUT, "the SFT adapter's samples and those of the null test, once for both"
    for one in result.rounds:
        assert count[f"candidate-{one.made.adapter.sha256[:12]}", 2] == HELD_OUT, "sampled once, compared twice"


async def test_it_says_why_it_ended_and_a_second_run_asks_nobody(bench: Bench, result: RoundsResult) -> None:
    first, second = result.rounds
    assert first.ended is None
    assert first.against_before is None
    assert second.against_before is not None
    assert second.ended is not None
    assert result.best in (1, 2)
    asked = len(bench.asked())
    assert await dpo_rounds(bench.config(), RoundsConfig(rounds=2)) == result
    assert len(bench.asked()) == asked
    (page,) = bench.workspace.glob("rounds/*/report.html")
    assert "against the round before" in page.read_text()


ROUNDS = """
import asyncio, json, sys
from flows.rounds import dpo_rounds
from tasks.config import PipelineConfig, RoundsConfig
config, rounds = (json.loads(argument) for argument in sys.argv[1:])
asyncio.run(dpo_rounds(PipelineConfig.model_validate(config), RoundsConfig.model_validate(rounds)))
"""


def contents(bench: Bench) -> dict[str, str]:
    """The digest of every file that depends on nothing but inputs and settings."""
    files = [path for path in bench.workspace.rglob("*") if path.name in SAME]
    return {str(path.relative_to(bench.workspace)): sha256(path.read_bytes()).hexdigest() for path in files}


def kept(workspace: Path) -> RoundsResult:
    """The result as it was kept, without the digest of the pointer, which says when it was written."""
    (file,) = workspace.glob("rounds/*/result.json")
    found = RoundsResult.model_validate_json(file.read_text())
    assert found.promotion is not None
    return found.model_copy(update={"promotion": found.promotion.model_copy(update={"sha256": ""})})


def test_killed_in_each_round_it_ends_with_the_bytes_of_an_uninterrupted_one(
    bench: Bench, result: RoundsResult
) -> None:
    """Runs last: it starts over in the place of the workspace before, so that all paths are the same."""
    expected = contents(bench)
    shutil.move(bench.workspace, bench.folder / "before")
    first = len(bench.fake.requests())

    def asked_of(name: str) -> int:
        return sum(row["model"].startswith(name) for row in bench.asked(first))

    def training(number: int) -> bool:
        return len({path.parent for path in bench.workspace.glob("training/*/checkpoints/step-*")}) == number

    moments = (lambda: training(1), lambda: asked_of("round-") >= 5, lambda: training(2))
    run_killed(bench, bench.folder / "rounds.log", ROUNDS, {"rounds": 2}, moments, len(moments) * CONCURRENCY)
    assert contents(bench) == expected
    assert kept(bench.workspace) == kept(bench.folder / "before")
    assert {name.split("/")[0] for name in expected} > {"training", "evaluations", "preferences"}
