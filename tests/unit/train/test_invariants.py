"""Each invariant lets the healthy value pass and stops the broken one by name."""

import math
from collections.abc import Callable

import pytest

from tasks.config import TrainingConfig
from tasks.train import invariants
from tasks.train.invariants import InvariantError

ZERO = {"rewards/margins": 0.0, "rewards/chosen": 0.0, "rewards/rejected": 0.0}
SHIFTED = {"loss": math.log(2), "rewards/margins": 0.0, "rewards/chosen": 0.02, "rewards/rejected": 0.02}
LOGPS = {"logps/chosen": -40.0, "logps/rejected": -50.0}
A, B = "a" * 64, "b" * 64
FP32 = {"a": "torch.float32"}


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
    for wrong in (expected * 1.05, math.nan):
        with pytest.raises(InvariantError, match=r"invariant first-loss: .*They agree, so something else than DPO"):
            invariants.check_first_loss({"loss": wrong, **ZERO}, training)


@pytest.mark.parametrize(("margin", "named"), [(0.3, "computed differently"), (math.nan, "weights .* are finite")])
def test_a_first_loss_names_no_cause_that_was_not_checked(margin: float, named: str) -> None:
    measured = {"loss": 0.7, "rewards/margins": margin, "rewards/chosen": margin, "rewards/rejected": 0.0}
    with pytest.raises(InvariantError, match=named) as raised:
        invariants.check_first_loss(measured, TrainingConfig())
    assert "is not the SFT policy" not in str(raised.value)


@pytest.mark.parametrize(
    ("check", "healthy", "broken", "message"),
    [
        (invariants.check_first_loss, ({"loss": math.log(2), **ZERO}, TrainingConfig()), (SHIFTED, TrainingConfig()),
         "first-margin"),
        (invariants.check_nothing_random, (0.6931, 0.6932, "modules"), (0.71, 0.6931, "modules"),
         r"nothing-random: .*0\.693100 in evaluation mode"),
        (invariants.check_nothing_random, (0.6931, 0.6931, "modules"), (math.nan, 0.6931, "modules"), "nothing-random"),
        (invariants.check_resumed_margin, (ZERO, False), (ZERO, True), "resumed-margin"),
        (invariants.check_resumed_margin, ({**ZERO, "rewards/chosen": 1e-7}, True), (ZERO, True), "resumed-margin"),
        (invariants.check_reference, (A, A, "the reference"), (A, B, "the reference"), "reference-is-sft.*the referen"),
        (invariants.check_resumed_weights, (A, A), (A, B), "resumed-weights"),
        (invariants.check_trainable_precision, (FP32,), ({**FP32, "b": "torch.bfloat16"},), "trainable-fp32"),
        (invariants.check_trainable_precision, (FP32,), ({},), "trainable-fp32: .*nothing is trainable"),
        (invariants.check_gradient, (0.0, 3), (math.nan, 3), "finite-gradient: the gradient of step 3"),
        (invariants.check_gradient, (1e9, 3), (math.inf, 3), "finite-gradient"),
        (invariants.check_weights_moved, (1e-9, 1), (0.0, 1), "adapter-moves"),
        (invariants.check_saved_logps, (LOGPS, {**LOGPS, "logps/chosen": -40.01}), (LOGPS, {**LOGPS,
         "logps/rejected": -51.0}), "saved-adapter: logps/rejected"),
        (invariants.check_saved_logps, (LOGPS, LOGPS), (LOGPS, {**LOGPS, "logps/rejected": math.nan}), "saved-adapter"),
    ],
)  # fmt: skip
def test_the_healthy_value_passes_and_the_broken_one_stops(
    check: Callable[..., None], healthy: tuple[object, ...], broken: tuple[object, ...], message: str
) -> None:
    check(*healthy)
    with pytest.raises(InvariantError, match=f"invariant {message}"):
        check(*broken)
