"""What must hold in every training. Each check raises `InvariantError`: exit code 42, a cause and a remedy."""

import math
from collections.abc import Mapping

from tasks.config import TrainingConfig
from tasks.errors import PreflowError

FIRST_LOSS_TOLERANCE = 1e-3
MARGIN_TOLERANCE = 1e-3
# Saved and running adapter give equal log-probs; bfloat16 autocast may round differently between two kernels.
SAVED_LOGPS_TOLERANCE = 1e-3


class InvariantError(PreflowError):
    """An invariant of training is broken; `name` says which."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"invariant {name}: {message}")
        self.name = name


def loss_at_margin_zero(training: TrainingConfig) -> float:
    """Return the DPO loss where policy and reference agree, without an added SFT term.

    Sigmoid, robust and sigmoid_norm: ln 2 (Rafailov et al. 2023, eq. 7; label smoothing does not change it); hinge: 1;
    apo_zero: 1 (D'Oosterlinck et al. 2024, eq. 7); ipo: (1 / (2 beta))^2 (Azar et al. 2023, eq. 17). The divergences
    that are offered change none of them.
    """
    if training.loss_type in ("hinge", "apo_zero"):
        return 1.0
    if training.loss_type == "ipo":
        return (0.5 / training.beta) ** 2
    return math.log(2)


def check_first_loss(measured: Mapping[str, float], training: TrainingConfig) -> None:
    """Check loss (without the SFT term) and margin on the first batches, before the first update of a fresh start."""
    expected = loss_at_margin_zero(training)
    margin = max(abs(measured[name]) for name in ("rewards/margins", "rewards/chosen", "rewards/rejected"))
    # What was checked before is no cause any more.
    cause = (
        "Both hold the SFT adapter's weights, by digest, and the base's are finite numbers; so they were computed "
        "differently, or the reference log-probs are not of these pairs. Set cache_reference to false and run again: "
        "if it starts then, delete the folder reference-logprobs of the workspace."
    )
    if margin <= MARGIN_TOLERANCE:
        cause = "They agree, so something else than DPO is in the loss: is trl the version of pyproject.toml?"
    elif not math.isfinite(margin):
        cause = (
            "All weights of base and adapter are finite numbers, so their products are not: set bf16, or "
            "bnb_4bit_compute_dtype bfloat16 or float32."
        )
    differ = f"policy and reference differ by {margin:.6f} in reward"
    if not abs(measured["loss"] - expected) <= FIRST_LOSS_TOLERANCE * max(1.0, expected):
        told = f"the {training.loss_type} loss before the first update is {measured['loss']:.6f}, where it must be "
        raise InvariantError("first-loss", f"{told}{expected:.6f}; {differ}. {cause}")
    if not margin <= MARGIN_TOLERANCE:
        raise InvariantError("first-margin", f"{differ} before the first update, where they must be equal. {cause}")


def check_nothing_random(training_mode: float, evaluation_mode: float, named: str) -> None:
    """Check that a micro-batch has the same loss in training and evaluation mode; `named` is what was switched off."""
    if not abs(training_mode - evaluation_mode) <= FIRST_LOSS_TOLERANCE * max(1.0, abs(evaluation_mode)):
        raise InvariantError(
            "nothing-random",
            f"the same pairs have the loss {training_mode:.6f} in training mode and {evaluation_mode:.6f} in evaluation"
            f" mode, though dropout is off ({named}): the base model does something else while it trains. Give a base "
            "without it, or set disable_dropout to false to train with it.",
        )


def check_resumed_margin(measured: Mapping[str, float], weights_moved: bool) -> None:
    """Check that a resumed policy is not the SFT policy again."""
    if weights_moved and measured["rewards/chosen"] == 0 and measured["rewards/rejected"] == 0:
        raise InvariantError(
            "resumed-margin",
            "after resuming, policy and reference give equal log-probs, though the checkpoint's weights had moved: the "
            "checkpoint was loaded into the reference too, or not at all. Delete the newest checkpoint and run again.",
        )


def check_reference(found: str, expected: str, what: str) -> None:
    """Check the digest of the reference's weights, taken from `what`, against that of the SFT adapter's."""
    if found != expected:
        raise InvariantError(
            "reference-is-sft",
            f"the weights of {what} have digest {found[:12]}, those of the SFT adapter {expected[:12]}. The policy was "
            "built from something else than the SFT adapter (a checkpoint?), so training would pull towards the wrong "
            "model. Give the SFT adapter as sft_adapter, and never a checkpoint of this training.",
        )


def check_resumed_weights(found: str, expected: str) -> None:
    """Check that the policy's weights after a resume are those of the checkpoint, by digest."""
    if found != expected:
        raise InvariantError(
            "resumed-weights",
            f"after resuming, the policy's weights have digest {found[:12]}, the checkpoint says {expected[:12]}. "
            "Delete that checkpoint and run again: the one before it is taken.",
        )


def check_trainable_precision(dtypes: Mapping[str, str]) -> None:
    """Check that every trainable weight is fp32, and that there are some."""
    wrong = {name: dtype for name, dtype in dtypes.items() if dtype != "torch.float32"}
    if wrong or not dtypes:
        example = ", ".join(f"{name} is {dtype}" for name, dtype in list(wrong.items())[:2]) or "nothing is trainable"
        raise InvariantError(
            "trainable-fp32",
            f"the trainable adapter must be fp32 ({example}); in bfloat16 small updates are rounded away. Check the "
            "installed trl and peft versions against pyproject.toml.",
        )


def check_gradient(norm: float, step: int) -> None:
    """Check that the gradient's norm is finite, before the update with it."""
    if not math.isfinite(norm):
        raise InvariantError(
            "finite-gradient",
            f"the gradient of step {step} has norm {norm}. Base and adapter held only finite numbers when they were "
            "loaded. Lower learning_rate, or look for pairs with empty or extremely long sides; the checkpoint before "
            "this step is unharmed.",
        )


def check_weights_moved(moved: float, step: int) -> None:
    """Check that a share of the adapter's weights `moved` after an update with a learning rate over 0."""
    if not moved > 0:
        raise InvariantError(
            "adapter-moves",
            f"after step {step} not one weight of the adapter has changed: all gradients were zero, or learning_rate "
            "is so small that fp32 cannot hold the updates. It would be the SFT adapter again, so it is not committed. "
            "Check that the pairs have two different sides, and raise learning_rate.",
        )


def check_saved_logps(running: Mapping[str, float], saved: Mapping[str, float]) -> None:
    """Check that the adapter as saved gives the log-probs of the adapter as trained."""
    for name in ("logps/chosen", "logps/rejected"):
        if not abs(running[name] - saved[name]) <= SAVED_LOGPS_TOLERANCE * max(1.0, abs(running[name])):
            raise InvariantError(
                "saved-adapter",
                f"{name} is {running[name]:.6f} with the trained adapter and {saved[name]:.6f} with the saved one, "
                "loaded again. The adapter was not committed: run again; it goes on from its last checkpoint.",
            )
