"""The win rate of a new adapter over the SFT adapter on held-out prompts, with its interval."""

import logging
import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist, fmean
from typing import Any

from tasks.config import EvaluationConfig, GenerationConfig
from tasks.errors import PreflowError
from tasks.store.measures import Evaluation, WinRate
from tasks.store.prompts import import_prompts
from tasks.store.workspace import (
    AdapterRef,
    CompletionsRef,
    EvaluationRef,
    FileFacts,
    Manifest,
    PromptsRef,
    VerdictsRef,
    Workspace,
    indented_json,
    server_path,
    stage_key,
)

VERSION = 1
logger = logging.getLogger(__name__)
Row = dict[str, Any]


# Which draw a seed belongs to: the SFT adapter's, the new adapter's, and the SFT adapter's second, for the null test.
BASELINE, CANDIDATE, NULL = range(3)
# To see a win rate of 0.55 takes about 615 decided comparisons (one-sided 5 %, power 80 %), and some are ties.
ENOUGH_SAMPLES = 800


def select_held_out(adapter: AdapterRef, prompts: str, workspace: str, evaluation: EvaluationConfig) -> PromptsRef:
    """Return the prompts to evaluate on: those that share no id and no group with a pair the adapter was trained on.

    Raises:
        PreflowError: a row is wrong, or every prompt was trained on.
    """
    trained_on = None
    if adapter.manifest is not None:
        trained_on = Workspace(workspace).read_manifest(adapter).origin("preferences")
    if trained_on is None:
        logger.warning("%s has no manifest that names its pairs: no prompt can be left out as trained on", adapter.uri)
    return import_prompts(prompts, workspace, evaluation.max_prompts, trained_on.uri if trained_on else None)


def draw_settings(
    evaluation: EvaluationConfig, draw: int, workspace: str, adapter: AdapterRef | None = None
) -> GenerationConfig:
    """Return how one draw is sampled: as in the generation stage, with a seed of its own.

    Args:
        evaluation: the number of samples and the base seed.
        draw: BASELINE, CANDIDATE or NULL; draws of one adapter must differ, or the null test would compare equals.
        workspace: the workspace that `adapter` lies in.
        adapter: the adapter to sample from; None: the SFT adapter that `evaluation.generation` names.
    """
    base = evaluation.generation or GenerationConfig()
    update: dict[str, Any] = {"num_completions": evaluation.num_samples, "seed": evaluation.seed + 1000 * draw}
    if adapter is not None:
        update["adapter"] = adapter.uri
        update["model"] = f"candidate-{adapter.sha256[:12]}"
        update["serve_from"] = server_path(adapter.uri, workspace, evaluation.adapter_root)
    return base.model_copy(update=update)


def pair_samples(baseline: CompletionsRef, candidate: CompletionsRef, workspace: str) -> CompletionsRef:
    """Put the i-th samples of both adapters side by side as rows of two completions: [baseline, candidate].

    Prompts that lack samples on one side are left out and logged. Row ids are `<prompt id>#<i>`.

    Raises:
        PreflowError: no prompt has samples on both sides.
    """
    store = Workspace(workspace)
    key = stage_key("samples", VERSION, a=baseline.sha256, b=candidate.sha256)
    folder = store.uri("samples", key)
    others = {row["id"]: row["completions"] for row in store.read_rows(candidate.uri)}
    missing = 0
    with store.writing(f"{folder}/samples.jsonl") as out:
        for row in store.read_rows(baseline.uri):
            samples = others.get(row["id"])
            missing += samples is None
            for number, (a, b) in enumerate(zip(row["completions"], samples or [], strict=False)):
                out.write_row(
                    {
                        "id": f"{row['id']}#{number}",
                        "prompt_id": row["id"],
                        "prompt": row["prompt"],
                        "completions": [a, b],
                    }
                )
    if not out.rows:
        raise PreflowError(f"{baseline.uri} and {candidate.uri} share no prompt: nothing can be compared")
    if missing:
        logger.warning("evaluation: %d prompts have no samples of the new adapter and are left out", missing)
    artifact = CompletionsRef(uri=f"{folder}/samples.jsonl", manifest=f"{folder}/manifest.json", **out.facts())
    store.write_manifest(
        Manifest(
            artifact=artifact, stage="samples", version=VERSION, key=key, upstream=(baseline, candidate),
            files={"samples.jsonl": out.file},
        )
    )  # fmt: skip
    return artifact


def outcome_of(row: Row) -> float:
    """Return what one comparison is worth to the candidate (completion 1), averaged over the judges.

    For a judge it is 1 if the candidate wins in every order, 0 if the baseline does, and 0.5 otherwise. A sample that
    is empty loses to one that is not, unasked.
    """
    baseline, candidate = (bool(text.strip()) for text in row["completions"])
    if baseline != candidate:
        return float(candidate)
    by_judge: dict[str, list[Row]] = {}
    for vote in row["votes"]:
        by_judge.setdefault(vote["judge"], []).append(vote)
    return fmean(_outcome_for(votes) for votes in by_judge.values()) if by_judge else 0.5


