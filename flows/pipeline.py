"""The whole of it: from prompts to a better adapter that is served."""

from prefect import flow

from flows.evaluate import evaluate_adapter
from flows.generate import generate_completions
from flows.judge import judge_preferences
from flows.promote import promote_adapter
from flows.train import train_dpo
from tasks.approval import approve_judging, approve_promotion, cancel_if_refused
from tasks.config import PipelineConfig
from tasks.promotion import find_promotion
from tasks.report import report_run
from tasks.runs import PipelineResult, prepare_run, record_result


@flow(name="dpo-pipeline", flow_run_name="dpo for {config.promotion.name}", on_failure=[cancel_if_refused])
async def dpo_pipeline(config: PipelineConfig) -> PipelineResult:
    """Sample completions, have them judged, train with DPO, prove that it is better, and serve it."""
    config = await prepare_run(config)
    workspace = config.workspace
    completions = await generate_completions(config.prompts, workspace, config.generation)
    await approve_judging(config, completions)
    preferences = await judge_preferences(completions, workspace, config.judging)
    adapter = await train_dpo(preferences, workspace, config.training)
    held_out = config.eval_prompts or config.prompts
    evaluation = await evaluate_adapter(adapter, held_out, workspace, config.evaluation)
    promotion = find_promotion(adapter, workspace, config.promotion)
    declined = await approve_promotion(config, evaluation, promotion)
    if promotion is None and declined is None and evaluation.beats(config.promotion.min_win_rate):
        promotion = await promote_adapter(adapter, evaluation, workspace, config.promotion)
    result = PipelineResult(
        completions=completions, preferences=preferences, adapter=adapter, evaluation=evaluation, promotion=promotion,
        declined=declined,
    )  # fmt: skip
    record_result(config, result)
    await report_run(config, result)
    return result
