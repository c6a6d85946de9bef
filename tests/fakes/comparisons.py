"""Comparisons whose truth is known: by their outcomes, by groups that are alike, by judges with a planted taste."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.evaluate.choice import try_checkpoint
from tasks.evaluate.comparisons import Comparison
from tasks.evaluate.labels import measure_closeness
from tasks.store.measures import Choice, Interval

Taste = Callable[[int, int, float], float]


def compared(outcomes: Mapping[str, Sequence[float | None]]) -> list[Comparison]:
    """Return comparisons of texts of one length: of each prompt the outcomes of its samples."""
    return [
        Comparison(prompt=prompt, cluster=prompt, outcome=outcome, lengths=(100, 100))
        for prompt, values in outcomes.items()
        for outcome in values
    ]


def draw_groups(
    rng: np.random.Generator, groups: int, prompts: int, icc: float, rate: float = 0.5, ties: float = 0.0
) -> list[Comparison]:
    """Draw 4 samples a prompt whose mean is `rate`: groups are alike by `icc`, prompts of a group by 0.3."""
    drawn = []
    for group, mean in enumerate(_scattered(rng, rate, icc, groups)):
        for prompt, chance in enumerate(_scattered(rng, mean, 0.3, prompts)):
            name = f"{group}.{prompt}"
            for _ in range(4):
                outcome = 0.5 if rng.random() < ties else float(rng.random() < chance)
                drawn.append(Comparison(name, f"g{group}" if icc else name, outcome, (100, 100)))
    return drawn


def draw_checkpoints(rng: np.random.Generator, rates: Sequence[float], prompts: int, ties: float = 0.3) -> Choice:
    """Draw what the judge says of checkpoints that truly win at `rates`, on prompts that choose among them."""
    tried = [
        try_checkpoint(step, str(step), draw_groups(rng, prompts, 1, 0.0, (rate - ties / 2) / (1 - ties), ties), 0.95)
        for step, rate in enumerate(rates)
    ]
    return Choice(tried=tuple(tried), prompts=())


def _scattered(rng: np.random.Generator, mean: float, icc: float, count: int) -> list[float]:
    """Draw rates with a mean and an intra-class correlation: a beta distribution."""
    if not icc:
        return [mean] * count
    mean, scale = min(1 - 1e-6, max(1e-6, mean)), (1 - icc) / icc
    return [float(value) for value in rng.beta(mean * scale, (1 - mean) * scale, count)]


def draw_texts(
    rng: np.random.Generator, taste: Taste, longer: float = 0.3, merit: float = 0.0, prompts: int = 250
) -> list[Comparison]:
    """Draw 4 comparisons a prompt, judged by `taste` from both lengths and the merit of the new sample over the old.

    Args:
        rng: the source of chance.
        taste: returns the probability that the new sample wins, or 0.5 for a tie.
        longer: how much longer the new adapter writes, in logarithms of the length.
        merit: mean of the merit's difference, in units of its scatter.
        prompts: held-out prompts.
    """
    drawn = []
    for prompt, usual in enumerate(rng.normal(5, 0.5, prompts)):
        shift = longer + rng.normal(0, 0.1)
        for _ in range(4):
            old, new = round(math.exp(usual + rng.normal(0, 0.3))), round(math.exp(usual + shift + rng.normal(0, 0.3)))
            chance = taste(max(1, old), max(1, new), merit + rng.normal())
            outcome = 0.5 if chance == 0.5 else float(rng.random() < chance)
            drawn.append(Comparison(str(prompt), str(prompt), outcome, (max(1, old), max(1, new))))
    return drawn


# ---- planted judges: the probability that the new sample wins, by both lengths and the difference in merit


def longer_wins(old: int, new: int, merit: float) -> float:
    return 0.5 if old == new else float(new > old)


def longer_wins_mostly(old: int, new: int, merit: float) -> float:
    return 0.5 if old == new else 0.2 + 0.6 * (new > old)


def much_longer_wins(old: int, new: int, merit: float) -> float:
    return 0.499 if max(old, new) < 1.2 * min(old, new) else float(new > old)


def longer_wins_by_degrees(old: int, new: int, merit: float) -> float:
    return 1 / (1 + math.exp(-(new - old) / 40))


def better_wins(old: int, new: int, merit: float) -> float:
    return float(merit > 0)


LENGTH_JUDGES = (longer_wins, longer_wins_mostly, much_longer_wins, longer_wins_by_degrees)


def draw_opinions(
    rng: np.random.Generator, merit: float, quirk: float, prompts: int = 250
) -> tuple[list[Comparison], list[Comparison]]:
    """Draw what two judges say of the same samples: both see the merit, only the first one (of the labels) the quirk.

    `merit` is the mean of its difference between new and old sample, `quirk` how much more often the new one has it.
    """
    first, second = [], []
    for prompt in range(prompts):
        for _ in range(4):
            worth, liked = merit + rng.normal(), quirk + rng.normal()
            for judged, seen in ((first, worth + 2 * liked if quirk else worth), (second, worth)):
                outcome = float(seen + 0.5 * rng.normal() > 0)
                judged.append(Comparison(str(prompt), str(prompt), outcome, (100, 100)))
    return first, second


@dataclass(frozen=True)
class Labelled:
    """What a judge says of all comparisons and a person of some, as `tasks.evaluate.labels.correct_rate` takes it."""

    outcomes: NDArray[np.float64]
    asked: NDArray[np.float64]
    human: NDArray[np.float64]
    clusters: NDArray[np.intp]

    def agreement(self) -> tuple[Interval, Interval | None]:
        known = ~np.isnan(self.human)
        return measure_closeness(self.human[known], self.outcomes[known], self.clusters[known], 0.95)


@dataclass(frozen=True)
class PlantedJudge:
    """How a judge errs: what share of true wins and of true losses it sees, and where it and the person see ties."""

    name: str
    wins: float
    losses: float
    ties: float = 0.0
    human_ties: float = 0.0
    silent: float = 0.0


ERRING_JUDGES = (
    PlantedJudge("right in 55 %", 0.55, 0.55),
    PlantedJudge("right in 75 %", 0.75, 0.75),
    PlantedJudge("right in 95 %", 0.95, 0.95),
    PlantedJudge("always right", 1.0, 1.0),
    PlantedJudge("for the new adapter", 0.95, 0.6),
    PlantedJudge("against it", 0.6, 0.95),
    PlantedJudge("wrong in 75 %", 0.25, 0.25),
    PlantedJudge("says always: new", 1.0, 0.0),
    PlantedJudge("ties, 30 % and 20 %", 0.85, 0.85, 0.3, 0.2),
    PlantedJudge("a fifth silent", 0.8, 0.8, silent=0.2),
)


def draw_labels(
    rng: np.random.Generator, judge: PlantedJudge, rate: float, labels: int = 50, prompts: int = 200
) -> Labelled:
    """Draw 4 comparisons a prompt whose mean worth, in a person's eyes, is `rate`; of some the person says so.

    Silent comparisons are lost without a question; the others make up for them, so that the mean stays `rate`.
    """
    clusters = np.repeat(np.arange(prompts), 4)
    asked = (rng.random(len(clusters)) >= judge.silent).astype(np.float64)
    mean = (rate / (1 - judge.silent) - judge.human_ties / 2) / (1 - judge.human_ties)
    won = rng.random(len(clusters)) < np.repeat(_scattered(rng, mean, 0.3, prompts), 4)
    seen = np.where(won, rng.random(len(clusters)) < judge.wins, rng.random(len(clusters)) >= judge.losses)
    outcomes = np.where(rng.random(len(clusters)) < judge.ties, 0.5, seen) * asked
    truth = np.where(rng.random(len(clusters)) < judge.human_ties, 0.5, won) * asked
    human = np.full(len(clusters), np.nan)
    order = rng.permutation(np.flatnonzero(asked))
    first = order[np.sort(np.unique(clusters[order], return_index=True)[1])]  # one of a prompt, as `choose_rows` does
    chosen = np.concatenate([first, np.setdiff1d(order, first)])[:labels]
    human[chosen] = truth[chosen]
    return Labelled(outcomes, asked, human, clusters)
