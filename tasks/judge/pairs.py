"""From votes to preference pairs: the pair policy, the confidence bar, and a split that new prompts never shift."""

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

from pydantic import BaseModel

from tasks.config import JudgingConfig, PairPolicy
from tasks.errors import PreflowError
from tasks.judge.asking import JudgingPlan
from tasks.judge.quality.metrics import measure_judgements
from tasks.store.forms import ended_by_itself
from tasks.store.measures import QualityReport
from tasks.store.records import Message, PairRow, VerdictsRow, Vote, read_rows
from tasks.store.workspace import DigestWriter, Manifest, PreferencesRef, VerdictsRef, Workspace, stage_key

VERSION = 7
TOKENS = {"prompt_token_ids", "token_ids"}
CUT = "a side did not end by itself"
LOW = "score of the best"
SFT = "sft_only"
TOLD = {"pair": "rows gave a pair", "cut_pairs": "of them with a cut side", SFT: "for the SFT term alone"}
NONE_LOWER = "none scores lower than the best"
logger = logging.getLogger(__name__)


def find_preferences(verdicts: VerdictsRef, workspace: str, judging: JudgingConfig) -> PreferencesRef | None:
    """Return the pairs made of these verdicts, if they were made before."""
    store = Workspace(workspace)
    key = stage_key("preferences", VERSION, verdicts=verdicts.sha256, **judging.pairs_identity())
    return store.find_finished(store.uri("preferences", key, "manifest.json"), PreferencesRef)


def check_groups(plan: JudgingPlan) -> None:
    """Refuse completions of one group before the judge is paid; verdicts that are there are looked at with the pairs.

    Raises `PreflowError`: all rows have the same group, and `val_ratio` holds some out.
    """
    if plan.finished is None and plan.judging.val_ratio:
        groups = set[str]()
        for row in Workspace(plan.workspace).read_rows(plan.source.uri):
            groups.add(row.get("group") or row["id"])
            if len(groups) > 1:
                return
        check_spread(plan.source.uri, plan.source.rows, groups, plan.judging)


def check_spread(uri: str, rows: int, groups: Collection[str], judging: JudgingConfig) -> None:
    """Refuse rows that are all of one group, where some are to be held out: all would be, or none.

    Raises `PreflowError`: `groups`, of which the first two are enough, is one only, of more than one row.
    """
    if judging.val_ratio and rows > 1 and len(groups) == 1:
        raise PreflowError(
            f"{uri}: all {rows} rows have the same `group`, so that val_ratio ({judging.val_ratio:g}) holds out all or "
            "none. Give groups that differ, none, or val_ratio 0."
        )


def make_preferences(verdicts: VerdictsRef, workspace: str, judging: JudgingConfig) -> PreferencesRef:
    """Write `judged.jsonl`, `train.jsonl`, `val.jsonl` and `quality.json` of one set of verdicts.

    Rows without a pair are in `judged.jsonl` with the reason; `check_yield` tells whether any has one.
    """
    if known := find_preferences(verdicts, workspace, judging):
        return known
    key = stage_key("preferences", VERSION, verdicts=verdicts.sha256, **judging.pairs_identity())
    store = Workspace(workspace)
    folder = store.uri("preferences", key)
    written, found = _write_pairs(store, folder, verdicts, judging)
    cost = store.read_manifest(verdicts).cost if verdicts.manifest else None
    usage = cost.model_dump(exclude={"usd", "gpu_seconds"}) if cost else None
    quality = measure_judgements(store.read_rows(f"{folder}/judged.jsonl"), usage)
    return finish_pairs(
        store, folder, written, quality, version=VERSION, key=key, config=judging, upstream=(verdicts,), counts=found
    )


def _write_pairs(
    store: Workspace, folder: str, verdicts: VerdictsRef, judging: JudgingConfig
) -> tuple[dict[str, DigestWriter], Counter[str]]:
    """Decide on every row, and return the files and how many rows came to what."""
    counts: Counter[str] = Counter(cut_pairs=0)
    groups: set[str] = set()
    with (
        store.writing(f"{folder}/judged.jsonl") as judged,
        store.writing(f"{folder}/train.jsonl") as train,
        store.writing(f"{folder}/val.jsonl") as val,
    ):
        for row in read_rows(VerdictsRow, verdicts.uri, store):
            if len(groups) < 2:
                groups.add(row.group or row.id)
            decision = decide(row.votes, judging)
            held_out = is_validation(row.id, row.group, judging.seed, judging.val_ratio)
            if decision.status == SFT and held_out:
                decision = decision.model_copy(update={"status": "dropped"})
            reasons, trained_on = row.finish_reasons, (decision.best, decision.worst)
            ends = [reasons[side] for side in trained_on if side is not None and side < len(reasons)]
            if decision.status in ("pair", SFT) and not all(map(ended_by_itself, ends)):
                counts["cut_pairs"] += 1
                if judging.leave_out_cut:
                    decision = decision.model_copy(update={"status": "dropped", "reason": CUT})
            counts[decision.status] += 1
            if judging.min_chosen_score is not None:
                counts["low_scores"] += decision.is_low
            columns = decision.model_dump(exclude=set() if decision.scores else {"scores"})
            judged.write_row({**row.model_dump(exclude=TOKENS, exclude_none=True), **columns})
            if decision.status in ("pair", SFT):
                (val if held_out else train).write_row(preference_pair(row, decision).model_dump(exclude_none=True))
        check_spread(verdicts.uri, verdicts.rows, groups, judging)
    return {"judged.jsonl": judged, "train.jsonl": train, "val.jsonl": val}, counts


