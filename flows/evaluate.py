"""Proof that the new adapter is better."""

from prefect import flow

from flows.generate import generate_completions
from tasks.config import EvaluationConfig, JudgingConfig, Location
from tasks.evaluate.labels import record_agreement
from tasks.evaluate.win_rate import (
    BASELINE,
    CANDIDATE,
    NULL,
    draw_settings,
    pair_samples,
    select_held_out,
    summarise_evaluation,
)
from tasks.judge.asking import collect_verdicts, plan_judging
from tasks.report.run import evaluation_page, publish
from tasks.run.inputs import AdapterInput
from tasks.run.names import named
from tasks.store.workspace import CompletionsRef, EvaluationRef, VerdictsRef, Workspace


@flow(name="evaluate-adapter", flow_run_name=named("evaluate {adapter.sha256:.12}"))
async def evaluate_adapter(
    adapter: AdapterInput,
    prompts: Location,
    workspace: Location,
    evaluation: EvaluationConfig,
    min_win_rate: float = 0.5,
) -> EvaluationRef:
    """Have the judge compare samples of the new adapter with the SFT adapter's, on prompts it was not trained on.

    Args:
        adapter: The new adapter: its folder in the workspace, its training's manifest.json, or the reference itself.
        prompts: Held-out prompts, JSONL: a path or gs:// address; those that were trained on are left out.
        workspace: Where everything is kept: a folder or gs:// address.
        evaluation: Number of samples, endpoint and judge.
        min_win_rate: The bar that the page compares the win rate with; a promotion has its own.
    """
    Workspace(workspace).check_writable()
    held_out = select_held_out(adapter, prompts, workspace, evaluation).uri
    sft = await generate_completions(held_out, workspace, draw_settings(evaluation, BASELINE, workspace))
    new = await generate_completions(held_out, workspace, draw_settings(evaluation, CANDIDATE, workspace, adapter))
    verdicts = await compare_samples(sft, new, workspace, evaluation.comparison_judge())
    null = None
    if evaluation.null_test:
        again = await generate_completions(held_out, workspace, draw_settings(evaluation, NULL, workspace))
        null = await compare_samples(sft, again, workspace, evaluation.null_judge())
    result = summarise_evaluation(adapter, verdicts, null, workspace, evaluation)
    record_agreement(result)
    await publish(evaluation_page(result, workspace, min_win_rate))
    return result


@flow(name="compare-samples")
async def compare_samples(
    baseline: CompletionsRef, candidate: CompletionsRef, workspace: Location, judging: JudgingConfig
) -> VerdictsRef:
    """Have the judge compare two draws sample by sample, in both orders."""
    plan = plan_judging(pair_samples(baseline, candidate, workspace), workspace, judging)
    return await collect_verdicts(plan)
