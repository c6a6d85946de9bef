"""What a person says of a run's comparisons, blind: which are shown, the answers, and what they say of the judge."""

import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from tasks.config import EvaluationConfig
from tasks.errors import PreflowError
from tasks.evaluate.comparisons import Row, read_comparison
from tasks.evaluate.intervals import Floats, Places, cluster_variance, estimate_mean, quantile, wilson
from tasks.store.measures import AGREEMENT, Agreement, Interval, WinRate
from tasks.store.workspace import EvaluationRef, Workspace, digest

# What a person presses: the left one is better, the right one, neither.
Choice = Literal["1", "2", "0"]
SEED = 13
# Keeps a rate off 0 and 1, and tells a judge that always says the same from one that does not.
EDGE = 1e-4


def labels_uri(evaluation: EvaluationRef) -> str:
    """Return where a person's answers lie: with the samples, so that they outlive another judge of the same texts.

    Raises:
        PreflowError: the evaluation does not say what it was made from.
    """
    store = Workspace.holding(evaluation.uri)
    verdicts = store.read_manifest(evaluation).origin("verdicts")
    samples = store.read_manifest(verdicts).origin("completions") if verdicts else None
    if samples is None or samples.manifest is None:
        raise PreflowError(f"{evaluation.manifest}: does not say which samples were compared; evaluate-adapter again")
    return posixpath.join(posixpath.dirname(samples.manifest), "labels.json")


def read_labels(evaluation: EvaluationRef) -> dict[str, float]:
    """Return what each labelled comparison was worth to the new adapter, in the person's eyes: 1, 0.5 or 0."""
    uri = labels_uri(evaluation)
    store = Workspace.holding(uri)
    return dict(store.read_json(uri)) if store.exists(uri) else {}


def labelling_judges(evaluation: EvaluationConfig) -> set[str]:
    """Return the models that made the labels; theirs is the win rate that a person's answers are compared with."""
    return {judge.model for judge in evaluation.null_judge().judges()}


class Labelling:
    """Comparisons of one evaluation for a person to judge, one at a time, in an order and on sides that a seed decides.

    They are a random sample of what the judge was asked, of as many prompts as possible. Nothing that is shown tells
    which side is the new adapter's, or what the judge said.
    """

    def __init__(self, evaluation: EvaluationRef, pairs: int) -> None:
        self._uri, self._known = labels_uri(evaluation), read_labels(evaluation)
        self._store = Workspace.holding(self._uri)
        self._rows = choose_rows(list(self._store.read_rows(evaluation.sibling("comparisons.jsonl"))), pairs)
        if not self._rows:
            raise PreflowError(f"{evaluation.uri}: the judge was asked nothing, so there is nothing to compare it with")

    @property
    def total(self) -> int:
        """Pairs to judge."""
        return len(self._rows)

    @property
    def missing(self) -> list[int]:
        """The numbers of the pairs without an answer."""
        return [number for number, row in enumerate(self._rows) if row["id"] not in self._known]

    def show(self, number: int) -> dict[str, Any]:
        """Return one pair as a person sees it, with how far the labelling is."""
        row = self._rows[number]
        sides = row["completions"][::-1] if new_is_left(row["id"]) else row["completions"]
        done = self.total - len(self.missing)
        return {"number": number, "done": done, "total": self.total, "prompt": row["prompt"], "sides": sides}

    def answer(self, number: int, choice: Choice) -> None:
        """Keep an answer; a later one on the same pair takes its place."""
        identity = self._rows[number]["id"]
        left = {"1": 1.0, "2": 0.0, "0": 0.5}[choice]
        worth = left if new_is_left(identity) else 1 - left
        self._known = self._store.update_json(self._uri, lambda known: {**(known or {}), identity: worth})


def choose_rows(rows: Iterable[Row], pairs: int) -> list[Row]:
    """Return a random sample of what a judge was asked, of as many prompts as possible: the same at each call."""
    asked = sorted((row for row in rows if row["votes"]), key=lambda row: digest([SEED, row["id"]]))
    seen, turns = Counter[str](), list[tuple[int, Row]]()
    for row in asked:
        seen[row["prompt_id"]] += 1
        turns.append((seen[row["prompt_id"]], row))
    turns.sort(key=lambda turn: turn[0])  # stable: the order within a turn stays random
    return [row for _, row in turns[:pairs]]


def new_is_left(identity: str) -> bool:
    """Tell on which side the new adapter's sample of a comparison is shown."""
    return int(digest([SEED, "side", identity])[:8], 16) % 2 == 0


