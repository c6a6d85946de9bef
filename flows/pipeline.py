"""The whole of it: from prompts to a better adapter that is served."""

from prefect import flow

from flows.evaluate import evaluate_adapter
from flows.generate import generate_completions
from flows.judge import judge_preferences
from flows.promote import promote_adapter
from flows.train import train_dpo
from tasks.batch.leaving import endpoint_lock
from tasks.config import PipelineConfig
from tasks.evaluate.choice import evaluated_adapter
from tasks.judge.elsewhere import import_completions, import_preferences
from tasks.promote.pointer import find_disagreement, find_promotion, find_rollback
from tasks.report.run import report_run
from tasks.run.approval import approve_judging, approve_promotion, cancel_if_refused
from tasks.run.names import named
from tasks.run.preflight import prepare_run, record_result
from tasks.run.versions import say_version_skew
from tasks.store.workspace import AdapterRef, CompletionsRef, PipelineResult, PreferencesRef
from tasks.train.work_pool import train_on_pool

NAME = named("{config.promotion.name}: beta {config.training.beta:g}, {now:%d %b %H:%M}")


@flow(name="dpo-pipeline", flow_run_name=NAME, on_failure=[cancel_if_refused], on_running=[say_version_skew])
async def dpo_pipeline(config: PipelineConfig) -> PipelineResult:
    """Sample completions, have them judged, train with DPO, prove that it is better, and serve it.

    Args:
        config: Everything about the run, stage by stage; what is left alone has its default.
    """
    config = await prepare_run(config)
    result = await promote_if_better(await improve(config), config)
    folder = record_result(config, result)
    await report_run(config, result, folder)
    return result


async def improve(config: PipelineConfig) -> PipelineResult:
    """Make a new adapter and measure how often it wins; nothing is promoted."""
    async with endpoint_lock():
        completions, preferences = await label(config)
    trained = await train(preferences, config)
    held_out, bar = config.eval_prompts or config.prompts, config.promotion.min_win_rate
    async with endpoint_lock():
        evaluation = await evaluate_adapter(trained, held_out, config.workspace, config.evaluation, bar)
    adapter = evaluated_adapter(trained, evaluation)
    return PipelineResult(completions=completions, preferences=preferences, adapter=adapter, evaluation=evaluation)


async def label(config: PipelineConfig) -> tuple[CompletionsRef | None, PreferencesRef]:
    """Return the pairs: those that are given, or the judge's choice among completions that are given or sampled."""
    workspace = config.workspace
    if config.preferences is not None:
        return None, import_preferences(config.preferences, workspace, config.judging)
    if config.completions is not None:
        completions = import_completions(config.completions, workspace)
    else:
        completions = await generate_completions(config.prompts, workspace, config.generation)
    await approve_judging(config, completions)
    return completions, await judge_preferences(completions, workspace, config.judging)


async def train(preferences: PreferencesRef, config: PipelineConfig) -> AdapterRef:
    """Train where the configuration says."""
    if config.training_deployment is not None:
        return await train_on_pool(preferences, config)
    return await train_dpo(preferences, config.workspace, config.training)


async def promote_if_better(made: PipelineResult, config: PipelineConfig) -> PipelineResult:
    """Serve the adapter under its name if it won by enough, and nobody who was asked said no."""
    promotion = find_promotion(made.adapter, config.workspace, config.promotion)
    declined = find_rollback(made.adapter, config.workspace, config.promotion)
    declined = declined or find_disagreement(made.evaluation, config.promotion, promotion)
    declined = declined or await approve_promotion(config, made.evaluation, promotion)
    if promotion is None and declined is None and made.evaluation.beats(config.promotion.min_win_rate):
        promotion = await promote_adapter(made.adapter, made.evaluation, config.workspace, config.promotion)
    return made.model_copy(update={"promotion": promotion, "declined": declined})
