"""The health page: ranges, warnings and advice, from the run's own numbers; and the pictures."""

import json
from typing import Any

from tasks.config import TrainingConfig
from tasks.train.health import Run, assess


def evaluation(step: int, accuracy: float, chosen: float, rejected: float, loss: float) -> dict[str, Any]:
    values = {
        "loss": loss, "rewards/accuracies": accuracy, "rewards/margins": chosen - rejected, "rewards/chosen": chosen,
        "rewards/rejected": rejected, "logps/chosen": -40.0, "logps/rejected": -60.0,
    }  # fmt: skip
    return {"step": step, **{f"eval_{name}": value for name, value in values.items()}}


def trained(step: int, moved: float = 1.0) -> dict[str, Any]:
    row = {name.removeprefix("eval_"): value for name, value in evaluation(step, 0.6, 0.1, 0.0, 0.65).items()}
    return {**row, "grad_norm": 1.0, "weights/moved": moved, "weights/distance": 0.01}


GOOD = [trained(10), evaluation(25, 0.62, 0.05, -0.05, 0.66), trained(50), evaluation(58, 0.74, 0.10, -0.20, 0.60)]
# The first system's run: accuracy 0.461, margin -0.345.
FIRST = [trained(50, moved=0.05), evaluation(58, 0.461, -0.2, 0.145, 1.588)]


def run(rows: list[dict[str, Any]], eval_pairs: int = 102, **changes: Any) -> Run:
    return Run(rows, TrainingConfig(**changes), train_pairs=919, eval_pairs=eval_pairs)


def reading(rows: list[dict[str, Any]], name: str, **options: Any) -> Any:
    return next(reading for reading in assess(run(rows, **options)).readings if reading.name == name)


def test_a_good_run_is_healthy_and_gets_no_advice() -> None:
    health = assess(run(GOOD))
    assert health.ok
    assert (health.warnings, health.advice) == ((), ())
    assert {reading.name for reading in health.readings} == {
        "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected",
        "eval_loss", "weights/moved",
    }  # fmt: skip
    assert reading(GOOD, "rewards/accuracies").meaning == "strong"
    json.dumps(health.model_dump())


def test_the_first_systems_run_is_told_what_to_try_in_the_known_order() -> None:
    health = assess(run(FIRST))
    assert not health.ok
    text = "\n".join(health.advice)
    words = ["learning_rate", "accuracy 0.46, margin -0.345: not learning; lower beta to 0.05", "stronger judge",
             "more completions", "temperature", "919 pairs and 58 steps", "epochs", "20 of 58 steps"]  # fmt: skip
    places = [text.index(word) for word in words]
    assert places == sorted(places)
    assert not reading(FIRST, "weights/moved").ok


def test_an_accuracy_at_chance_is_called_so() -> None:
    """Labels shuffled: nothing can be learned, and the accuracy of few pairs still is not 0.5."""
    rows = [evaluation(25, 0.52, 0.0, 0.0, 0.69), evaluation(58, 0.57, 0.02, 0.01, 0.69)]
    found = reading(rows, "rewards/accuracies")
    assert not found.ok
    assert "at chance" in found.meaning
    assert reading(rows, "rewards/accuracies", eval_pairs=10_000).ok


def test_accuracy_that_rises_while_chosen_falls_is_warned_of() -> None:
    rows = [trained(10), evaluation(25, 0.60, 0.02, -0.1, 0.65), evaluation(58, 0.80, -0.3, -0.9, 0.55)]
    health = assess(run(rows))
    assert any("accuracy rose (+0.200, to 0.800) while rewards/chosen fell (-0.32" in text for text in health.warnings)
    assert any("rewards/chosen is -0.300: raise beta (now 0.1) to 0.3" in text for text in health.advice)
    assert not reading(rows, "rewards/chosen").ok


def test_one_evaluation_is_held_against_the_start() -> None:
    health = assess(run([evaluation(58, 0.80, -0.3, -0.9, 0.55)]))
    assert any("accuracy rose" in text for text in health.warnings)


def test_overfitting_and_a_margin_that_shrinks_are_seen() -> None:
    rows = [evaluation(25, 0.7, 0.3, -0.1, 0.60), evaluation(58, 0.7, 0.1, -0.1, 0.66)]
    assert any("overfitting" in text for text in assess(run(rows)).warnings)
    assert not reading(rows, "rewards/margins").ok


def test_without_held_out_pairs_the_training_rows_are_judged_and_it_is_said() -> None:
    health = assess(run([{"step": 0, "loss": 0.69}, trained(10), trained(20)], eval_pairs=0))
    assert "no held-out pairs" in health.source
    assert "eval_loss" not in {reading.name for reading in health.readings}


def test_advice_goes_one_way_and_no_further_than_is_sensible() -> None:
    assert "beta is 0.01 already" in "\n".join(assess(run(FIRST, beta=0.01)).advice)
    advice = " ".join(assess(run(FIRST)).advice)  # 5 % of its weights had moved
    assert "raise learning_rate" in advice
    assert "at a learning rate of" not in advice


def test_no_advice_is_given_that_is_followed_already() -> None:
    falling = [trained(10), evaluation(58, 0.9, -0.2, -1.0, 0.6)]
    health = assess(run(falling, sft_weight=1.0, beta=10.0, num_train_epochs=3))
    text = " ".join((*health.warnings, *health.advice))
    assert "sft_weight" not in text
    assert "raise beta" not in text
    assert "lower learning_rate (now 5e-06)" in text
    hopeless = assess(run(FIRST, num_train_epochs=3))
    assert "epochs" not in " ".join(hopeless.advice)
