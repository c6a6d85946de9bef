"""Several rounds: each samples from the adapter that won the round before."""

from prefect import flow

from flows.evaluate import compare_samples
from flows.generate import generate_completions
from flows.pipeline import improve, promote_if_better
from tasks.config import PipelineConfig, RoundsConfig
from tasks.evaluate.win_rate import CANDIDATE, draw_settings, select_held_out, summarise_evaluation
from tasks.report.run import publish
from tasks.rounds.rounds import (
    Round,
    RoundsResult,
    best_round,
    check_held_out,
    record_rounds,
    round_config,
    rounds_section,
    why_last,
)
from tasks.run.names import named
from tasks.run.preflight import prepare_run
from tasks.store.workspace import EvaluationRef, PipelineResult


@flow(name="dpo-rounds", flow_run_name=named("{config.promotion.name}: rounds, {now:%d %b %H:%M}"))
async def dpo_rounds(config: PipelineConfig, rounds: RoundsConfig) -> RoundsResult:
    """Go on improving: sample from the adapter that won, judge, train, prove; until a round does not win.

    Args:
        config: What dpo-pipeline takes, for the first round.
        rounds: How many at most, and the adapter that each training begins with.
    """
    check_held_out(config, rounds)
    config = await prepare_run(config)
    done = await run_rounds(config, rounds)
    result = RoundsResult(rounds=done)
    if best := best_round(done, config.promotion.min_win_rate):
        served = await promote_if_better(best.made, config)
        result = RoundsResult(rounds=done, best=best.number, promotion=served.promotion, declined=served.declined)
    record_rounds(result, config, rounds)
    await publish(rounds_section(result))
    return result


async def run_rounds(config: PipelineConfig, rounds: RoundsConfig) -> tuple[Round, ...]:
    """Run one round after the other until there is a reason to end."""
    done: tuple[Round, ...] = ()
    while not done or done[-1].ended is None:
        before = done[-1] if done else None
        number = len(done) + 1
        made = await run_round(number, round_config(config, rounds, before))
        against = await compare_with(before.made, made, config) if before else None
        ended = why_last(number, made, against, config.promotion.min_win_rate, rounds.rounds)
        done = (*done, Round(number=number, made=made, against_before=against, ended=ended))
    return done


@flow(name="round", flow_run_name="round {number}")
async def run_round(number: int, config: PipelineConfig) -> PipelineResult:
    """Run the pipeline once, up to its win rate against the SFT adapter."""
    return await improve(config)


async def compare_with(before: PipelineResult, made: PipelineResult, config: PipelineConfig) -> EvaluationRef:
    """Have the judge compare the samples that both rounds were evaluated by; nothing new is sampled."""
    workspace, evaluation = config.workspace, config.evaluation
    held_out = select_held_out(made.adapter, config.eval_prompts or config.prompts, workspace, evaluation).deciding.uri
    old, new = [
        await generate_completions(held_out, workspace, draw_settings(evaluation, CANDIDATE, workspace, one.adapter))
        for one in (before, made)
    ]
    verdicts = await compare_samples(old, new, workspace, evaluation.comparison_judge())
    return summarise_evaluation(made.adapter, verdicts, None, workspace, evaluation)
