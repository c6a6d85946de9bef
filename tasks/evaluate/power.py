"""Power before price: what an evaluation can show, and how many held-out prompts it takes to show more."""

import math
from bisect import bisect_left
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median

from pydantic import ValidationError

from tasks.config import EvaluationConfig, PipelineConfig
from tasks.evaluate.intervals import quantile, spread
from tasks.store.measures import Evaluation, percent
from tasks.store.prompts import import_prompts
from tasks.store.workspace import Workspace

# The share of runs in which an adapter that is truly so good passes the gate.
POWER = 0.8
# Where the workspace holds no evaluation yet: in two orders a third of the comparisons tie, as judges of close texts
# do, and two samples of a prompt agree by 0.3 more than chance.
TIES, ALIKE = 0.3, 0.3
MOST_PROMPTS = 10_000_000
# Between checkpoints of one training, a difference that is worth the choice.
LEAD = 0.1


@dataclass(frozen=True)
class Design:
    """What decides how surely an evaluation measures.

    Attributes:
        prompts: held-out prompts.
        samples: of each prompt and adapter.
        ties: share of the comparisons that count half.
        design_effect: how many times more comparisons it takes than if all were independent (Kish 1965).
        per_cluster: comparisons that are alike: samples of a prompt, or of all prompts of a group.
    """

    prompts: int
    samples: int
    ties: float
    design_effect: float
    per_cluster: float

    def standard_error(self, rate: float) -> float:
        """Return the standard error of the win rate, if that is truly `rate`."""
        ties = min(self.ties, 2 * rate, 2 * (1 - rate))
        return math.sqrt(self.design_effect * spread(rate, ties) / (self.prompts * self.samples))

    def finds(self, lead: float, checkpoints: int) -> float:
        """Return the probability that the best checkpoint is chosen, if it truly wins `lead` more than each other one.

        Their rates are taken as independent and normal; that they share the SFT adapter's samples makes it likelier.
        """
        from scipy.integrate import quad
        from scipy.stats import norm

        error = max(1e-9, self.standard_error(0.5))
        chance = quad(lambda x: norm.pdf(x) * norm.cdf(x + lead / error) ** (checkpoints - 1), -8, 8)[0]
        return float(chance)

    def power(self, rate: float, bar: float, confidence: float) -> float:
        """Return the probability that an adapter whose true win rate is `rate` gets a lower bound over `bar`.

        Wilson's bound is over the bar where the measured rate is over `bar` + q sqrt(bar (1 - bar) / n), with n the
        effective samples; what is measured scatters by the standard error, which is itself estimated from the
        clusters: a noncentral t distribution, which for many clusters is the normal one.
        """
        from scipy.stats import nct, norm

        error, clusters = self.standard_error(rate), self.prompts * self.samples / self.per_cluster
        if error == 0:
            return float(rate > bar)
        q = quantile(confidence, clusters)
        wilson = math.sqrt(bar * (1 - bar) / max(1e-9, rate * (1 - rate)))
        needed, shift = q * wilson, (rate - bar) / error
        if clusters > 100 or abs(needed - shift) > 8:
            return float(norm.sf(needed - shift))
        return float(nct.sf(needed, max(1.0, clusters - 1), shift))


def smallest_detectable(design: Design, bar: float = 0.5, confidence: float = 0.95) -> float:
    """Return the smallest true win rate that passes the gate in a share POWER of runs; 1.0 if none does."""
    low, high = bar, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if design.power(middle, bar, confidence) >= POWER else (middle, high)
    return round(high, 4)


def prompts_needed(design: Design, rate: float, bar: float = 0.5, confidence: float = 0.95) -> int:
    """Return the held-out prompts it takes to pass an adapter of true win rate `rate`, over `bar`, in POWER of runs."""
    counts = range(1, MOST_PROMPTS)
    return 1 + bisect_left(counts, POWER, key=lambda count: replace(design, prompts=count).power(rate, bar, confidence))


