"""Each invariant lets the healthy value pass and stops the broken one by name."""

import math

import pytest

from tasks.config import TrainingConfig
from tasks.train import invariants
from tasks.train.invariants import InvariantError

ZERO = {"rewards/margins": 0.0, "rewards/chosen": 0.0, "rewards/rejected": 0.0}


@pytest.mark.parametrize(
    ("loss_type", "beta", "expected"),
    [
        ("sigmoid", 0.1, math.log(2)),
        ("robust", 0.1, math.log(2)),
        ("sigmoid_norm", 0.5, math.log(2)),
        ("hinge", 0.1, 1.0),
        ("apo_zero", 0.1, 1.0),
        ("ipo", 0.1, 25.0),
        ("ipo", 0.5, 1.0),
    ],
)
def test_first_loss_is_held_against_the_value_at_margin_zero(loss_type: str, beta: float, expected: float) -> None:
    smoothing = 0.1 if loss_type == "robust" else 0.0
    training = TrainingConfig(loss_type=loss_type, beta=beta, label_smoothing=smoothing)
    invariants.check_first_loss({"loss": expected + 9e-4, **ZERO}, training)
    with pytest.raises(InvariantError, match=r"invariant first-loss: .*They agree, so something else than DPO"):
        invariants.check_first_loss({"loss": expected * 1.05, **ZERO}, training)


@pytest.mark.parametrize(("margin", "named"), [(0.3, "computed differently"), (math.nan, "weights .* are finite")])
def test_a_first_loss_names_no_cause_that_was_not_checked(margin: float, named: str) -> None:
    measured = {"loss": 0.7, "rewards/margins": margin, "rewards/chosen": margin, "rewards/rejected": 0.0}
    with pytest.raises(InvariantError, match=named) as raised:
        invariants.check_first_loss(measured, TrainingConfig())
    assert "is not the SFT policy" not in str(raised.value)


def test_a_model_that_is_random_while_it_trains_stops() -> None:
    invariants.check_nothing_random(0.6931, 0.6932, "modules")
    for value in (0.71, math.nan):
        with pytest.raises(InvariantError, match=r"nothing-random: .*0\.693100 in evaluation mode"):
            invariants.check_nothing_random(value, 0.6931, "modules")


def test_first_margin_is_zero() -> None:
    shifted = {"loss": math.log(2), "rewards/margins": 0.0, "rewards/chosen": 0.02, "rewards/rejected": 0.02}
    with pytest.raises(InvariantError, match="first-margin"):
        invariants.check_first_loss(shifted, TrainingConfig())


def test_a_loss_that_is_not_a_number_stops() -> None:
    with pytest.raises(InvariantError, match="first-loss"):
        invariants.check_first_loss({"loss": math.nan, **ZERO}, TrainingConfig())


def test_a_resumed_policy_is_not_the_reference_again() -> None:
    invariants.check_resumed_margin(ZERO, weights_moved=False)
    invariants.check_resumed_margin({**ZERO, "rewards/chosen": 1e-7}, weights_moved=True)
    with pytest.raises(InvariantError, match="resumed-margin"):
        invariants.check_resumed_margin(ZERO, weights_moved=True)


def test_reference_and_resumed_weights_are_compared_by_digest() -> None:
    invariants.check_reference("a" * 64, "a" * 64, "the reference")
    with pytest.raises(InvariantError, match=r"reference-is-sft.*the reference"):
        invariants.check_reference("a" * 64, "b" * 64, "the reference")
    with pytest.raises(InvariantError, match="resumed-weights"):
        invariants.check_resumed_weights("a" * 64, "b" * 64)


def test_trainable_weights_are_fp32_and_there_are_some() -> None:
    invariants.check_trainable_precision({"a": "torch.float32"})
    for wrong in ({"a": "torch.float32", "b": "torch.bfloat16"}, {}):
        with pytest.raises(InvariantError, match="trainable-fp32"):
            invariants.check_trainable_precision(wrong)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_the_update(norm: float) -> None:
    invariants.check_gradient(0.0, 3)
    with pytest.raises(InvariantError, match="finite-gradient: the gradient of step 3"):
        invariants.check_gradient(norm, 3)


def test_an_adapter_that_does_not_move_stops() -> None:
    invariants.check_weights_moved(1e-9, 1)
    with pytest.raises(InvariantError, match="adapter-moves"):
        invariants.check_weights_moved(0.0, 1)


def test_a_saved_adapter_gives_the_log_probs_of_the_trained_one() -> None:
    running = {"logps/chosen": -40.0, "logps/rejected": -50.0}
    invariants.check_saved_logps(running, {"logps/chosen": -40.01, "logps/rejected": -50.0})
    for wrong in (-41.0, math.nan):
        with pytest.raises(InvariantError, match="saved-adapter: logps/rejected"):
            invariants.check_saved_logps(running, {"logps/chosen": -40.0, "logps/rejected": wrong})
