"""The health page: ranges, warnings and advice, from the run's own numbers."""

import json
from typing import Any

import pytest

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
FALLING = evaluation(58, 0.80, -0.3, -0.9, 0.55)


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
    text = "\n".join(assess(run(FIRST)).advice)
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


def test_without_held_out_pairs_the_training_rows_are_judged_and_it_is_said() -> None:
    health = assess(run([{"step": 0, "loss": 0.69}, trained(10), trained(20)], eval_pairs=0))
    assert "no held-out pairs" in health.source
    assert "eval_loss" not in {reading.name for reading in health.readings}


SHRINKING = [evaluation(25, 0.7, 0.3, -0.1, 0.60), evaluation(58, 0.7, 0.1, -0.1, 0.66)]


@pytest.mark.parametrize(
    ("rows", "changes", "bad", "said", "unsaid"),
    [
        ([trained(10), evaluation(25, 0.60, 0.02, -0.1, 0.65), FALLING], {}, "rewards/chosen",
         ("accuracy rose (+0.200, to 0.800) while rewards/chosen fell (-0.32",
          "rewards/chosen is -0.300: raise beta (now 0.1) to 0.3"), "overfitting"),
        ([FALLING], {}, "rewards/chosen", ("accuracy rose (+0.300",), "overfitting"),  # held against the start
        (SHRINKING, {}, "rewards/margins", ("overfitting",), "rewards/chosen is"),
        (FIRST, {"beta": 0.01}, "rewards/margins", ("beta is 0.01 already",), "lower beta to"),
        # 5 % of its weights had moved
        (FIRST, {}, "weights/moved", ("raise learning_rate",), "at a learning rate of"),
        (FIRST, {"num_train_epochs": 3}, "weights/moved", ("Judge more prompts",), "epochs"),
        ([trained(10), FALLING], {"sft_weight": 1.0, "beta": 10.0}, "rewards/chosen",
         ("lower learning_rate (now 5e-06)", "accuracy rose"), "raise beta"),
        ([trained(10), FALLING], {"sft_weight": 1.0, "beta": 10.0}, "rewards/chosen", (), "sft_weight"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_warned_of_and_no_advice_is_followed_already(
    rows: list[dict[str, Any]], changes: dict[str, Any], bad: str, said: tuple[str, ...], unsaid: str
) -> None:
    health = assess(run(rows, **changes))
    text = "\n".join((*health.warnings, *health.advice))
    assert all(part in text for part in said)
    assert unsaid not in text
    assert not reading(rows, bad, **changes).ok
