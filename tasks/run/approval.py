"""A person's yes before the judge is paid, or before an adapter is served.

A run of a deployment is *suspended* while it waits: its process ends, its worker and its place in the queue are free,
and a resumed run starts over and finds all its stages finished. A run of a script has nobody to start it again, so it
is *paused*: its process waits. What was answered is kept in the workspace under the run's key, so nobody is asked
twice for what was approved, whichever process is killed meanwhile.
"""

import logging
import posixpath
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from prefect import Flow, State
from prefect.artifacts import acreate_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import apause_flow_run, asuspend_flow_run
from prefect.input import RunInput
from prefect.input.actions import aread_flow_run_input
from prefect.input.run_input import keyset_from_base_key
from prefect.settings import get_current_settings
from prefect.states import Cancelled
from pydantic import BaseModel, Field

from tasks.config import ApprovalPoint, PipelineConfig
from tasks.errors import PreflowError
from tasks.evaluate.power import power_before_price
from tasks.report.page import ReportSection
from tasks.report.render import render_markdown
from tasks.report.run import evaluation_page
from tasks.run.estimate import JUDGING, plan_runs
from tasks.run.estimate_page import approval_section
from tasks.run.preflight import run_folder
from tasks.store.workspace import CompletionsRef, EvaluationRef, PromotionRef, Workspace

logger = logging.getLogger(__name__)


class NotApproved(PreflowError):
    """A person said no; what was made so far is kept."""


class Decision(RunInput):
    """The form that is filled in to resume a waiting run."""

    approve: bool = Field(False, title="Approve", description="On: the run goes on. Off: it ends here.")
    note: str = Field("", title="Note", description="Why; it is kept with the run.")


class Answer(BaseModel, frozen=True):
    """What a person answered at one point of a run, about what, and when."""

    point: ApprovalPoint
    subject: str
    approve: bool
    note: str = ""
    flow_run_id: str = ""
    at: str = ""

    @property
    def refusal(self) -> str | None:
        """Why the run does not go on; None if it does."""
        return None if self.approve else f"not approved ({self.point}): {self.note or 'no reason was given'}"


async def approve_judging(config: PipelineConfig, completions: CompletionsRef) -> None:
    """Wait for a person's yes before the judges are paid, if the run is to have it and there is anything to pay.

    Raises:
        NotApproved: the answer was no.
    """
    point = "judging"
    if point not in config.approve_before:
        return
    plan = plan_runs([config])
    if not plan.of(JUDGING).total().to_ask:
        logger.info("every verdict is known: there is nothing to approve before judging")
        return
    page = approval_section(plan)
    each = sum((work.usd or 0.0) / work.to_ask for work in plan.of(JUDGING).work if work.to_ask)
    page = replace(page, notes=(power_before_price(config, each), *page.notes))
    answer = await _answer(config, point, completions.sha256, page)
    if answer.refusal:
        raise NotApproved(f"{answer.refusal}. The completions are kept; run again to be asked again.")


async def approve_promotion(
    config: PipelineConfig, evaluation: EvaluationRef, promotion: PromotionRef | None
) -> str | None:
    """Wait for a person's yes before an adapter that won is served; return why not, if the answer is no."""
    point, bar = "promotion", config.promotion.min_win_rate
    if point not in config.approve_before or promotion is not None or not evaluation.beats(bar):
        return None
    page = evaluation_page(evaluation, config.workspace, bar)
    return (await _answer(config, point, evaluation.sha256, page)).refusal


async def cancel_if_refused(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """End a run that a person said no to as cancelled, with the reason; it has not failed."""
    error = await state.aresult(raise_on_failure=False)
    if isinstance(error, NotApproved):
        async with get_client() as client:
            await client.set_flow_run_state(flow_run.id, Cancelled(message=str(error)), force=True)


async def _answer(config: PipelineConfig, point: ApprovalPoint, subject: str, page: ReportSection) -> Answer:
    """Return the answer that is kept, or ask."""
    answers = read_answers(config, point)
    for answer in answers:
        if answer.approve and answer.subject == subject:
            logger.info("%s was approved at %s: %s", point, answer.at, answer.note or "no note")
            return answer
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        raise PreflowError(f"approve_before {point}: only a flow run can be approved")
    decision = await _ask(config, context.flow_run, f"{point}-{len(answers) + 1}", page)
    answer = Answer(
        point=point, subject=subject, approve=decision.approve, note=decision.note,
        flow_run_id=str(context.flow_run.id), at=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
    given = answer.model_dump(mode="json")
    Workspace(config.workspace).update_json(
        _answers_uri(config, point), lambda kept: {"answers": [*(kept["answers"] if kept else ()), given]}
    )
    logger.info("%s", answer.refusal or f"approved ({point}): {answer.note or 'no note'}")
    return answer


async def _ask(config: PipelineConfig, run: FlowRun, key: str, page: ReportSection) -> Decision:
    """Publish what is to be approved, and wait for the form; a run that is executed again finds what was filled in."""
    keysets = [keyset_from_base_key(f"{kind}-{key}") for kind in ("suspended", "paused")]
    for keyset in keysets:
        if (given := await aread_flow_run_input(keyset["response"], flow_run_id=run.id)) is not None:
            return Decision(**given)
    artifact = await acreate_markdown_artifact(
        key="to-approve", markdown=render_markdown(page), description=f"Waiting for approval. {page.summary}"
    )
    ui = get_current_settings().ui_url
    where = f"[Read the page first]({ui}/artifacts/artifact/{artifact})." if ui else "See the artifact `to-approve`."
    form = Decision.with_initial_data(description=f"{page.summary}\n\n{where}")
    seconds = config.approval_timeout_seconds
    if run.deployment_id is not None and run.parent_task_run_id is None:
        return await asuspend_flow_run(wait_for_input=form, timeout=seconds, key=key)
    try:
        return await apause_flow_run(wait_for_input=form, timeout=seconds, poll_interval=2, key=key)
    except FlowPauseTimeout as late:
        raise PreflowError(
            f"{key.partition('-')[0]} was not approved within approval_timeout_seconds ({seconds:,} s). What was made "
            "so far is kept: run again to be asked again."
        ) from late


def _answers_uri(config: PipelineConfig, point: ApprovalPoint) -> str:
    return posixpath.join(run_folder(config), "approvals", f"{point}.json")


def read_answers(config: PipelineConfig, point: ApprovalPoint) -> list[Answer]:
    """Return every answer given at a point of a run, the oldest first."""
    store, uri = Workspace(config.workspace), _answers_uri(config, point)
    return [Answer.model_validate(row) for row in store.read_json(uri)["answers"]] if store.exists(uri) else []