def finish_pairs(
    store: Workspace, folder: str, written: Mapping[str, DigestWriter], quality: QualityReport, **about: Any
) -> PreferencesRef:
    """Write what was measured of the pairs in a folder, `quality.json`, and the manifest.

    `about` is what else the manifest says: its version, its key, what the pairs were made from.
    """
    with store.writing(f"{folder}/quality.json") as measured:
        measured.write((quality.model_dump_json(indent=2) + "\n").encode())
    train, val = written["train.jsonl"], written["val.jsonl"]
    found = about.pop("counts", {})
    counts = {**found, "train": train.rows, "val": val.rows}
    names = [name for name in dict.fromkeys(("pair", *found)) if found.get(name)]
    told = ", ".join(f"{found[name]:,} {TOLD.get(name, name)}" for name in names)
    logger.info("preferences: %s/train.jsonl", folder)
    logger.info("preferences: %d pairs to train on, %d held out%s", train.rows, val.rows, f" ({told})" if told else "")
    files = {**written, "quality.json": measured}
    artifact = PreferencesRef(
        uri=f"{folder}/train.jsonl", manifest=f"{folder}/manifest.json", val_rows=val.rows, **train.facts()
    )
    facts = {name: out.file for name, out in files.items()}
    store.write_manifest(Manifest(artifact=artifact, stage="preferences", files=facts, counts=counts, **about))
    return artifact


def check_yield(preferences: PreferencesRef, workspace: str, judging: JudgingConfig) -> PreferencesRef:
    """Return the preferences if there is a pair to train on.

    Raises `PreflowError`: there is none; with what was measured about the judge, and what to do about it.
    """
    store = Workspace(workspace)
    unsure = store.read_manifest(preferences).counts.get(SFT, 0) if judging.unsure_for_sft else 0
    if preferences.rows > unsure:
        return preferences
    if preferences.val_rows and not preferences.rows:
        raise PreflowError(
            f"no pair to train on: all {preferences.val_rows} are held out (judging.val_ratio is "
            f"{judging.val_ratio:g}). Give more prompts or groups, or lower val_ratio."
        )
    quality = QualityReport.model_validate(store.read_json(preferences.sibling("quality.json")))
    statuses = ", ".join(f"{count} {name}" for name, count in quality.statuses.items())
    advice = " ".join(metric.advice for metric in quality.problems() if metric.advice)
    why = preferences.sibling("judged.jsonl")
    raise PreflowError(f"no pair to train on: of {quality.rows} prompts {statuses}; why is in {why}. {advice}")


class Decision(BaseModel):
    """What the votes on one row come to.

    Attributes:
        status: pair; sft_only, where the best alone is sure enough; dropped, failed or skipped, for a `reason`.
        best: index of the chosen one of the row's completions; likewise `worst`, the rejected one.
        agreement: the share of votes for the most frequent best and worst.
        scores: by the completion's index, the mean of its scores; empty where none were asked for.
    """

    status: str
    reason: str | None = None
    best: int | None = None
    worst: int | None = None
    agreement: float | None = None
    confidence: float | None = None
    scores: dict[int, float] = {}

    @property
    def is_low(self) -> bool:
        """Whether it is no pair because the chosen side scores too low."""
        return bool(self.reason and self.reason.startswith(LOW))