def _outcome_for(votes: Sequence[Row]) -> float:
    best = {vote.get("best") for vote in votes}
    return float(best.pop() == 1) if len(best) == 1 and None not in best else 0.5


def win_rate(outcomes: dict[str, list[float]], confidence: float) -> WinRate:
    """Return the mean outcome with a Wilson interval that knows samples of one prompt are alike.

    The prompts are the clusters: n_eff = p(1-p) / (s^2 / m), with s^2 the variance of the m prompts' means, kept
    between m and the number of samples (Kish's design effect, 1965); the interval is Wilson's (1927) at n_eff.

    Args:
        outcomes: prompt id to the outcomes (0, 0.5 or 1) of its samples.
        confidence: two-sided confidence, e.g. 0.95.

    Raises:
        PreflowError: there are no outcomes.
    """
    means = [sum(values) / len(values) for values in outcomes.values() if values]
    samples = sum(len(values) for values in outcomes.values())
    if not means:
        raise PreflowError("evaluation: no comparison could be judged; see the verdicts for the judge's own words")
    rate = sum(sum(values) for values in outcomes.values()) / samples
    spread = sum((mean - rate) ** 2 for mean in means) / max(1, len(means) - 1) / len(means)
    effective = float(len(means)) if spread == 0 else rate * (1 - rate) / spread
    effective = min(max(effective, len(means)), samples)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (rate + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * math.sqrt(rate * (1 - rate) / effective + z * z / (4 * effective**2))
    return WinRate(
        win_rate=rate,
        lower=max(0.0, centre - half),
        upper=min(1.0, centre + half),
        confidence=confidence,
        samples=samples,
        prompts=len(means),
        clusters=len(means),
        effective_samples=effective,
        ties=sum(value == 0.5 for values in outcomes.values() for value in values) / samples,
    )


def evaluation_key(adapter: AdapterRef, verdicts: VerdictsRef, null: VerdictsRef | None, confidence: float) -> str:
    """Return the content key of an evaluation."""
    return stage_key(
        "evaluation",
        VERSION,
        adapter=adapter.sha256,
        verdicts=verdicts.sha256,
        null=null.sha256 if null else None,
        confidence=confidence,
    )


def summarise_evaluation(
    adapter: AdapterRef, verdicts: VerdictsRef, null: VerdictsRef | None, workspace: str, evaluation: EvaluationConfig
) -> EvaluationRef:
    """Write `comparisons.jsonl` and `win_rate.json`, and return the win rate with its interval."""
    store = Workspace(workspace)
    key = evaluation_key(adapter, verdicts, null, evaluation.confidence)
    folder = store.uri("evaluations", key)
    outcomes, comparisons = _write_comparisons(store, folder, verdicts)
    found = win_rate(outcomes, evaluation.confidence)
    even = None if null is None else _null_rate(store.read_rows(null.uri), evaluation.confidence)
    summary = Evaluation(**found.model_dump(), adapter_sha256=adapter.sha256, null=even)
    with store.writing(f"{folder}/win_rate.json") as written:
        written.write(indented_json(summary.model_dump(mode="json", exclude_none=True)))
    artifact = EvaluationRef(
        uri=f"{folder}/win_rate.json",
        manifest=f"{folder}/manifest.json",
        adapter_sha256=adapter.sha256,
        **found.model_dump(include={"win_rate", "lower", "upper"}),
        **{**written.facts(), "rows": verdicts.rows},
    )
    store.write_manifest(
        Manifest(
            artifact=artifact,
            stage="evaluation",
            version=VERSION,
            key=key,
            config=evaluation,
            upstream=tuple(ref for ref in (adapter, verdicts, null) if ref),
            files={"win_rate.json": written.file, "comparisons.jsonl": comparisons},
        )
    )
    _log_win_rate(summary)
    return artifact


def _write_comparisons(
    store: Workspace, folder: str, verdicts: VerdictsRef
) -> tuple[dict[str, list[float]], FileFacts]:
    """Write every comparison with its outcome, and return the outcomes by prompt."""
    outcomes: dict[str, list[float]] = {}
    with store.writing(f"{folder}/comparisons.jsonl") as out:
        for row in store.read_rows(verdicts.uri):
            result = outcome_of(row)
            outcomes.setdefault(row["prompt_id"], []).append(result)
            out.write_row({**row, "outcome": result})
    return outcomes, out.file


def _log_win_rate(found: Evaluation) -> None:
    null = f"; SFT against itself {found.null.text()}" if found.null else ""
    logger.info("win rate %s over %d samples of %d prompts%s", found.text(), found.samples, found.prompts, null)
    if found.samples < ENOUGH_SAMPLES:
        logger.warning("only %d samples: a win rate of 0.55 takes about 800 to be seen", found.samples)


def _null_rate(rows: Iterable[Row], confidence: float) -> WinRate:
    outcomes: dict[str, list[float]] = {}
    for row in rows:
        outcomes.setdefault(row["prompt_id"], []).append(outcome_of(row))
    return win_rate(outcomes, confidence)