def design_of(measured: Evaluation, prompts: int | None = None, samples: int | None = None) -> Design:
    """Return the design that an evaluation turned out to have, or that of another number of prompts or samples.

    The gate looks at the lower of two bounds; the less sure of the two rates decides.
    """
    effect = 1.0
    for rate in (rate for rate in (measured, measured.length_controlled) if rate is not None):
        here, scatter = rate.win_rate * (1 - rate.win_rate), spread(rate.win_rate, rate.ties)
        lost = here / scatter if scatter > 1e-9 else 1.0  # where all tie, nothing scatters
        effect = max(effect, rate.samples / max(1e-9, rate.effective_samples) * lost)
    had = measured.samples / max(1, measured.prompts)
    per_cluster = measured.samples / max(1, measured.clusters)
    samples, prompts = samples or max(1, round(had)), prompts or max(1, measured.prompts)
    grown = per_cluster * samples / had
    alike = (effect - 1) / (per_cluster - 1) if per_cluster > 1 else ALIKE
    return Design(prompts, samples, measured.ties, 1 + max(0.0, grown - 1) * alike, grown)


def plan_design(workspace: str, evaluation: EvaluationConfig, held_out: int) -> Design:
    """Return the design of an evaluation that is yet to be made, going by those in the workspace, or by defaults."""
    store, designs = Workspace(workspace), list[Design]()
    prompts, samples = min(held_out, evaluation.max_prompts), evaluation.num_samples
    for name in store.folders(store.uri("evaluations")):
        # There may be none yet, or one of another version.
        with suppress(FileNotFoundError, ValidationError):
            found = Evaluation.model_validate(store.read_json(store.uri("evaluations", name, "win_rate.json")))
            designs.append(design_of(found, prompts, samples))
    if not designs:
        return Design(prompts, samples, TIES, 1 + (samples - 1) * ALIKE, samples)
    return Design(
        prompts,
        samples,
        median(design.ties for design in designs),
        median(design.design_effect for design in designs),
        median(design.per_cluster for design in designs),
    )


def power_before_price(config: PipelineConfig, usd_per_verdict: float = 0.0) -> str:
    """Say what the evaluation of a run can show, and what showing half the gain takes, with the price of both.

    `usd_per_verdict` is of all judges together; 0 where no price is set.
    """
    evaluation = config.evaluation
    held_out = import_prompts(config.eval_prompts or config.prompts, config.workspace).rows
    if config.eval_prompts is None:  # the others become training pairs
        held_out = round(held_out * config.judging.val_ratio)
    choosing, deciding = evaluation.parts(held_out)
    design = plan_design(config.workspace, evaluation, max(1, deciding))
    draws = 2 if evaluation.null_test else 1
    price = 2 * draws * evaluation.num_samples * usd_per_verdict
    said = describe_power(design, config.promotion.min_win_rate, evaluation.confidence, price)
    if not choosing:
        return said
    found = replace(design, prompts=choosing).finds(LEAD, evaluation.checkpoints)
    return (
        f"{said} Another {choosing:,} choose among {evaluation.checkpoints} checkpoints: one that truly wins "
        f"{percent(0.5 + LEAD, '.0f')} where the others win 50 % is found in {percent(found, '.0f')} of runs."
    )


def describe_power(design: Design, bar: float, confidence: float, usd_per_prompt: float = 0.0) -> str:
    """Say what an evaluation can show, and what it takes to show half the gain, with the price of both."""
    least, often = smallest_detectable(design, bar, confidence), f"in {percent(POWER, '.0f')} of runs"
    held_out = f"held-out prompts x {design.samples} samples"
    if least >= 1:
        return f"{design.prompts:,} {held_out} are too few for any adapter to pass {often}: give more prompts."
    smaller = (least + bar) / 2
    more = prompts_needed(design, smaller, bar, confidence)
    now, then = (
        f" (about {prompts * usd_per_prompt:,.2f} US$)" if usd_per_prompt else "" for prompts in (design.prompts, more)
    )
    return (
        f"{design.prompts:,} {held_out}{now}: an adapter that truly wins {percent(least)} passes {often}. To show "
        f"{percent(smaller)} takes {more:,} prompts{then}."
    )