def decide(votes: Sequence[Vote], judging: JudgingConfig) -> Decision:
    """Turn votes into a pair, or into the reason why there is none."""
    policy = judging.pair_policy
    if not votes:
        return Decision(status="skipped", reason="one distinct completion")
    read = [vote for vote in votes if vote.error is None]
    needed = len(votes) if policy == "unanimous" else len(votes) // 2 + 1
    if len(read) < needed:
        failed = next(vote.error for vote in votes if vote.error is not None)
        return Decision(status="failed", reason=f"verdict unreadable: {failed}")
    best, worst = _choose(read, policy)
    scores = _mean_scores(read) if judging.wants_scores else {}
    if judging.rejected_sigmas is not None and best is not None:
        worst = _below_mean(scores, best, judging.rejected_sigmas)
    given = [vote.confidence for vote in read if vote.confidence is not None]
    confidence = round(fmean(given), 3) if given else None
    reason, status = None, "pair"
    if best is None:
        reason = f"best not {policy}"
    elif worst is None:
        reason = f"worst not {policy}" if judging.rejected_sigmas is None else NONE_LOWER
    elif confidence is not None and confidence < judging.min_confidence:
        reason = f"confidence {confidence:.1f} < {judging.min_confidence}"
    elif judging.min_chosen_score is not None and scores[best] < judging.min_chosen_score:
        reason = f"{LOW} {scores[best]:.1f} < {judging.min_chosen_score:g}"
    if best is None or worst is None:
        best = worst = None
    if reason:
        liked = _liked(read, scores, judging) if judging.unsure_for_sft else None
        status, best, worst = ("dropped", best, worst) if liked is None else (SFT, liked, None)
    agreement = Counter((vote.best, vote.worst) for vote in read).most_common(1)[0][1] / len(read)
    return Decision(
        status=status, reason=reason, best=best, worst=worst, agreement=round(agreement, 4), confidence=confidence,
        scores=scores,
    )  # fmt: skip


def _liked(votes: Sequence[Vote], scores: Mapping[int, float], judging: JudgingConfig) -> int | None:
    """Return the completion that most votes name the best, unless it scores too low."""
    best, count = Counter(vote.best for vote in votes).most_common(1)[0]
    if best is None or count <= len(votes) // 2 or scores.get(best, 0) < (judging.min_chosen_score or 0):
        return None
    return best


def _mean_scores(votes: Sequence[Vote]) -> dict[int, float]:
    """Return the mean score of each completion, over all judges and orders."""
    given = defaultdict[int, list[int]](list)
    for vote in votes:
        for index, score in zip(vote.order, vote.scores or (), strict=True):
            given[index].append(score)
    return {index: round(fmean(scores), 3) for index, scores in sorted(given.items())}


def _below_mean(scores: Mapping[int, float], best: int, sigmas: float) -> int | None:
    """Return the completion that scores the closest to so many standard deviations below the mean, and under the best.

    Of many completions the very worst is an outlier, which any policy beats: see arXiv 2502.16825.
    """
    target = fmean(scores.values()) - sigmas * pstdev(scores.values())
    lower = [index for index, score in scores.items() if score < scores[best]]
    return min(lower, key=lambda index: (abs(scores[index] - target), index), default=None)


def _choose(votes: Sequence[Vote], policy: PairPolicy) -> tuple[int | None, int | None]:
    if policy == "borda":
        # Borda count with three ranks: best +1, unnamed 0, worst -1; a tie at an end names nobody.
        scores: Counter[int | None] = Counter(dict.fromkeys(votes[0].order, 0))
        scores.update(vote.best for vote in votes)
        scores.subtract(vote.worst for vote in votes)
        ends = [[i for i, score in scores.items() if score == end(scores.values())] for end in (max, min)]
        best, worst = (found[0] if len(found) == 1 else None for found in ends)
        return best, worst
    share = len(votes) if policy == "unanimous" else len(votes) // 2 + 1
    chosen = [Counter(getattr(vote, name) for vote in votes).most_common(1)[0] for name in ("best", "worst")]
    best, worst = (index if count >= share else None for index, count in chosen)
    return (best, worst) if best != worst else (None, None)


def is_validation(identity: str, group: str | None, seed: int, val_ratio: float) -> bool:
    """Tell whether a prompt lies on the validation side: by its group if it has one, and never by its neighbours."""
    drawn = hashlib.sha256(f"{seed}:{group or identity}".encode()).digest()[:8]
    return int.from_bytes(drawn, "big") / 2**64 < val_ratio


def preference_pair(row: VerdictsRow, decision: Decision) -> PairRow:
    """Return the row of `train.jsonl` or `val.jsonl`: TRL's conversational form, and what was sampled.

    Raises `ValueError`: the decision is not a pair, nor one for the SFT term alone.
    """
    sft_only = decision.status == SFT or None
    rejected = decision.best if sft_only else decision.worst
    if decision.best is None or rejected is None:
        raise ValueError(f"row {row.id} has no pair: {decision.reason}")
    sampled = dict(enumerate(row.token_ids)), dict(enumerate(row.finish_reasons))
    pair: dict[str, Any] = {"id": row.id, "prompt": row.prompt, "prompt_token_ids": row.prompt_token_ids}
    for name, index in (("chosen", decision.best), ("rejected", rejected)):
        pair[name] = [Message(role="assistant", content=row.completions[index])]
        pair[f"{name}_token_ids"], pair[f"{name}_finish_reason"] = (known.get(index) for known in sampled)
        if decision.scores:
            pair[f"{name}_score"] = decision.scores[index]
    return PairRow(**pair, sft_only=sft_only, confidence=decision.confidence, group=row.group)
