"""Proof that the new adapter is better."""

from prefect import flow

from flows.generate import generate_completions
from tasks.config import EvaluationConfig, JudgingConfig, Location
from tasks.evaluate.choice import find_checkpoints, record_choice
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
from tasks.report.run import choice_page, evaluation_page, publish
from tasks.run.inputs import AdapterInput
from tasks.run.names import named
from tasks.store.workspace import (
    AdapterRef,
    ChoiceRef,
    CompletionsRef,
    EvaluationRef,
    PromptsRef,
    VerdictsRef,
    Workspace,
)


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
            With evaluation.checkpoints, the last of those that its training kept.
        prompts: Held-out prompts, JSONL: a path or gs:// address; those that were trained on are left out.
        workspace: Where everything is kept: a folder or gs:// address.
        evaluation: Number of samples, endpoint and judge.
        min_win_rate: The bar that the page compares the win rate with; a promotion has its own.
    """
    Workspace(workspace).check_writable()
    choosing, deciding = select_held_out(adapter, prompts, workspace, evaluation)
    choice, held_out = None, deciding.uri
    if choosing is not None:
        choice = await choose_checkpoint(adapter, choosing, workspace, evaluation)
        adapter = choice.adapter
    sft = await generate_completions(held_out, workspace, draw_settings(evaluation, BASELINE, workspace))
    new = await generate_completions(held_out, workspace, draw_settings(evaluation, CANDIDATE, workspace, adapter))
    verdicts = await compare_samples(sft, new, workspace, evaluation.comparison_judge())
    null = None
    if evaluation.null_test:
        again = await generate_completions(held_out, workspace, draw_settings(evaluation, NULL, workspace))
        null = await compare_samples(sft, again, workspace, evaluation.null_judge())
    result = summarise_evaluation(adapter, verdicts, null, workspace, evaluation, choice)
    record_agreement(result)
    await publish(evaluation_page(result, workspace, min_win_rate))
    return result


@flow(name="choose-checkpoint", flow_run_name=named("choose a checkpoint of {adapter.sha256:.12}"))
async def choose_checkpoint(
    adapter: AdapterRef, prompts: PromptsRef, workspace: Location, evaluation: EvaluationConfig
) -> ChoiceRef:
    """Have the judge compare samples of every checkpoint that a training has kept with the SFT adapter's."""
    checkpoints, judged = find_checkpoints(adapter, evaluation), []
    sft = await generate_completions(prompts.uri, workspace, draw_settings(evaluation, BASELINE, workspace))
    for one in checkpoints:
        new = await generate_completions(prompts.uri, workspace, draw_settings(evaluation, CANDIDATE, workspace, one))
        judged.append((one, await compare_samples(sft, new, workspace, evaluation.null_judge())))
    choice = record_choice(judged, workspace, evaluation)
    await publish(choice_page(choice))
    return choice


@flow(name="compare-samples")
async def compare_samples(
    baseline: CompletionsRef, candidate: CompletionsRef, workspace: Location, judging: JudgingConfig
) -> VerdictsRef:
    """Have the judge compare two draws sample by sample, in both orders."""
    plan = plan_judging(pair_samples(baseline, candidate, workspace), workspace, judging)
    return await collect_verdicts(plan)
