"""What a judging will ask and cost, counted before it is paid."""

from pathlib import Path

import pytest

from tasks.batch.rows import Outcome, read_slice
from tasks.config import PipelineConfig
from tasks.judge.asking import plan_judging
from tasks.run.approval import count_comparisons, estimate_judging
from tasks.store.workspace import CompletionsRef, Workspace

PRICES = {"prompt_price": 1.0, "completion_price": 10.0, "max_tokens": 100, "shard_size": 100, "rubric": "seinfeld"}


def make(folder: Path, **judging: object) -> tuple[PipelineConfig, CompletionsRef]:
    """Return a configuration and six rows of three completions, of which the last are equal: nothing to ask."""
    config = PipelineConfig.model_validate({"workspace": str(folder), "judging": {**PRICES, **judging}})
    store = Workspace(str(folder))
    with store.writing(store.uri("completions", "c.jsonl")) as out:
        for n in range(6):
            texts = [f"[ANN] line {n} of {k if n < 5 else 0}" for k in range(3)]
            out.write_row({"id": f"{n:064x}", "prompt": [{"role": "user", "content": f"{n}"}], "completions": texts})
    return config, CompletionsRef(uri=store.uri("completions", "c.jsonl"), **out.facts())


def test_every_question_is_counted_and_priced(tmp_path: Path) -> None:
    (estimate,) = estimate_judging(*make(tmp_path))
    assert (estimate.requests, estimate.known) == (10, 0)
    assert estimate.expected.completion_tokens == 300
    assert estimate.most.completion_tokens == 1000
    assert estimate.expected.usd == pytest.approx((estimate.expected.prompt_tokens + 10 * 300) / 1e6)
    assert estimate.most.usd == pytest.approx((estimate.most.prompt_tokens + 10 * 1000) / 1e6)


def test_scores_are_part_of_the_estimate(tmp_path: Path) -> None:
    (estimate,) = estimate_judging(*make(tmp_path, min_chosen_score=5))
    assert estimate.expected.completion_tokens == 10 * (30 + 3 * 8)


def test_each_judge_of_a_panel_is_estimated_at_its_own_price(tmp_path: Path) -> None:
    panel = [{"model": "another", "prompt_price": 0, "completion_price": 0}]
    first, second = estimate_judging(*make(tmp_path, panel=panel, orders=3))
    assert (first.requests, second.requests) == (15, 15)
    assert first.expected.usd > 0 == second.expected.usd


async def test_what_is_known_is_not_asked_again(tmp_path: Path) -> None:
    config, completions = make(tmp_path)
    plan = plan_judging(completions, config.workspace, config.judging)
    (judge,), (part,) = plan.judges, plan.slices
    units = [key for row in read_slice(Workspace(str(tmp_path)), part) for key in plan.units_of(row)]
    async with judge.rows().journal(part) as journal:
        for key in units[:4]:
            await journal.append(key, Outcome(row={"order": [0, 1, 2], "best": 0, "worst": 1}))
    (estimate,) = estimate_judging(config, completions)
    assert (estimate.requests, estimate.known) == (6, 4)


def test_the_evaluations_verdicts_are_counted_at_most(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": [{{"role": "user", "content": "{n}"}}]}}\n' for n in range(7)))
    config, _ = make(tmp_path)
    config = config.model_copy(update={"prompts": str(prompts)})
    assert count_comparisons(config) == 2 * 2 * 4 * 7
    fewer = config.evaluation.model_copy(update={"max_prompts": 3, "null_test": False, "num_samples": 2})
    assert count_comparisons(config.model_copy(update={"evaluation": fewer})) == 2 * 2 * 3
