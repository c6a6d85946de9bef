"""Settings: what is refused, what identifies a stage, and that no key is ever printed."""

import re
from typing import Any

import pytest
from prefect.utilities.schema_tools.validation import validate
from pydantic import ValidationError

from tasks.config import (
    EndpointConfig,
    EvaluationConfig,
    GenerationConfig,
    JudgeConfig,
    JudgingConfig,
    PipelineConfig,
    PromotionConfig,
    PublishingConfig,
    StageConfig,
    SweepConfig,
    TrainingConfig,
)
from tasks.evaluate.comparisons import win_rate
from tests.fakes.comparisons import compared

MODELS: list[type[StageConfig]] = [
    EndpointConfig, GenerationConfig, JudgeConfig, JudgingConfig, TrainingConfig, EvaluationConfig, PromotionConfig,
    PipelineConfig, PublishingConfig, SweepConfig,
]  # fmt: skip
KEYS = [
    "sk-proj-abcdefghijklmnop", "sk_live_abcdefghijkl", "hf_abcdefghijklmnop",
    "AIzaSyA1234567890abcdefghijklmnopqrstuv", "gsk_0123456789abcdef", "key-0123456789",
    "0123456789abcdef0123456789abcdef0123456789abcdef0123", "0123456789abcdef0123456789abcdef",
    "0b9fd2a1-77c3-4f0e-9d51-2c1e0a9b8c7d", "team-a1b2c3d4e5f6a7b8c9d0", "env:sk-proj-abc", "env: OPENAI_API_KEY",
    "Bearer abc", "eyJhbGciOiJIUzI1NiJ9.e30.abc", "env:hf_abcdefghijklmnop",
    "env:AIzaSyA1234567890abcdefghijklmnopqrstuv", "env:0123456789abcdef0123456789abcdef",
    "env:a1b2c3d4a1b2c3d4a1b2c3d4a1b2c3d4", "env:OPENAI_API_KEY\n", "abcdefghijklmnopqrstuvwxyzabcdef", "",
]  # fmt: skip
NAMES = [
    "env:OPENAI_API_KEY", "env:_x1", "env:hf_token", "env:GPT4O_2025_KEY", "env:GEMINI_2_5_PRO_KEY_OF_THE_JUDGES", "k",
    "judge-key", "api-key", "hf-token", "token-of-judge", "gemini-25-pro-key-of-team-7", "productionjudgekey",
    "gemini25flashprodkey", "llmjudgekey2025prod", "openai-api-key",
]  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_every_field_explains_itself_in_the_form(model: type[StageConfig]) -> None:
    """Its title is of words and says the unit; its bounds stand in its help, made from the field by code."""
    model()
    for name, spec in model.model_json_schema()["properties"].items():
        where, title, said = f"{model.__name__}.{name}", spec["title"], spec["description"]
        assert said, where
        assert not re.search(r"_|\b(Sft|Api|Usd|Bnb|Lr|Num|Eval|Val|Bf16|4bit|Jsonl)\b", title), title
        for ending, unit in (("_seconds", "(s)"), ("_usd", "US$"), ("_price", "US$"), ("_steps", "optimizer step")):
            assert not name.endswith(ending) or unit.lower() in title.lower(), title
        for kind in spec.get("anyOf", [spec]):
            for bound in {"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"} & set(kind):
                assert f"{kind[bound]:,}" in said, where
        assert {"type": "null"} not in spec.get("anyOf", []) or "empty:" not in said.lower(), where


def test_the_help_ends_with_what_may_be_given() -> None:
    said = {name: spec["description"] for name, spec in JudgingConfig.model_json_schema()["properties"].items()}
    assert said["temperature"].endswith("0 is the steadiest elsewhere. 0 to 2.")
    assert said["requests_per_minute"].endswith("None: no limit. At least 1.")


def test_settings_are_frozen_and_take_no_unknown_field() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        TrainingConfig.model_validate({"unknown_setting": 1})
    with pytest.raises(ValidationError, match="frozen"):
        TrainingConfig().beta = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_in_the_place_of_its_name_is_refused_and_not_printed(key: str) -> None:
    for place in ({"api_key": key}, {"panel": [{"model": "m", "api_key": key}]}):
        with pytest.raises(ValidationError, match=r"api_key.*\s.*must name a secret") as caught:
            PipelineConfig.model_validate({"judging": place})
        assert len(key) <= 6 or key[:12] not in str(caught.value)


def test_names_of_secrets_are_taken() -> None:
    judges = [{"model": name, "api_key": name} for name in NAMES]
    assert [judge.api_key for judge in JudgingConfig.model_validate({"panel": judges}).panel] == NAMES
    assert refusals({"judging": {"panel": judges}}) == []


def refusals(config: dict[str, Any]) -> list[str]:
    """Return what a Prefect server says against parameters, by the schema alone."""
    return [error.message for error in validate(config, PipelineConfig.model_json_schema())]