def record_agreement(evaluation: EvaluationRef) -> Agreement | None:
    """Write `agreement.json` next to an evaluation whose samples somebody has labelled, and return what it says.

    Without labels there is none: one of labels that somebody has deleted goes.
    """
    store, labels = Workspace.holding(evaluation.uri), read_labels(evaluation)
    settings = store.read_manifest(evaluation).settings(EvaluationConfig)
    rows = store.read_rows(evaluation.sibling("comparisons.jsonl")) if labels else ()
    found = measure_agreement(rows, labels, settings)
    if found is not None:
        store.write_json(evaluation.sibling(AGREEMENT), found.model_dump(mode="json"))
    elif store.exists(evaluation.sibling(AGREEMENT)):  # who only reads may delete nothing
        store.delete(evaluation.sibling(AGREEMENT))
    return found


def measure_agreement(
    rows: Iterable[Row], labels: Mapping[str, float], evaluation: EvaluationConfig
) -> Agreement | None:
    """Compare the judges that made the labels with a person, and correct their win rate by it.

    `labels` tell what some rows were worth to the new adapter, by their ids. None: no comparison was judged by both.
    """
    judges, confidence = labelling_judges(evaluation), evaluation.confidence
    read = [(row["id"], bool(row["votes"]), read_comparison(row, judges)) for row in rows]
    read = [one for one in read if one[2].outcome is not None]
    human = np.array([labels.get(identity, np.nan) if asked else np.nan for identity, asked, _ in read])
    labelled = ~np.isnan(human)
    if not labelled.any():
        return None
    outcomes = np.array([one.outcome for _, _, one in read], dtype=np.float64)
    asked = np.array([was_asked for _, was_asked, _ in read], dtype=np.float64)
    clusters = np.unique([one.cluster for _, _, one in read], return_inverse=True)[1]
    share, kappa = measure_closeness(human[labelled], outcomes[labelled], clusters[labelled], confidence)
    rate, lower, upper = correct_rate(outcomes, asked, human, clusters, confidence)
    corrected = WinRate(
        win_rate=rate, lower=lower, upper=upper, confidence=confidence, samples=len(read),
        prompts=len({one.prompt for _, _, one in read}), clusters=int(clusters.max()) + 1,
        ties=float((human[labelled] == 0.5).mean()),
    )  # fmt: skip
    return Agreement(labels=int(labelled.sum()), share=share, kappa=kappa, corrected=corrected)


def measure_closeness(
    human: Floats, judge: Floats, clusters: Places, confidence: float
) -> tuple[Interval, Interval | None]:
    """Return the share in which a person and a judge agree, a tie with a decision counting half, and kappa.

    Kappa is Cohen's with linear weights (Cohen 1968). Its interval is that of the share, with the agreement by chance
    taken as known, as in Cohen's own standard error (1960); so it has a width where nobody ever disagreed.
    """
    found = estimate_mean(1 - np.abs(human - judge), clusters)
    share = (found.rate, *found.interval(confidence))
    by_chance = float(1 - np.abs(human[:, None] - judge[None, :]).mean())
    if by_chance == 1:
        return _interval(share), None
    return _interval(share), _interval([(figure - by_chance) / (1 - by_chance) for figure in share])


def correct_rate(
    outcomes: Floats, asked: Floats, human: Floats, clusters: Places, confidence: float
) -> tuple[float, float, float]:
    """Return the win rate in a person's eyes and its bounds: the judge saw all comparisons, the person some.

    Prediction-powered inference (Angelopoulos et al. 2023, arXiv 2301.09633; the weight: PPI++, arXiv 2311.01453): the
    judge's rate, plus what the person's answers differ from it on average. A judge that knows nothing gets the weight
    0, and the labels alone count. The variance adds up, by cluster, what each comparison moves, so that it holds that
    all comparisons are a sample, and the labelled ones a sample of them. Where person and judge never differ, that
    would forget how few the labels are: one more is invented, at which the judge is wrong altogether. What no judge
    was asked (`asked` is 0), as one side was silent or both are equal, stands as it is. `human` is nan without a label.
    """
    labelled = ~np.isnan(human)
    count, share = int(labelled.sum()), float(asked.mean())
    judge, person = outcomes[labelled], human[labelled]
    weight, scatter = 0.0, float(judge.var())  # what makes the variance smallest, given the share that is labelled
    if scatter >= EDGE:
        together = float(((judge - judge.mean()) * (person - person.mean())).mean())
        weight = min(1.0, max(0.0, together / scatter / (1 + count / float(asked.sum()))))
    differs = person - weight * judge
    corrected = np.where(asked > 0, weight * outcomes + differs.mean(), outcomes)
    influence = (corrected - corrected.mean()) / len(outcomes)
    influence[labelled] += share * (differs - differs.mean()) / count
    variance = cluster_variance(influence, clusters) + (share / count) ** 2
    rate = float(np.clip(corrected.mean(), EDGE, 1 - EDGE))
    q = quantile(confidence, len(np.unique(clusters[labelled])))
    return (rate, *wilson(rate, rate * (1 - rate) / variance, q))


def _interval(figures: Sequence[float]) -> Interval:
    value, lower, upper = (round(figure, 12) for figure in figures)
    return Interval(value=value, lower=lower, upper=upper)
