"""When rounds end, which is the best, and what the next one begins with."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.config import JudgingConfig, PipelineConfig, RoundsConfig
from tasks.errors import PreflowError
from tasks.rounds.rounds import (
    Round,
    RoundsResult,
    best_round,
    check_held_out,
    record_rounds,
    round_config,
    rounds_page,
    why_last,
)
from tasks.store.workspace import AdapterRef, EvaluationRef, PipelineResult, PreferencesRef
from tests.fakes.evaluated import evaluated

FACTS = {"sha256": "a" * 64, "size": 1, "rows": 1}


def evaluation(lower: float, **more: Any) -> EvaluationRef:
    rate = {"win_rate": lower + 0.05, "lower": lower, "upper": lower + 0.1}
    return EvaluationRef(uri="/w/e", adapter_sha256="a" * 64, **rate, **FACTS, **more)


def made(lower: float, workspace: str = "/w") -> PipelineResult:
    return PipelineResult(
        preferences=PreferencesRef(uri=f"{workspace}/p", val_rows=0, **FACTS),
        adapter=AdapterRef(uri=f"{workspace}/training/k/adapter", **FACTS),
        evaluation=evaluation(lower),
    )


@pytest.mark.parametrize(
    ("number", "against_sft", "against_before", "why"),
    [
        (1, evaluation(0.6), None, None),
        (
            1,
            evaluation(0.5),
            None,
            "round 1 is not proven to win against the SFT adapter (55.0 % (50.0-60.0 %), bar 50 %",
        ),
        # What decides is said where the interval alone would say the contrary.
        (1, evaluation(0.6, null_holds=False), None, "(60.0-70.0 %), but the SFT adapter against itself does not"),
        (1, evaluation(0.6, proven=0.45), None, "(60.0-70.0 %), but with length taken out the lower bound is 45.0 %"),
        (2, evaluation(0.6), evaluation(0.51), None),
        (2, evaluation(0.6), evaluation(0.49), "round 2 is not proven to win against round 1 (54.0 %"),
        (2, evaluation(0.4), evaluation(0.6), "against the SFT adapter"),
        (3, evaluation(0.6), evaluation(0.6), "3 rounds were asked for"),
    ],
)
def test_a_round_that_does_not_win_is_the_last(
    number: int, against_sft: EvaluationRef, against_before: EvaluationRef | None, why: str | None
) -> None:
    found = why_last(number, made(0.6).model_copy(update={"evaluation": against_sft}), against_before, 0.5, 3)
    assert found is None if why is None else found is not None and why in found


def test_a_round_that_went_astray_is_not_the_best() -> None:
    good = Round(number=1, made=made(0.6))
    better = Round(number=2, made=made(0.6), against_before=evaluation(0.55))
    worse = Round(number=3, made=made(0.4), against_before=evaluation(0.55))
    even = Round(number=3, made=made(0.6), against_before=evaluation(0.45))
    assert best_round((good, better, worse), 0.5) == better
    assert best_round((good, better, even), 0.5) == better
    assert best_round((Round(number=1, made=made(0.4)),), 0.5) is None


def test_what_one_round_leaves_another_may_have_trained_on() -> None:
    with pytest.raises(PreflowError, match=r"eval_prompts is empty.*rounds\.rounds to 1"):
        check_held_out(PipelineConfig(), RoundsConfig(rounds=2))
    check_held_out(PipelineConfig(), RoundsConfig(rounds=1))


@pytest.mark.parametrize(
    ("held_out", "given", "shared"),
    [
        ({"a": None, "b": "g"}, {}, None),
        ({"a": None, "p": None}, {}, "1 of 2 prompts are in .*prompts.jsonl"),
        ({"a": None, "b": "film"}, {}, "1 of 2 prompts are in .*prompts.jsonl"),
        ({"a": None, "c": None}, {"completions": "given.jsonl"}, "1 of 2 prompts are in .*given.jsonl"),
        ({"a": None, "c": None}, {"preferences": "given.jsonl"}, "1 of 2 prompts are in .*given.jsonl"),
    ],
)
def test_what_a_round_trains_on_is_not_held_out(
    tmp_path: Path, held_out: dict[str, str | None], given: dict[str, str], shared: str | None
) -> None:
    def write(name: str, prompts: dict[str, str | None], **more: object) -> str:
        rows = [
            {
                "source": name,
                "prompt": [{"role": "user", "content": text}],
                **({"group": group} if group else {}),
                **more,
            }
            for text, group in prompts.items()
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    pair = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    answers: Any = {"completions": ["yes", "no"]} if "completions" in given else pair
    config = PipelineConfig(
        prompts=write("prompts.jsonl", {"p": None, "q": "film"}),
        eval_prompts=write("held-out.jsonl", held_out),
        workspace=str(tmp_path / "w"),
        judging=JudgingConfig(val_ratio=0),
        **{kind: write(name, {"c": None, "d": None}, **answers) for kind, name in given.items()},
    )
    if shared is None:
        return check_held_out(config, RoundsConfig(rounds=2))
    with pytest.raises(PreflowError, match=shared):
        check_held_out(config, RoundsConfig(rounds=2))
    return check_held_out(config, RoundsConfig(rounds=1))


@pytest.mark.parametrize(("start", "given"), [("sft", "completions"), ("previous", "preferences")])
def test_the_next_round_samples_from_the_last_adapter_and_is_measured_against_sft(
    start: str, given: str, tmp_path: Path
) -> None:
    config = PipelineConfig.model_validate(
        {"workspace": str(tmp_path), "training": {"sft_adapter": "/sft"}, given: str(tmp_path / "given.jsonl")}
    ).filled()
    before = Round(number=1, made=made(0.6, str(tmp_path)))
    assert round_config(config, RoundsConfig(start=start), None) == config
    then = round_config(config, RoundsConfig(start=start), before)
    adapter = before.made.adapter.uri
    assert (then.generation.adapter, then.generation.serve_from) == (adapter, adapter)
    assert then.training.sft_adapter == (config.training.sft_adapter if start == "sft" else adapter)
    assert then.evaluation == config.evaluation
    assert (then.completions, then.preferences) == (None, None)


def test_the_page_lies_where_the_command_says(tmp_path: Path) -> None:
    first = made(0.6).model_copy(update={"evaluation": evaluated(tmp_path, lambda _: [1, 1])})
    done, config = (Round(number=1, made=first, ended="one round was asked for"),), RoundsConfig()
    result = RoundsResult(rounds=done, declined="not approved (promotion): no.")
    record_rounds(result, PipelineConfig(workspace=str(tmp_path)), config)
    page = Path(rounds_page(result, str(tmp_path), config))
    said = "One round was run; no round won. The end: one round was asked for. It is not served: not approved"
    assert f"{said} (promotion): no.<" in page.read_text()
    assert RoundsResult.model_validate_json(page.with_name("result.json").read_text()) == result
