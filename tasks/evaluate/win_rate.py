"""Proof on held-out prompts: what is compared, the win rate, and what says whether that can be believed."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from tasks.config import EvaluationConfig, GenerationConfig, JudgingConfig
from tasks.errors import PreflowError
from tasks.evaluate.comparisons import Comparison, join_samples, length_controlled, read_comparison, win_rate
from tasks.evaluate.power import design_of, smallest_detectable
from tasks.store.measures import Evaluation, SecondOpinion, percent
from tasks.store.prompts import import_prompts, split_prompts
from tasks.store.workspace import (
    AdapterRef,
    ChoiceRef,
    CompletionsRef,
    EvaluationRef,
    Manifest,
    PromptsRef,
    VerdictsRef,
    Workspace,
    indented_json,
    server_path,
    stage_key,
)

# A person's labels lie with the samples, and stay where only the figures change; with the first the second is raised.
SAMPLES_VERSION, VERSION = 2, 4
logger = logging.getLogger(__name__)

# Which draw a seed belongs to: the SFT adapter's, the new adapter's, and the SFT adapter's second, for the null test.
BASELINE, CANDIDATE, NULL = range(3)
# Of the null test, which refuses a promotion: at 95 % one sound run in twenty would be called false.
NULL_CONFIDENCE = 0.99
# A gain below this is too small to say what share of it another judge sees.
SMALLEST_GAIN = 0.01


class HeldOut(NamedTuple):
    """Held-out prompts: those that choose the checkpoint, if it is chosen, and those that decide on it."""

    choosing: PromptsRef | None
    deciding: PromptsRef


def select_held_out(adapter: AdapterRef, prompts: str, workspace: str, evaluation: EvaluationConfig) -> HeldOut:
    """Return the prompts to evaluate on: those that share no id and no group with a pair the adapter was trained on.

    Raises:
        PreflowError: a row is wrong, every prompt was trained on, or there are too few to choose a checkpoint with.
    """
    trained_on = None
    if adapter.manifest is not None:
        trained_on = Workspace(workspace).read_manifest(adapter).origin("preferences")
    if trained_on is None:
        logger.warning("%s has no manifest that names its pairs: no prompt can be left out as trained on", adapter.uri)
    held_out = import_prompts(prompts, workspace, evaluation.max_prompts, trained_on.uri if trained_on else None)
    if not evaluation.checkpoints:
        return HeldOut(None, held_out)
    return HeldOut(*split_prompts(held_out, workspace, evaluation.parts(held_out.rows)[0], evaluation.seed))


def draw_settings(
    evaluation: EvaluationConfig, draw: int, workspace: str, adapter: AdapterRef | None = None
) -> GenerationConfig:
    """Return how BASELINE, CANDIDATE or NULL is sampled: as in the generation stage, with a seed of its own.

    Draws of one adapter must differ, or the null test would compare equals. Without an adapter it is the SFT adapter
    that `evaluation.generation` names.
    """
    base = evaluation.generation or GenerationConfig()
    update: dict[str, Any] = {
        "num_completions": evaluation.num_samples,
        "seed": evaluation.seed + 1000 * draw,
        "keep_empty": True,
    }
    if adapter is not None:
        update["adapter"] = adapter.uri
        update["model"] = f"candidate-{adapter.sha256[:12]}"
        update["serve_from"] = server_path(adapter.uri, workspace, evaluation.adapter_root)
    return base.model_copy(update=update)


def pair_samples(baseline: CompletionsRef, candidate: CompletionsRef, workspace: str) -> CompletionsRef:
    """Put the i-th samples of both adapters side by side as rows of two completions: [baseline, candidate].

    A prompt for which the new adapter failed, and the SFT adapter did not, is paired with silence, which loses; one
    for which the SFT adapter failed is left out. Row ids are `<prompt id>#<i>`.

    Raises:
        PreflowError: no prompt has samples on both sides.
    """
    store = Workspace(workspace)
    failures = candidate.sibling("failures.jsonl")
    failed = {row["id"] for row in store.read_rows(failures)} if store.exists(failures) else set()
    key = stage_key("samples", SAMPLES_VERSION, a=baseline.sha256, b=candidate.sha256, failed=sorted(failed))
    folder = store.uri("samples", key)
    if known := store.find_finished(f"{folder}/manifest.json", CompletionsRef):
        return known
    with store.writing(f"{folder}/samples.jsonl") as out:
        for row in join_samples(store.read_rows(baseline.uri), store.read_rows(candidate.uri), failed):
            out.write_row(row)
    if not out.rows:
        raise PreflowError(f"{baseline.uri} and {candidate.uri} share no prompt: nothing can be compared")
    if failed:
        logger.warning(
            "evaluation: the new adapter failed on %d prompts (%s): they count as lost", len(failed), failures
        )
    artifact = CompletionsRef(uri=f"{folder}/samples.jsonl", manifest=f"{folder}/manifest.json", **out.facts())
    store.write_manifest(
        Manifest(
            artifact=artifact, stage="samples", version=SAMPLES_VERSION, key=key, upstream=(baseline, candidate),
            files={"samples.jsonl": out.file},
        )
    )  # fmt: skip
    return artifact


def summarise_evaluation(
    adapter: AdapterRef,
    verdicts: VerdictsRef,
    null: VerdictsRef | None,
    workspace: str,
    evaluation: EvaluationConfig,
    choice: ChoiceRef | None = None,
) -> EvaluationRef:
    """Write `comparisons.jsonl` and `win_rate.json`, and return the win rate with its interval."""
    store, second = Workspace(workspace), [judge.model for judge in evaluation.judges]
    inputs = {"adapter": adapter.sha256, "verdicts": verdicts.sha256, "null": null.sha256 if null else None}
    chosen = {"choice": choice.sha256} if choice else {}
    key = stage_key("evaluation", VERSION, confidence=evaluation.confidence, second=second, **inputs, **chosen)
    folder = store.uri("evaluations", key)
    labelling, others = {judge.model for judge in (evaluation.judging or JudgingConfig()).judges()}, set(second)
    by_labelling, by_others = list[Comparison](), list[Comparison]()
    with store.writing(f"{folder}/comparisons.jsonl") as comparisons:
        for row in store.read_rows(verdicts.uri):
            by_labelling.append(read_comparison(row, labelling))
            by_others.append(read_comparison(row, others))
            comparisons.write_row({**row, "outcome": by_labelling[-1].outcome})
    even = [read_comparison(row) for row in store.read_rows(null.uri)] if null else None
    found = judge_adapter(adapter.sha256, by_labelling, by_others if others else [], even, evaluation)
    with store.writing(f"{folder}/win_rate.json") as written:
        written.write(indented_json(found.model_dump(mode="json", exclude_none=True)))
    artifact = EvaluationRef(
        uri=f"{folder}/win_rate.json", manifest=f"{folder}/manifest.json", adapter_sha256=adapter.sha256,
        proven=found.proven, null_holds=found.null_holds and not found.sft_is_silent,
        **found.model_dump(include={"win_rate", "lower", "upper"}), **{**written.facts(), "rows": verdicts.rows},
    )  # fmt: skip
    store.write_manifest(
        Manifest(
            artifact=artifact, stage="evaluation", version=VERSION, key=key, config=evaluation,
            upstream=tuple(ref for ref in (adapter, verdicts, null, choice) if ref),
            files={"win_rate.json": written.file, "comparisons.jsonl": comparisons.file},
        )
    )  # fmt: skip
    _log(found)
    return artifact


def judge_adapter(
    sha256: str,
    comparisons: Sequence[Comparison],
    second: Sequence[Comparison],
    null: Sequence[Comparison] | None,
    evaluation: EvaluationConfig,
) -> Evaluation:
    """Measure how often an adapter won, and what says whether that can be believed.

    `comparisons` are with the SFT adapter, by the judges that made the labels; `second` the same by other judges (none
    of them readable: there is no second opinion); `null` the SFT adapter against itself, if that was tested.
    """
    found = win_rate(comparisons, evaluation.confidence)
    opinion = None
    if any(one.outcome is not None for one in second):
        rate = win_rate(second, evaluation.confidence)
        gain = found.win_rate - 0.5
        share = round((rate.win_rate - 0.5) / gain, 4) if gain > SMALLEST_GAIN else None
        opinion = SecondOpinion(judges=tuple(judge.model for judge in evaluation.judges), rate=rate, transfer=share)
    made = Evaluation(
        **found.model_dump(),
        adapter_sha256=sha256,
        null=win_rate(null, NULL_CONFIDENCE) if null is not None else None,
        length_controlled=length_controlled(comparisons, evaluation.confidence),
        second=opinion,
    )
    return made.model_copy(update={"detectable": smallest_detectable(design_of(made), 0.5, evaluation.confidence)})


def _log(found: Evaluation) -> None:
    rates = {"SFT against itself": found.null, "length-controlled": found.length_controlled}
    more = "".join(f"; {name} {rate.text()}" for name, rate in rates.items() if rate)
    least = found.detectable or 1.0
    shown = f"a true win rate of {percent(least)} or more" if least < 1 else "no true win rate, they are too few"
    logger.info(
        "win rate %s over %d samples of %d prompts%s; in 4 of 5 runs so many show %s",
        found.text(), found.samples, found.prompts, more, shown,
    )  # fmt: skip
    if found.unreadable or found.silent or found.sft_silent:
        logger.warning(
            "evaluation: %d comparisons are left out, no verdict on them could be read; %d are lost by silence; in %d "
            "the SFT adapter wrote nothing", found.unreadable, found.silent, found.sft_silent,
        )  # fmt: skip
