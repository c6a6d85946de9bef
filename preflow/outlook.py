"""What a run will cost and what it can show, before it is started."""

from collections.abc import Iterator

from tasks.batch.costs import format_seconds, format_usd
from tasks.config import PipelineConfig, SweepConfig
from tasks.evaluate.power import power_before_price
from tasks.sweep.estimate import plan_sweep
from tasks.sweep.points import expand_points


def cost_lines(config: PipelineConfig) -> Iterator[str]:
    """Yield a line for each piece of work still to do, and one for all; completions at their longest, till measured."""
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
    """Say how good the adapter must be for the run to prove it."""
    return f"proof: {power_before_price(config)}"
