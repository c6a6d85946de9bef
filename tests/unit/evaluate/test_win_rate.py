"""The win rate and its interval: right on average, and as sure as it says."""

import random
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from tasks.config import EvaluationConfig, GenerationConfig
from tasks.errors import PreflowError
from tasks.evaluate.win_rate import BASELINE, CANDIDATE, NULL, draw_settings, outcome_of, pair_samples, win_rate
from tasks.judge.quality.counters import wilson_interval
from tasks.store.workspace import AdapterRef, CompletionsRef, Workspace

Row = dict[str, Any]


def votes(*best: int | None, judge: str = "j") -> list[Row]:
    orders = [[0, 1], [1, 0]]
    return [
        {"judge": judge, "order": orders[i % 2], "error": "unreadable"} if b is None else
        {"judge": judge, "order": orders[i % 2], "best": b, "worst": 1 - b}
        for i, b in enumerate(best)
    ]  # fmt: skip


def compared(*best: int | None, texts: tuple[str, str] = ("a", "b")) -> Row:
    return {"completions": list(texts), "votes": votes(*best)}


# ---- one comparison


@pytest.mark.parametrize(
    ("row", "outcome"),
    [
        (compared(1, 1), 1.0),
        (compared(0, 0), 0.0),
        (compared(0, 1), 0.5),
        (compared(1, 0), 0.5),
        (compared(1, None), 0.5),
        (compared(None, None), 0.5),
        (compared(texts=("a", "a")), 0.5),
        (compared(texts=("a", "")), 0.0),
        (compared(texts=(" ", "b")), 1.0),
        (compared(texts=("", " ")), 0.5),
        ({"completions": ["a", "b"], "votes": votes(1, 1) + votes(0, 0, judge="k")}, 0.5),
        ({"completions": ["a", "b"], "votes": votes(1, 1) + votes(0, 1, judge="k")}, 0.75),
    ],
)
def test_a_comparison_is_worth(row: Row, outcome: float) -> None:
    assert outcome_of(row) == outcome


def test_a_judge_that_follows_the_position_decides_nothing() -> None:
    assert outcome_of({"completions": ["a", "b"], "votes": [{**v, "best": v["order"][-1]} for v in votes(0, 0)]}) == 0.5


# ---- the interval


def test_one_sample_a_prompt_gives_wilson_s_interval() -> None:
    for wins, total in [(0, 40), (7, 40), (40, 40), (300, 520)]:
        outcomes = {str(i): [float(i < wins)] for i in range(total)}
        found = win_rate(outcomes, 0.95)
        low, high = wilson_interval(wins, total)
        assert found.win_rate == pytest.approx(wins / total)
        assert (found.lower, found.upper) == pytest.approx((low, high), abs=0.004)


def test_equal_samples_of_a_prompt_count_as_one() -> None:
    alone = win_rate({str(i): [float(i % 3 > 0)] for i in range(300)}, 0.95)
    copied = win_rate({str(i): [float(i % 3 > 0)] * 8 for i in range(300)}, 0.95)
    assert copied.samples == 2400
    assert copied.effective_samples == pytest.approx(300, rel=0.02)
    assert (copied.lower, copied.upper) == pytest.approx((alone.lower, alone.upper), abs=0.003)


def test_independent_samples_of_a_prompt_count_each() -> None:
    rng = random.Random(0)
    found = win_rate({str(i): [float(rng.random() < 0.6) for _ in range(8)] for i in range(500)}, 0.95)
    assert found.effective_samples > 3200


