"""Is the training healthy? Every metric against its range, and advice computed from this run's own data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.config import TrainingConfig
from tasks.store.measures import Health, Metric
from tasks.train.invariants import loss_at_margin_zero

LEARNING = 0.55
STRONG = 0.70
# Below this mean reward of the chosen side the policy unlearns what it should prefer.
UNLEARNING = -0.1
# A trained fp32 adapter moves nearly all of its weights; one in bfloat16 moved 5 % at the default learning rate.
MOVED = 0.5
OVERFITTING = 1.02

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A run's metrics, with the evaluations (or, without any, the training rows) under plain names.

    Attributes:
        rows: of `metrics.jsonl`.
        training: the configuration.
        train_pairs: pairs trained on.
        eval_pairs: pairs evaluated on; 0 for none.
    """

    rows: Sequence[Row]
    training: TrainingConfig
    train_pairs: int
    eval_pairs: int

    @property
    def is_evaluated(self) -> bool:
        """Whether there are held-out readings."""
        return any("eval_loss" in row for row in self.rows)

    @property
    def readings(self) -> list[dict[str, float]]:
        """The rows that are judged, oldest first: held-out ones where there are any."""
        if not self.is_evaluated:
            return [dict(row) for row in self.rows if "loss" in row and row["step"] > 0]
        evaluated = [row for row in self.rows if "eval_loss" in row]
        return [{name.removeprefix("eval_"): value for name, value in row.items()} for row in evaluated]

    def last(self, name: str) -> float | None:
        """Return the newest training row's value of `name`."""
        return next((row[name] for row in reversed(self.rows) if name in row), None)

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return int(max((row["step"] for row in self.rows), default=0))

    @property
    def chance(self) -> float:
        """How far from 0.5 the accuracy of a policy that knows nothing may lie (two standard errors)."""
        return 1.0 / math.sqrt(self.eval_pairs) if self.eval_pairs else 0.0


def assess(run: Run) -> Health:
    """Hold every metric of a run against its healthy range."""
    judged = run.readings
    held_out = f"{run.eval_pairs} held-out pairs" if run.is_evaluated else "the training batches (no held-out pairs)"
    source = f"step {run.steps}, {held_out}"
    if not judged:
        return Health(source=source)
    readings = tuple(_readings(run, judged[0], judged[-1]))
    warnings, advice = tuple(_warnings(run, judged)), tuple(_advice(run, judged[-1]))
    return Health(source=source, readings=readings, warnings=warnings, advice=advice)


def _readings(run: Run, first: Row, last: Row) -> list[Metric]:
    accuracy, margin = last["rewards/accuracies"], last["rewards/margins"]
    chosen, rejected = last["rewards/chosen"], last["rewards/rejected"]
    beta = run.training.beta
    moved = run.last("weights/moved")
    learned = "strong" if accuracy > STRONG else "learning" if accuracy > LEARNING else "not learning"
    if run.chance and abs(accuracy - 0.5) <= run.chance:
        learned = f"at chance: a policy that learned nothing shows 0.5 +- {run.chance:.2f} on {run.eval_pairs} pairs"
    readings = [
        _reading("rewards/accuracies", accuracy, f"> {LEARNING}, strong > {STRONG}",
                accuracy > max(LEARNING, 0.5 + run.chance), learned),
        _reading("rewards/margins", margin, "> 0 and rising", margin > 0 and margin >= first["rewards/margins"],
                "chosen is preferred" if margin > 0 else "rejected is preferred"),
        _reading("rewards/chosen", chosen, f"rising or stable, never below {UNLEARNING}", chosen >= UNLEARNING,
                "kept" if chosen >= UNLEARNING else "the policy unlearns the chosen side"),
        _reading("rewards/rejected", rejected, "falls against chosen", rejected < chosen,
                "below chosen" if rejected < chosen else "not below chosen"),
        _reading("logps/chosen", last["logps/chosen"], "rising or stable", chosen >= UNLEARNING,
                f"{chosen / beta:+.2f} nats against the reference"),
        _reading("logps/rejected", last["logps/rejected"], "falls, or rises less than chosen", rejected < chosen,
                f"{rejected / beta:+.2f} nats against the reference"),
    ]  # fmt: skip
    if run.is_evaluated:
        loss, start = last["loss"], loss_at_margin_zero(run.training)
        falls = loss <= first["loss"] or (run.training.sft_weight == 0 and loss < start)
        readings.append(_reading("eval_loss", loss, "falling", falls, f"{first['loss']:.4f} at the first evaluation"))
    if moved is not None:
        readings.append(
            _reading("weights/moved", moved, f"> {MOVED}", moved > MOVED,
                    f"moved by {run.last('weights/distance') or 0:.2g} of their norm")
        )  # fmt: skip
    return readings