@pytest.mark.parametrize("key", [key for key in KEYS if not key.endswith("\n")])
def test_the_schema_refuses_a_key_too_so_that_no_server_stores_it(key: str) -> None:
    named = {"api_key": key}
    judging = {**named, "panel": [{"model": "m", **named}]}
    config = {"judging": judging, "generation": named, "promotion": named, "evaluation": {"judging": named}}
    assert len(refusals(config)) == 5, "one for each place"


def test_nor_does_the_schema_of_a_sweep_take_one_or_another_form_of_settings() -> None:
    schema = SweepConfig.model_json_schema()
    for name in ("judging.api_key", "judging.panel"):
        value = [{"model": "m", "api_key": KEYS[0]}] if name.endswith("panel") else KEYS[0]
        assert validate({"grid": {name: [value]}}, schema)
        assert validate({"changes": [{name: value}]}, schema)
    for wrong in ({"grid": {"training.beta": 0.1}}, {"grid": {"judging.api_key": "env:A"}}, {"changes": ["a.b"]}):
        assert validate(wrong, schema), wrong
    assert not validate({"grid": {"judging.api_key": ["env:A", "judge-key", None], "training.beta": [0.1]}}, schema)
    assert not validate({"changes": [{"judging.panel": [{"model": "m", "api_key": "env:A"}], "x": 1e-6}, {}]}, schema)