@pytest.mark.parametrize(("true_rate", "alike", "ties"), [(0.5, 0.0, 0.0), (0.55, 0.5, 0.0), (0.6, 0.3, 0.4)])
def test_the_interval_holds_the_truth_as_often_as_it_says(true_rate: float, alike: float, ties: float) -> None:
    rng = random.Random(7)
    covered = below = 0
    runs = 400
    for _ in range(runs):
        outcomes = {str(i): draw_prompt(rng, true_rate, alike, ties) for i in range(120)}
        found = win_rate(outcomes, 0.95)
        covered += found.lower <= true_rate <= found.upper
        below += found.lower > true_rate
    # 95 % of 400 is 380, standard deviation 4.4; ties make the interval wider than it need be, never narrower.
    assert covered >= 366
    assert ties or covered <= 396
    assert below <= 0.045 * runs, "the lower bound, which promotes, must not be too high too often"


def draw_prompt(rng: random.Random, rate: float, alike: float, ties: float) -> list[float]:
    """Draw 4 samples whose mean is `rate`: a share `alike` copies the prompt's own draw, a share `ties` is 0.5."""
    own = float(rng.random() < (rate - ties / 2) / (1 - ties))
    drawn = []
    for _ in range(4):
        if rng.random() < ties:
            drawn.append(0.5)
        else:
            drawn.append(own if rng.random() < alike else float(rng.random() < (rate - ties / 2) / (1 - ties)))
    return drawn


def test_bounds_stay_within_0_and_1_and_nothing_is_an_error() -> None:
    every = win_rate({"a": [1.0, 1.0], "b": [1.0]}, 0.95)
    assert (every.win_rate, every.upper) == (1.0, 1.0)
    assert every.lower < 0.6
    assert win_rate({"a": [0.5]}, 0.95).ties == 1.0
    with pytest.raises(PreflowError, match="no comparison"):
        win_rate({}, 0.95)
    assert fmean([win_rate({"a": [0.0]}, 0.95).lower]) == 0.0


# ---- draws and pairing


def test_the_three_draws_differ_and_only_the_candidate_is_loaded(tmp_path: Path) -> None:
    evaluation = EvaluationConfig(generation=GenerationConfig(adapter="/sft", model="sft", num_completions=3))
    adapter = AdapterRef(uri=f"{tmp_path}/adapters/x", sha256="f" * 64, size=1, rows=1)
    sft, again = (draw_settings(evaluation, draw, str(tmp_path)) for draw in (BASELINE, NULL))
    new = draw_settings(evaluation, CANDIDATE, str(tmp_path), adapter)
    assert len({draw.seed for draw in (sft, new, again)}) == 3
    assert {draw.num_completions for draw in (sft, new, again)} == {4}
    assert (sft.model, sft.adapter, sft.serve_from) == ("sft", "/sft", None)
    assert (new.model, new.adapter, new.serve_from) == ("candidate-" + "f" * 12, adapter.uri, adapter.uri)


def write_completions(store: Workspace, name: str, rows: dict[str, list[str]]) -> CompletionsRef:
    with store.writing(store.uri(name)) as out:
        for identity, texts in rows.items():
            out.write_row({"id": identity, "prompt": [{"role": "user", "content": identity}], "completions": texts})
    return CompletionsRef(uri=store.uri(name), **out.facts())


def test_samples_are_paired_by_prompt_and_number_whatever_the_order(tmp_path: Path) -> None:
    import json

    store = Workspace(tmp_path)
    a = write_completions(store, "a.jsonl", {"p": ["p0", "p1"], "q": ["q0", "q1"], "r": ["r0", "r1"]})
    b = write_completions(store, "b.jsonl", {"q": ["Q0", "Q1"], "p": ["P0", "P1"]})
    paired = pair_samples(a, b, str(tmp_path))
    rows = [json.loads(line) for line in Path(paired.uri).read_text().splitlines()]
    assert [(row["id"], row["completions"]) for row in rows] == [
        ("p#0", ["p0", "P0"]), ("p#1", ["p1", "P1"]), ("q#0", ["q0", "Q0"]), ("q#1", ["q1", "Q1"]),
    ]  # fmt: skip
    with pytest.raises(PreflowError, match="share no prompt"):
        pair_samples(a, write_completions(store, "c.jsonl", {"x": ["x"]}), str(tmp_path))
