"""What each round samples from and begins with, when the rounds end, and the page that shows them.

Every round is a run of the pipeline, so each of its stages is cached: a run of rounds that was killed finds what it has
made, and two rounds share the prompts, the SFT adapter's samples and the judge's answers to equal questions.

The reference is the SFT adapter in every round (`start: sft`): the new pairs come from the best adapter so far, and the
policy cannot drift further from the SFT adapter than beta allows. The alternative, `start: previous`, takes the adapter
of the round before as start and reference, as Yuan et al. (2024), "Self-Rewarding Language Models", arXiv 2401.10020,
do: it goes further, and nothing holds it to where it came from.
"""

import logging
import posixpath

from pydantic import BaseModel

from tasks.config import PipelineConfig, RoundsConfig
from tasks.errors import PreflowError
from tasks.judge.elsewhere import import_completions, import_preferences
from tasks.report.page import Picture, ReportSection, Table
from tasks.report.plots import RateBar, plot_rates
from tasks.report.render import render_html, render_text_table
from tasks.store.measures import percent, rate_text, read_evaluation
from tasks.store.prompts import count_shared, import_prompts
from tasks.store.workspace import EvaluationRef, PipelineResult, PromotionRef, Reference, Workspace, digest, server_path

logger = logging.getLogger(__name__)


class Round(BaseModel, frozen=True):
    """One round: what it made, how it did against the round before, and why it is the last one, if it is."""

    number: int
    made: PipelineResult
    against_before: EvaluationRef | None = None
    ended: str | None = None


class RoundsResult(BaseModel, frozen=True):
    """The rounds in their order, the number of the best (None: none won), and its promotion, or why it has none."""

    rounds: tuple[Round, ...]
    best: int | None = None
    promotion: PromotionRef | None = None
    declined: str | None = None


def check_held_out(config: PipelineConfig, rounds: RoundsConfig) -> None:
    """Refuse several rounds without held-out prompts of their own, before anything is spent.

    A single run leaves out what its own pairs came from; each round makes pairs of other prompts, so what one round
    leaves another one was trained on.

    Raises:
        PreflowError: `eval_prompts` is empty, or shares prompts or groups with what the rounds are trained on.
    """
    if rounds.rounds == 1:
        return
    if config.eval_prompts is None:
        raise PreflowError(
            "eval_prompts is empty: each round trains on pairs of other prompts, so none of `prompts` is held out from "
            "all rounds. Give eval_prompts, a file of other prompts, or set rounds.rounds to 1."
        )
    workspace = config.workspace
    held_out = import_prompts(config.eval_prompts, workspace)
    trained_on: dict[str, Reference] = {config.prompts: import_prompts(config.prompts, workspace)}
    if config.preferences:  # the pairs that the first round begins with, or what they come from
        trained_on[config.preferences] = import_preferences(config.preferences, workspace, config.judging)
    elif config.completions:
        trained_on[config.completions] = import_completions(config.completions, workspace)
    for source, read in trained_on.items():
        if shared := count_shared(held_out.uri, read.uri, Workspace(workspace)):
            raise PreflowError(
                f"{config.eval_prompts}: {shared:,} of {held_out.rows:,} prompts are in {source} too, or share a "
                "`group` with a row there: one round or another is trained on them, so they prove nothing. Take them "
                "out of one of the files."
            )


def round_config(config: PipelineConfig, rounds: RoundsConfig, before: Round | None) -> PipelineConfig:
    """Return the pipeline's configuration of the round after `before`.

    Args:
        config: that of the first round, written out in full: its evaluation compares with the SFT adapter in all.
        rounds: where a round begins.
        before: the last round; None for the first one.

    Raises:
        PreflowError: the server cannot see the adapter of the round before.
    """
    if before is None:
        return config
    adapter = before.made.adapter
    generation = config.generation.model_copy(
        update={
            "adapter": adapter.uri,
            "model": f"round-{adapter.sha256[:12]}",
            "serve_from": server_path(adapter.uri, config.workspace, config.evaluation.adapter_root),
        }
    )
    training = config.training
    if rounds.start == "previous":
        training = training.model_copy(update={"sft_adapter": adapter.uri})
    given = {"completions": None, "preferences": None}  # what was made elsewhere is the first round's
    return config.model_copy(update={"generation": generation, "training": training, **given})


