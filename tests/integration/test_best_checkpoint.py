"""A run that chooses the best of three checkpoints: real trainings, and an endpoint that logs what it is asked."""

import json
from collections import Counter

import pytest
import pytest_asyncio

from flows.pipeline import dpo_pipeline
from flows.rounds import dpo_rounds
from tasks.config import PipelineConfig, RoundsConfig
from tasks.evaluate.evidence import collect_evidence, find_differences
from tasks.promote.pointer import read_pointer
from tasks.run.estimate import COMPARING, plan_runs
from tasks.store.measures import read_choice
from tasks.store.workspace import PipelineResult
from tests.fakes.tiny_training import WORDS
from tests.integration.test_sweep import PROMPTS, Bench, bench

__all__ = ["bench"]
pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

HELD_OUT, CHOOSING, CHECKPOINTS, SAMPLES = 12, 2, 3, 2
DECIDING = HELD_OUT - CHOOSING


@pytest.fixture(scope="module")
def config(bench: Bench) -> PipelineConfig:
    held_out = bench.folder / "more-held-out.jsonl"
    rows = [{"prompt": [{"role": "user", "content": " ".join(WORDS[n : n + 7])}]} for n in range(30, 30 + HELD_OUT)]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = bench.config().model_dump() | {"eval_prompts": str(held_out)}
    return PipelineConfig.model_validate(base | {"evaluation": {"num_samples": SAMPLES, "checkpoints": CHECKPOINTS}})


def planned(config: PipelineConfig) -> tuple[int, int]:
    """The requests to come, and those that are known, by the plan."""
    total = plan_runs([config]).total()
    return total.to_ask, total.known


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def result(bench: Bench, config: PipelineConfig) -> PipelineResult:
    to_ask, _ = planned(config)
    made = await dpo_pipeline(config)
    assert len(bench.asked()) == to_ask, "the plan was right"
    return made


def test_every_question_is_asked_once_and_the_choice_costs_a_third_at_most(
    bench: Bench, config: PipelineConfig, result: PipelineResult
) -> None:
    asked = bench.asked()
    assert len({row["sha"] for row in asked}) == len(asked), "something was asked twice"
    count = Counter((row["model"], row["n"]) for row in asked)
    assert count["sampler", SAMPLES] == HELD_OUT + DECIDING, "the SFT adapter, and again where it is decided"
    sampled = [f"candidate-{one.adapter_sha256[:12]}" for one in read_choice(result.evaluation).tried]
    assert sorted(count[name, SAMPLES] for name in sampled) == [CHOOSING, CHOOSING, HELD_OUT]
    compared = sum(row["model"] == "judge-hash" for row in asked) - 2 * PROMPTS
    assert compared == plan_runs([config]).of(COMPARING).total().requests
    assert compared == 2 * SAMPLES * (CHECKPOINTS * CHOOSING + 2 * DECIDING)


def test_the_chosen_one_is_what_is_decided_on_promoted_and_handed_on(
    bench: Bench, config: PipelineConfig, result: PipelineResult
) -> None:
    choice = read_choice(result.evaluation)
    assert [one.step for one in choice.tried] == [1, 2, 3]
    assert result.adapter.sha256 == result.evaluation.adapter_sha256 == choice.best.adapter_sha256
    pointer = read_pointer(config.workspace, config.promotion.name)
    assert pointer.current.adapter_sha256 == choice.best.adapter_sha256
    evidence = collect_evidence(result.evaluation, config.promotion)
    assert list(find_differences(evidence)) == []
    assert len(choice.prompts) == CHOOSING
    assert {judged.row["prompt_id"] for judged in evidence.comparisons}.isdisjoint(choice.prompts)
    assert [made.stage for made in evidence.made].count("training") == CHECKPOINTS
    (page,) = bench.workspace.glob("runs/*/report.html")
    assert f"Of 3 checkpoints the one of step {choice.best.step} is chosen, by 2 held-out prompts" in page.read_text()


async def test_a_second_run_asks_nobody_and_the_last_adapter_needs_new_comparisons_alone(
    bench: Bench, config: PipelineConfig, result: PipelineResult
) -> None:
    asked = len(bench.asked())
    assert planned(config) == (0, asked)
    assert await dpo_pipeline(config) == result
    assert len(bench.asked()) == asked
    last = config.evaluation.model_copy(update={"checkpoints": 0})
    training = config.training.model_copy(update={"checkpoints": CHECKPOINTS})
    whole = await dpo_pipeline(config.model_copy(update={"evaluation": last, "training": training}))
    assert len(bench.trainings()) == 1, "nothing is trained again"
    assert whole.adapter.sha256 == read_choice(result.evaluation).tried[-1].adapter_sha256
    new = bench.asked()[asked:]
    assert Counter(row["n"] for row in new)[SAMPLES] <= HELD_OUT
    assert len({row["sha"] for row in bench.asked()}) == len(bench.asked()), "something was asked twice"


async def test_rounds_choose_a_checkpoint_each_and_go_on_from_it(
    bench: Bench, config: PipelineConfig, result: PipelineResult
) -> None:
    first, second = (await dpo_rounds(config, RoundsConfig(rounds=2))).rounds
    assert first.made.adapter == result.adapter
    asked = bench.asked()
    assert Counter(row["model"] for row in asked)[f"round-{result.adapter.sha256[:12]}"] == PROMPTS
    assert second.made.adapter.sha256 == read_choice(second.made.evaluation).best.adapter_sha256
    assert read_choice(second.made.evaluation).prompts == read_choice(result.evaluation).prompts, (
        "and so they decide in no round"
    )
    assert len({row["sha"] for row in asked}) == len(asked), "something was asked twice"