def _reading(name: str, value: float, healthy: str, ok: bool, meaning: str) -> Metric:
    return Metric(name=name, title=name, value=value, healthy=healthy, ok=ok, meaning=meaning)


def _warnings(run: Run, judged: Sequence[Row]) -> list[str]:
    first, last = judged[0], judged[-1]
    found = []
    rose = last["rewards/accuracies"] - (first["rewards/accuracies"] if len(judged) > 1 else 0.5)
    fell = last["rewards/chosen"] - (first["rewards/chosen"] if len(judged) > 1 else 0.0)
    if rose > 0 and fell < 0:
        found.append(
            f"accuracy rose ({rose:+.3f}, to {last['rewards/accuracies']:.3f}) while rewards/chosen fell ({fell:+.4f}, "
            f"to {last['rewards/chosen']:.4f}): the policy makes both sides less likely, the rejected one faster. "
            "Accuracy alone says nothing about the samples: wait for the win rate"
            + ("." if run.training.sft_weight else ", or set sft_weight to 1.")
        )
    losses = [row["loss"] for row in judged] if run.is_evaluated else []
    if losses and losses[-1] > min(losses) * OVERFITTING:
        found.append(
            f"eval_loss is {losses[-1]:.4f} after a minimum of {min(losses):.4f}: overfitting. Train fewer epochs, or "
            "at a lower learning rate."
        )
    return found


def _advice(run: Run, last: Row) -> list[str]:
    training, found = run.training, []
    moved = run.last("weights/moved")
    learns = last["rewards/accuracies"] > max(LEARNING, 0.5 + run.chance) and last["rewards/margins"] > 0
    stands_still = moved is not None and moved <= MOVED
    if stands_still:
        found.append(
            f"Only {moved or 0:.0%} of the adapter's weights moved: raise learning_rate (now "
            f"{training.learning_rate:g}) tenfold."
        )
    if not learns:
        found += _not_learning(run, last, stands_still)
    if last["rewards/chosen"] < UNLEARNING:
        ways = []
        if training.beta < 10:
            ways.append(f"raise beta (now {training.beta:g}) to {min(10.0, training.beta * 3):g}")
        if training.sft_weight < 1:
            ways.append(f"set sft_weight to 1 (now {training.sft_weight:g})")
        ways.append(f"lower learning_rate (now {training.learning_rate:g})")
        found.append(f"rewards/chosen is {last['rewards/chosen']:.3f}: {', or '.join(ways[:2])}.")
    return found


def _not_learning(run: Run, last: Row, stands_still: bool) -> list[str]:
    training = run.training
    seen = f"accuracy {last['rewards/accuracies']:.2f}, margin {last['rewards/margins']:.3f}: not learning"
    beta = f"lower beta to {training.beta / 2:g}" if training.beta > 0.01 else f"beta is {training.beta:g} already"
    found = [
        f"{seen}; {beta}: a weak signal may be held too close to the reference.",
        "Use a stronger judge: best and worst must really differ. Its flip rate is in the quality report.",
        "Sample more completions per prompt (5 rather than 3): the extremes lie further apart.",
        "Raise the sampling temperature to 1.0-1.2 for more varied completions; above that they become incoherent.",
        f"Judge more prompts: this run had {run.train_pairs} pairs and {run.steps} steps.",
    ]
    if training.max_steps is None and training.num_train_epochs < 2:
        epochs, rate = training.num_train_epochs, training.learning_rate
        slower = "" if stands_still else f" at a learning rate of {rate / 5:g} (now {rate:g})"
        found.append(f"Train 2-3 epochs (now {epochs:g}){slower}.")
    if run.steps and training.warmup_steps > max(1, run.steps // 10):
        found.append(
            f"Shorten the warm-up: {training.warmup_steps} of {run.steps} steps ran below the full learning rate; "
            f"{max(1, run.steps // 10)} are enough."
        )
    return found