GREEDY = {"temperature": 0, "num_completions": 1}
WRONG: dict[str, tuple[type[StageConfig], dict[str, Any], str]] = {
    "another flow's deployment": (PipelineConfig, {"training_deployment": "judge-preferences/local"}, "train-dpo"),
    "a deployment without its flow": (PipelineConfig, {"training_deployment": "l4-spot"}, "train-dpo"),
    "equal completions": (GenerationConfig, {"temperature": 0}, r"temperature 0 .*num_completions \(3\)"),
    "pattern": (GenerationConfig, {"keep_lines": "["}, "keep_lines is not a regular expression"),
    "address": (GenerationConfig, {"endpoint": "localhost:8000"}, "endpoint"),
    "address with a password": (JudgingConfig, {"endpoint": "https://user:password@host/v1"}, "endpoint"),
    "address with a key": (PromotionConfig, {"endpoint": "https://host/v1?key=abc"}, "endpoint"),
    "a judge twice": (JudgingConfig, {"model": "m", "panel": [{"model": "m"}]}, "m is asked twice"),
    "one completion": (PipelineConfig, {"generation": {"num_completions": 1}}, "must be at least 2"),
    "free budget": (JudgingConfig, {"budget_usd": 5}, "budget_usd is 5 .*prompt_price"),
    "cap below one answer": (GenerationConfig, {"tokens_per_minute": 99}, r"tokens_per_minute \(99\) .*max_tokens"),
    "equal samples": (EvaluationConfig, {"generation": GREEDY}, r"generation.temperature 0 .*num_samples \(4\)"),
    "equal draws": (EvaluationConfig, {"generation": GREEDY, "num_samples": 1}, "null_test .*generation.temperature"),
    "smoothing": (TrainingConfig, {"label_smoothing": 0.1}, "works with loss_type robust alone, not with sigmoid"),
    "measured smoothing": (TrainingConfig, {"measured_label_smoothing": True, "loss_type": "hinge"},
        "measured_label_smoothing .*loss_type .*hinge"),
    "nothing smoothed": (TrainingConfig, {"loss_type": "robust"}, "loss_type robust .*label_smoothing"),
    "4 bits": (TrainingConfig, {"load_in_4bit": False, "bnb_4bit_quant_type": "fp4"}, "fp4 .*load_in_4bit"),
    "divergence": (TrainingConfig, {"loss_type": "apo_zero", "f_divergence": "forward_kl"}, "reverse_kl, not forward"),
    "warm-up": (TrainingConfig, {"max_steps": 10, "warmup_steps": 11}, r"warmup_steps \(11\) .*max_steps \(10\)"),
    "weighted SFT": (TrainingConfig, {"use_weighting": True, "sft_weight": 1}, "do not go together"),
    "nothing to feed": (PipelineConfig, {"judging": {"unsure_for_sft": True}}, "training.sft_weight is 0: set it to 1"),
    "too few to lie so far below": (PipelineConfig,
        {"judging": {"rejected_sigmas": 2}, "generation": {"num_completions": 5}},
        r"rejected_sigmas 2 does nothing with generation.num_completions 5: .* Take 6 or more"),
    "an endless price": (JudgingConfig, {"prompt_price": "1e999"}, r"prompt_price\n.*finite"),
    "a question of its own": (JudgingConfig, {"extra_body": {"n": 2, "stream": True}}, "extra_body: n, stream would"),
    "no number": (JudgingConfig, {"extra_body": {"min_p": float("nan")}}, "extra_body.min_p"),
    "no norm": (TrainingConfig, {"max_grad_norm": float("nan")}, "max_grad_norm"),
    "rotations": (PipelineConfig, {"judging": {"orders": 4}}, r"judging.orders \(4\) .*num_completions \(3\)"),
    "no room": (PipelineConfig, {"training": {"max_length": 256}},
        r"training.max_length \(256 .*generation.max_tokens \(256\)"),
    "unseen flips": (PipelineConfig,
        {"judging": {"orders": 1}, "training": {"loss_type": "robust", "measured_label_smoothing": True}},
        "measured_label_smoothing .*judging.orders"),
    "nothing held out": (PipelineConfig, {"judging": {"val_ratio": 0}}, "judging.val_ratio .*eval_prompts"),
    "bar out of reach": (PipelineConfig, {"evaluation": {"max_prompts": 2, "num_samples": 1}},
        r"promotion.min_win_rate \(0.5\) .*max_prompts \(2\) .*num_samples \(1\).*0.342"),
    "a second opinion of the labelling judge": (PipelineConfig,
        {"judging": {"model": "m"}, "evaluation": {"judges": [{"model": "m"}]}},
        "evaluation.judges: m made the labels"),
    "a second opinion twice": (EvaluationConfig, {"judges": [{"model": "m"}, {"model": "m"}]}, "judges: m .*another"),
    "nothing to choose": (EvaluationConfig, {"checkpoints": 1}, "checkpoints 1 .*nothing to choose"),
    "other checkpoints": (PipelineConfig, {"evaluation": {"checkpoints": 3}, "training": {"checkpoints": 2}},
        r"evaluation.checkpoints \(3\) .*training.checkpoints \(2\)"),
    "own place": (PipelineConfig, {"promotion": {"name": "sft"}}, "promotion.name and generation.model"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_refused_by_name(name: str) -> None:
    model, settings, message = WRONG[name]
    with pytest.raises(ValidationError, match=message):
        model.model_validate(settings)


def test_the_best_lower_bound_is_that_of_wilsons_interval() -> None:
    won = {str(i): [1.0] for i in range(50)}
    config = EvaluationConfig(max_prompts=50, num_samples=1)
    # For 50 prompts Student's quantile is a little over the normal one, which the config has, as it must load fast.
    assert 0 < config.best_lower_bound() - win_rate(compared(won), config.confidence).lower < 0.005


def test_sampling_settings_identify_a_generation_and_addresses_keys_and_limits_do_not() -> None:
    moved = GenerationConfig(
        endpoint="http://10.0.0.1:8000/v1", api_key="env:OTHER", max_concurrency=7, shard_size=5, prompt_price=3,
        budget_usd=9, max_failure_ratio=0.5, serve_from="/x", adapter="/y", requests_per_minute=3,
    )  # fmt: skip
    assert moved.identity() == GenerationConfig().identity()
    for name in ("temperature", "top_p", "max_tokens", "frequency_penalty", "seed", "num_completions"):
        changed = GenerationConfig.model_validate({name: {"temperature": 0.5, "top_p": 0.5}.get(name, 2)})
        assert changed.identity() != GenerationConfig().identity(), name


def test_what_is_applied_to_verdicts_later_does_not_identify_them() -> None:
    later = JudgingConfig.model_validate({"pair_policy": "borda", "min_confidence": 3, "val_ratio": 0.3})
    assert later.verdict_identity() == JudgingConfig().verdict_identity()
    assert later.identity() != JudgingConfig().identity()
    for change in ({"orders": 3}, {"seed": 1}, {"rubric": "demo"}, {"model": "m"}, {"max_tokens": 99}):
        assert JudgingConfig.model_validate(change).verdict_identity() != JudgingConfig().verdict_identity()


def test_a_panel_member_is_identified_by_its_model_and_not_by_its_address() -> None:
    def identity(**judge: Any) -> dict[str, Any]:
        return JudgingConfig.model_validate({"panel": [judge]}).verdict_identity()

    assert identity(model="m") != JudgingConfig().verdict_identity()
    assert identity(model="m", endpoint="http://other/v1", api_key=None) == identity(model="m")
    assert identity(model="m", temperature=0.5) != identity(model="m")


def test_a_filled_pipeline_writes_out_what_stages_share() -> None:
    filled = PipelineConfig.model_validate({"training": {"sft_adapter": "/a"}, "judging": {"model": "j"}}).filled()
    assert filled.generation.adapter == "/a"
    assert filled.evaluation.generation == filled.generation
    assert filled.evaluation.comparison_judge().model == "j"
    assert filled.filled() == filled


def test_a_training_keeps_what_the_evaluation_chooses_among_and_is_else_the_one_that_it_was() -> None:
    base = PipelineConfig.model_validate({"evaluation": {"checkpoints": 3}}).filled()
    assert base.training.checkpoints == base.training.identity()["checkpoints"] == 3
    assert "checkpoints" not in PipelineConfig().filled().training.identity()