def why_last(number: int, made: PipelineResult, against: EvaluationRef | None, bar: float, most: int) -> str | None:
    """Return why no round follows, or None: it must win against the SFT adapter and against the round before."""
    asked_for = f"{_count(most)} asked for" if number == most else None
    return _why_lost(number, made, against, bar) or asked_for


def _why_lost(number: int, made: PipelineResult, against: EvaluationRef | None, bar: float) -> str | None:
    """Return the win rate that proves nothing, with the bar, or what decides where the interval would not say it."""
    for rival, found, over in (("the SFT adapter", made.evaluation, bar), (f"round {number - 1}", against, 0.5)):
        if found is None or found.beats(over):
            continue
        why = f"bar {percent(over, '.3g')}"
        if not found.null_holds:
            why = "but the SFT adapter against itself does not come out even, or it wrote nothing"
        elif found.lower > over and found.proven is not None:
            why = f"but with length taken out the lower bound is {percent(found.proven)}"
        return f"round {number} is not proven to win against {rival} ({_interval(found)}, {why})"
    return None


def best_round(rounds: tuple[Round, ...], bar: float) -> Round | None:
    """Return the last round that won against the SFT adapter and against the round before it."""
    won = [one for one in rounds if _why_lost(one.number, one.made, one.against_before, bar) is None]
    return won[-1] if won else None


def _count(rounds: int) -> str:
    return "one round was" if rounds == 1 else f"{rounds} rounds were"


def _interval(found: EvaluationRef) -> str:
    return rate_text(found.win_rate, found.lower, found.upper)


def rounds_section(result: RoundsResult) -> ReportSection:
    """Show how far each round came, against the SFT adapter and against the round before."""
    rows, bars = [], []
    for one in result.rounds:
        found, against = one.made.evaluation, one.against_before
        state = "the best" if one.number == result.best else None
        won_before = _interval(against) if against else None
        rows.append((f"round {one.number}", _interval(found), won_before, state, found.adapter_sha256[:12]))
        bars.append(RateBar(f"round {one.number}", read_evaluation(found), None))
    columns = ("round", "against SFT", "against the round before", "state", "adapter")
    best = "no round won" if result.best is None else f"round {result.best} is the best"
    last = result.rounds[-1]
    declined = f" It is not served: {result.declined.rstrip('.')}." if result.declined else ""
    return ReportSection(
        title="Rounds",
        headline=best[0].upper() + best[1:],
        is_good=result.best is not None,
        summary=f"{_count(len(rows)).capitalize()} run; {best}. The end: {last.ended}.{declined}",
        tables=(Table("Rounds", columns, tuple(rows)),),
        pictures=(Picture(plot_rates(bars, None), "Wins over the SFT adapter, round by round, with intervals."),),
        notes=("A round is kept if its lower bounds, that with length taken out too, are over the bar against the SFT "
               "adapter and over 50 % against the round before, and the SFT adapter against itself comes out even.",),
    )  # fmt: skip


def rounds_text(result: RoundsResult) -> str:
    """Return the rounds and their end as text."""
    section = rounds_section(result)
    return f"{render_text_table([section.tables[0].columns, *section.tables[0].rows])}\n{section.summary}"


def rounds_page(result: RoundsResult, workspace: str, rounds: RoundsConfig) -> str:
    """Return the uri of the page of these rounds, `rounds/<key>/report.html`; `result.json` lies next to it."""
    first = result.rounds[0].made
    key = digest([first.adapter.sha256, first.evaluation.sha256, rounds.model_dump(mode="json")])[:32]
    return Workspace(workspace).uri("rounds", key, "report.html")


def record_rounds(result: RoundsResult, config: PipelineConfig, rounds: RoundsConfig) -> None:
    """Write the result and its page."""
    store, page = Workspace(config.workspace), rounds_page(result, config.workspace, rounds)
    store.write_json(posixpath.join(posixpath.dirname(page), "result.json"), result.model_dump(mode="json"))
    section = rounds_section(result)
    store.write_bytes(page, render_html(f"preflow rounds for {config.promotion.name}", [section]).encode())
    logger.info("%s The whole report: %s", section.summary, page)
