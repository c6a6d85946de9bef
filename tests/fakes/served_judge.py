"""A flow that judges in batches, served by this process; its waits are short."""

from prefect import flow

from flows.judge import judge_preferences
from tasks.batch import leaving
from tasks.config import JudgingConfig
from tasks.judge.elsewhere import import_completions
from tasks.llm import batches
from tasks.store.workspace import PreferencesRef

batches.QUIET_SECONDS, batches.FIRST_POLL_SECONDS, batches.PATIENCE_SECONDS = 0.5, 0.1, 1.0
leaving.AWAY_SECONDS = 5.0


@flow(name="judge-in-batches")
async def judge_in_batches(completions: str, workspace: str, judging: JudgingConfig) -> PreferencesRef:
    """Have given completions judged, as a part of a run."""
    return await judge_preferences(import_completions(completions, workspace), workspace, judging)


if __name__ == "__main__":
    judge_in_batches.serve(name="served")
