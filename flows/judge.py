"""Judging of completions, and the preference pairs that survive it."""

from prefect import flow

from tasks.config import JudgingConfig
from tasks.judging import collect_verdicts, plan_judging
from tasks.preferences import check_yield, make_preferences
from tasks.report import report_preferences
from tasks.storage import CompletionsRef, PreferencesRef, Workspace


@flow(name="judge-preferences", flow_run_name="judge with {judging.model}")
async def judge_preferences(completions: CompletionsRef, workspace: str, judging: JudgingConfig) -> PreferencesRef:
    """Have a judge choose the best and the worst completion of every prompt, and keep the pairs it is sure of."""
    Workspace(workspace).check_writable()
    plan = plan_judging(completions, workspace, judging)
    verdicts = await collect_verdicts(plan)
    preferences = make_preferences(verdicts, workspace, judging)
    await report_preferences(preferences, workspace)
    return check_yield(preferences, workspace)
