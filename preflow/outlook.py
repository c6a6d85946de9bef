"""What a run will cost and what it can show, before it is started."""

import math
from collections.abc import Iterator
from statistics import NormalDist

from tasks.batch.costs import format_seconds, format_usd
from tasks.config import PipelineConfig, SweepConfig
from tasks.store.prompts import import_prompts
from tasks.sweep.estimate import plan_sweep
from tasks.sweep.points import expand_points

POWER = 0.8


def cost_lines(config: PipelineConfig) -> Iterator[str]:
    """Yield a line for each piece of work still to do, and one for all; completions at their longest, until measured."""
    sweep = SweepConfig(changes=[{}])
    plan = plan_sweep(expand_points(config, sweep).points, sweep)
    for work in plan.work:
        if work.requests:
            tokens = f"{work.prompt_tokens:,} + {work.completion_tokens:,} tokens"
            known = f", {work.known:,} known" if work.known else ""
            price = "price not set" if work.usd is None else f"{format_usd(work.usd)} US$"
            yield f"  {work.stage} ({work.who}): {work.to_ask:,} requests{known}, about {tokens}, {price}"
        elif not work.finished:
            yield f"  {work.stage} ({work.who}): about {format_seconds(60 * work.gpu_minutes)} on an L4"
    unpriced = " and what has no price" if any(work.usd is None for work in plan.work) else ""
    yield f"cost: about {format_usd(plan.usd())} US${unpriced}"


def power_line(config: PipelineConfig) -> str:
    """Say how good the adapter must be for the run to prove it, four times in five."""
    held_out = import_prompts(config.eval_prompts or config.prompts, config.workspace).rows
    share = 1.0 if config.eval_prompts else config.judging.val_ratio
    prompts = min(config.evaluation.max_prompts, max(1, int(held_out * share)))
    samples = prompts * config.evaluation.num_samples
    deviations = NormalDist().inv_cdf((1 + config.evaluation.confidence) / 2) + NormalDist().inv_cdf(POWER)
    rate = config.promotion.min_win_rate + deviations / (2 * math.sqrt(samples))
    seen = f"a true win rate of {rate:.0%} or more" if rate < 1 else "no win rate, there are too few"
    return f"proof: {samples:,} comparisons on {prompts:,} held-out prompts show {seen} (at the best, 4 times in 5)"
