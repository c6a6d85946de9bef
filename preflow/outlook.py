"""What a run will cost and what it can show, before it is started."""

from collections.abc import Iterator

from tasks.batch.costs import format_seconds
from tasks.config import PipelineConfig, SweepConfig
from tasks.evaluate.power import power_before_price
from tasks.sweep.estimate import plan_sweep
from tasks.sweep.page import format_price, money_text
from tasks.sweep.points import expand_points


def cost_lines(config: PipelineConfig) -> Iterator[str]:
    """Yield a line for each piece of work still to do, and one for all; completions at their longest, till measured."""
    sweep = SweepConfig(changes=[{}])
    plan = plan_sweep(expand_points(config, sweep).points, sweep)
    for work in plan.work:
        if work.requests:
            tokens = f"{work.prompt_tokens:,} + {work.completion_tokens:,} tokens"
            known = f", {work.known:,} known" if work.known else ""
            price = format_price(work.usd) + (" US$" if work.usd is not None else "")
            yield f"  {work.stage} ({work.who}): {work.to_ask:,} requests{known}, about {tokens}, {price}"
        elif not work.finished:
            yield f"  {work.stage} ({work.who}): about {format_seconds(60 * work.gpu_minutes)} on an L4"
    yield f"cost: {money_text(plan)}"


def power_line(config: PipelineConfig) -> str:
    """Say how good the adapter must be for the run to prove it."""
    return f"proof: {power_before_price(config)}"
