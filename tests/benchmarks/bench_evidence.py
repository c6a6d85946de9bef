"""How far the gate can be believed: coverage, power, length, other judges, a person. Prints docs/evidence.md's tables.

Run `python -m tests.benchmarks.bench_evidence` (about ten minutes on one core; `--runs 200` for a glance).
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from statistics import fmean

import numpy as np
from scipy.stats import norm

from tasks.config import EvaluationConfig, JudgeConfig
from tasks.evaluate.choice import try_checkpoint
from tasks.evaluate.comparisons import Comparison, length_controlled, win_rate
from tasks.evaluate.labels import correct_rate
from tasks.evaluate.power import Design, design_of
from tasks.evaluate.win_rate import judge_adapter
from tasks.store.measures import Choice, Evaluation
from tests.fakes.comparisons import (
    ERRING_JUDGES,
    LENGTH_JUDGES,
    PlantedJudge,
    better_wins,
    draw_checkpoints,
    draw_groups,
    draw_labels,
    draw_opinions,
    draw_texts,
    longer_wins_mostly,
)

Rows = Iterator[tuple[object, ...]]
BARS = (0.5, 0.55, 0.6, 0.7)  # of promotion.min_agreement


def measure(comparisons: Sequence[Comparison]) -> Evaluation:
    """Return the two win rates that the gate looks at."""
    raw = win_rate(comparisons, 0.95)
    return Evaluation(**raw.model_dump(), adapter_sha256="", length_controlled=length_controlled(comparisons, 0.95))


def table(title: str, columns: tuple[str, ...], rows: Rows) -> None:
    print(f"\n**{title}**\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for row in rows:
        cells = (f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row)
        print(f"| {' | '.join(cells)} |", flush=True)


def coverage(rng: np.random.Generator, runs: int) -> Rows:
    for groups, prompts, icc in ((200, 1, 0.0), (10, 20, 0.0), (10, 20, 0.05), (10, 20, 0.1), (4, 50, 0.05)):
        found = [win_rate(draw_groups(rng, groups, prompts, icc), 0.95) for _ in range(runs)]
        held, over = (fmean(map(test, found)) for test in (lambda f: f.holds(0.5), lambda f: f.lower > 0.5))
        yield f"{groups} x {prompts}", icc, float(held), float(over)


def power(rng: np.random.Generator, runs: int) -> Rows:
    def groups(count: int, prompts: int, icc: float, rate: float, ties: float) -> Callable[[int], list[Comparison]]:
        chance = (rate - ties / 2) / (1 - ties)
        return lambda times: draw_groups(rng, count * times, prompts, icc, chance, ties)

    def texts(longer: float, rate: float) -> Callable[[int], list[Comparison]]:
        return lambda times: draw_texts(rng, better_wins, longer, float(norm.ppf(rate)), 150 * times)

    cases = (
        ("100 prompts, no ties", 0.58, 100, groups(100, 1, 0.0, 0.58, 0.0)),
        ("200 prompts, 30 % ties", 0.55, 200, groups(200, 1, 0.0, 0.55, 0.3)),
        ("10 groups x 20, ICC 0.05", 0.62, 200, groups(10, 20, 0.05, 0.62, 0.0)),
        ("150 prompts, new ones longer by 20 %", 0.56, 150, texts(0.2, 0.56)),
        ("150 prompts, new ones longer by 65 %", 0.56, 150, texts(0.5, 0.56)),
    )
    for name, rate, prompts, draw in cases:
        predicted = design_of(measure(draw(20)), prompts, 4).power(rate, 0.5, 0.95)
        passed = fmean(measure(draw(1)).refusal(0.5) is None for _ in range(runs))
        yield name, rate, predicted, passed


def length(rng: np.random.Generator, runs: int) -> Rows:
    for taste in (*LENGTH_JUDGES, better_wins):
        for longer in (0.3, 0.8):
            merit = 0.3 if taste is better_wins else 0.0
            found = [measure(draw_texts(rng, taste, longer, merit)) for _ in range(runs)]
            raw = fmean(one.win_rate for one in found)
            controlled = fmean(one.length_controlled.win_rate for one in found if one.length_controlled)
            wins, passes = fmean(one.lower > 0.5 for one in found), fmean(one.proven > 0.5 for one in found)
            yield taste.__name__, f"{100 * (np.exp(longer) - 1):.0f} %", raw, controlled, wins, passes


def opinions(rng: np.random.Generator, runs: int) -> Rows:
    evaluation = EvaluationConfig(judges=(JudgeConfig(model="other"),))
    for name, merit, quirk in (("honest", 0.4, 0.0), ("quirk of the labelling judge", 0.0, 0.6), ("both", 0.2, 0.3)):
        found = [judge_adapter("", *draw_opinions(rng, merit, quirk), None, evaluation) for _ in range(runs)]
        shares = sorted(one.second.transfer for one in found if one.second and one.second.transfer is not None)
        yield name, fmean(one.win_rate for one in found), fmean(shares), shares[0], shares[-1]


def corrected(rng: np.random.Generator, runs: int) -> Rows:
    for judge in ERRING_JUDGES:
        for rate, labels in ((0.5, 40), (0.6, 50), (0.7, 60)):
            drawn = [draw_labels(rng, judge, rate, labels) for _ in range(runs)]
            raw = fmean(float(one.outcomes.mean()) for one in drawn)
            found = [correct_rate(*astuple(one), 0.95) for one in drawn]
            held = fmean(lower <= rate <= upper for _, lower, upper in found)
            half = fmean((upper - lower) / 2 for _, lower, upper in found)
            yield judge.name, rate, labels, raw, fmean(value for value, _, _ in found), held, half


def agreement(rng: np.random.Generator, runs: int) -> Rows:
    for right in (0.5, 0.55, 0.65, 0.75, 0.85, 0.95):
        says_new = right * 0.6 + (1 - right) * 0.4
        by_chance = 0.6 * says_new + 0.4 * (1 - says_new)
        true_kappa = (right - by_chance) / (1 - by_chance)
        for labels in (40, 60):
            drawn = [draw_labels(rng, PlantedJudge("", right, right), 0.6, labels).agreement() for _ in range(runs)]
            held = fmean(share.lower <= right <= share.upper for share, _ in drawn)
            kappa = fmean(kappa.lower <= true_kappa <= kappa.upper for _, kappa in drawn if kappa)
            yield right, labels, held, kappa, *(fmean(share.lower <= bar for share, _ in drawn) for bar in BARS)


def chosen(rng: np.random.Generator, runs: int) -> Rows:
    for held_out in (200, 500, 1000):
        for rates in ((0.5, 0.55, 0.5), (0.5, 0.6, 0.5), (0.6, 0.55, 0.5), (0.65, 0.55, 0.45)):
            best, lead = max(rates), max(rates) - sorted(rates)[-2]
            choosing, _ = EvaluationConfig(checkpoints=3, max_prompts=held_out).parts(held_out)
            picked = [rates[draw_checkpoints(rng, rates, choosing).best.step] for _ in range(runs)]
            predicted = Design(choosing, 4, 0.3, 1.9, 4).finds(lead, 3)
            true = ", ".join(f"{rate:.2f}" for rate in rates)
            yield held_out, choosing, true, fmean(one == best for one in picked), predicted, fmean(picked)


def chosen_gate(rng: np.random.Generator, runs: int) -> Rows:
    """Three checkpoints that are all as good as the SFT adapter: how often the gate lets the chosen one through."""
    choosing, deciding = EvaluationConfig(checkpoints=3).parts(500)
    for name, count in (("the others, as preflow does", choosing), ("the same", 500)):
        tried = [draw_checkpoints(rng, (0.5,) * 3, count).best for _ in range(runs)]
        decided = tried
        if count == choosing:
            decided = [draw_checkpoints(rng, (0.5,), deciding).best for _ in range(runs)]
        yield (
            name,
            fmean(one.win_rate for one in tried),
            fmean(one.win_rate for one in decided),
            fmean(one.proven > 0.5 for one in decided),
        )


def chosen_length(rng: np.random.Generator, runs: int) -> Rows:
    """A judge that likes length, one checkpoint that writes longer, and one that is better."""
    choosing, _ = EvaluationConfig(checkpoints=3).parts(500)

    def by_merit_or_length(old: int, new: int, merit: float) -> float:
        return (longer_wins_mostly(old, new, merit) + better_wins(old, new, merit)) / 2

    for longer in (0.3, 0.8):
        by_rate, by_gate = 0, 0
        for _ in range(runs):
            writes = ((longer, 0.0), (0.0, 0.6), (0.0, 0.0))
            drawn = [draw_texts(rng, by_merit_or_length, *of, choosing) for of in writes]
            choice = Choice(
                tried=tuple(try_checkpoint(step, "", one, 0.95) for step, one in enumerate(drawn)), prompts=()
            )
            by_rate += max(choice.tried, key=lambda one: one.win_rate).step == 1
            by_gate += choice.best.step == 1
        yield f"{100 * (np.exp(longer) - 1):.0f} %", by_rate / runs, by_gate / runs


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000, help="simulated gates of each row")
    runs, rng = parser.parse_args().runs, np.random.default_rng(13)
    table("Coverage of the 95 % interval", ("groups x prompts", "ICC", "holds the truth", "lower bound over it"),
          coverage(rng, runs))  # fmt: skip
    table("Power, predicted and simulated", ("held out", "true win rate", "predicted", "simulated"), power(rng, runs))
    table(
        "Planted judges of length, and an honest one",
        ("judge", "new ones longer by", "raw", "length-controlled", "passes by the raw rate", "passes the gate"),
        length(rng, runs // 20),
    )
    table("A second judge", ("adapter", "win rate", "transfer", "lowest", "highest"), opinions(rng, runs // 20))
    table(
        "The corrected win rate",
        ("judge", "true win rate", "labels", "by the judge", "corrected", "holds the truth", "half of the interval"),
        corrected(np.random.default_rng(13), runs // 2),
    )
    table(
        "Agreement with a person",
        ("judge is right in", "labels", "holds the truth", "kappa does", *(f"refused at {bar:g}" for bar in BARS)),
        agreement(np.random.default_rng(13), runs // 2),
    )
    rng = np.random.default_rng(13)
    table(
        "The best of three checkpoints",
        ("held out", "of them choose", "truly win", "best found", "predicted", "the chosen one truly wins"),
        chosen(rng, runs // 5),
    )
    table(
        "Three checkpoints no better than the SFT adapter",
        ("decided by", "chosen one's rate where chosen", "where decided", "passes the gate"),
        chosen_gate(rng, runs // 4),
    )
    table("A longer checkpoint and a better one", ("longer by", "better one found by the raw rate", "by both bounds"),
          chosen_length(rng, runs // 20))  # fmt: skip


if __name__ == "__main__":
    main()
