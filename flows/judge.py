"""Judging of completions, and the preference pairs that survive it."""

from prefect import flow

from tasks.config import JudgingConfig, Location
from tasks.judge.asking import collect_verdicts, plan_judging
from tasks.judge.pairs import check_groups, check_yield, make_preferences
from tasks.report.run import preference_sections, publish
from tasks.run.inputs import CompletionsInput
from tasks.run.names import named
from tasks.store.workspace import PreferencesRef, Workspace


@flow(name="judge-preferences", flow_run_name=named("judge with {judging.model}"))
async def judge_preferences(
    completions: CompletionsInput, workspace: Location, judging: JudgingConfig
) -> PreferencesRef:
    """Have a judge choose the best and the worst completion of every prompt, and keep the pairs it is sure of.

    Args:
        completions: The completions: their folder in the workspace, its manifest.json, or the reference itself.
        workspace: Where everything is kept: a folder or gs:// address.
        judging: The judge, and when two completions become a pair.
    """
    Workspace(workspace).check_writable()
    plan = plan_judging(completions, workspace, judging)
    check_groups(plan)
    verdicts = await collect_verdicts(plan)
    preferences = make_preferences(verdicts, workspace, judging)
    await publish(*preference_sections(preferences, workspace))
    return check_yield(preferences, workspace, judging)
