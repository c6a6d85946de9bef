"""The win rate and its interval: right on average, and as sure as it says."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from tasks.config import EvaluationConfig, GenerationConfig, JudgeConfig
from tasks.errors import PreflowError
from tasks.evaluate import win_rate as proof
from tasks.evaluate.comparisons import (
    Comparison,
    join_samples,
    length_controlled,
    outcome_of,
    read_comparison,
    win_rate,
)
from tasks.evaluate.win_rate import NULL_CONFIDENCE, draw_settings, judge_adapter, pair_samples
from tasks.judge.quality.metrics import wilson_interval
from tasks.store.measures import Evaluation
from tasks.store.workspace import AdapterRef, CompletionsRef, Workspace
from tests.fakes import comparisons as fakes
from tests.fakes.comparisons import compared, draw_groups, draw_opinions, draw_texts

Row = dict[str, Any]


def votes(*best: int | None, judge: str = "j") -> list[Row]:
    orders = [[0, 1], [1, 0]]
    return [
        {"judge": judge, "order": orders[i % 2], "error": "unreadable"} if b is None else
        {"judge": judge, "order": orders[i % 2], "best": b, "worst": 1 - b}
        for i, b in enumerate(best)
    ]  # fmt: skip


def comparison(*best: int | None, texts: tuple[str, str] = ("a", "b")) -> Row:
    return {"completions": list(texts), "votes": votes(*best)}


@pytest.mark.parametrize(
    ("row", "outcome"),
    [
        (comparison(1, 1), 1.0),
        (comparison(0, 0), 0.0),
        (comparison(0, 1), 0.5),
        (comparison(1, 0), 0.5),  # a judge that follows the position
        (comparison(1, None), None),
        (comparison(None, None), None),
        (comparison(texts=("a", "a")), 0.5),
        (comparison(texts=("a", "")), 0.0),
        (comparison(texts=(" ", "b")), 1.0),
        (comparison(texts=("", " ")), 0.5),
        ({"completions": ["a", "b"], "votes": votes(1, 1) + votes(0, 0, judge="k")}, 0.5),
        ({"completions": ["a", "b"], "votes": votes(1, 1) + votes(0, 1, judge="k")}, 0.75),
        ({"completions": ["a", "b"], "votes": votes(1, 1) + votes(0, None, judge="k")}, 1.0),
    ],
)
def test_a_comparison_is_worth(row: Row, outcome: float | None) -> None:
    assert outcome_of(row) == outcome
    plain = {**row, "prompt_id": "p"}
    assert read_comparison({**plain, "group": ""}).cluster == read_comparison(plain).cluster == "p"
    assert read_comparison({**plain, "group": "p"}).cluster != "p"


def test_one_sample_a_prompt_gives_wilson_s_interval() -> None:
    for wins, total in [(0, 40), (7, 40), (40, 40), (300, 520)]:
        found = win_rate(compared({str(i): [float(i < wins)] for i in range(total)}), 0.95)
        assert found.win_rate == pytest.approx(wins / total)
        assert (found.lower, found.upper) == pytest.approx(wilson_interval(wins, total), abs=0.006)


def test_equal_samples_of_a_prompt_count_as_one_and_independent_ones_each() -> None:
    alone, copied = (win_rate(compared({str(i): [float(i % 3 > 0)] * n for i in range(300)}), 0.95) for n in (1, 8))
    assert copied.samples == 2400
    assert copied.effective_samples == pytest.approx(300, rel=0.02)
    assert (copied.lower, copied.upper) == pytest.approx((alone.lower, alone.upper), abs=0.003)
    rng = random.Random(0)
    found = win_rate(compared({str(i): [float(rng.random() < 0.6) for _ in range(8)] for i in range(500)}), 0.95)
    assert found.effective_samples > 3200


@pytest.mark.slow  # a simulation
@pytest.mark.parametrize(
    ("groups", "prompts", "icc", "rate", "ties"),
    # With prompts as clusters the interval of the last held in 72 % only.
    [(120, 1, 0.0, 0.5, 0.0), (120, 1, 0.0, 0.55, 0.0), (120, 1, 0.0, 0.6, 0.4), (10, 20, 0.05, 0.5, 0.0)],
)
def test_the_interval_holds_the_truth_as_often_as_it_says(
    groups: int, prompts: int, icc: float, rate: float, ties: float
) -> None:
    rng = np.random.default_rng(3)
    runs = [win_rate(draw_groups(rng, groups, prompts, icc, rate, ties), 0.95) for _ in range(300)]
    assert runs[0].clusters == groups
    truth = ties / 2 + (1 - ties) * rate
    covered = sum(run.holds(truth) for run in runs)
    # 95 % of 300 is 285, standard deviation 3.8; ties make the interval wider than it need be, never narrower.
    assert covered >= 275
    assert ties or covered <= 297
    assert sum(run.lower > truth for run in runs) <= 15, "the lower bound promotes: seldom too high"


def test_bounds_stay_within_0_and_1_and_nothing_is_an_error() -> None:
    every = win_rate(compared({"a": [1.0, 1.0], "b": [1.0]}), 0.95)
    assert (every.win_rate, every.upper) == (1.0, 1.0)
    assert every.lower < 0.7
    assert win_rate(compared({"a": [0.5]}), 0.95).ties == 1.0
    assert win_rate(compared({"a": [0.0]}), 0.95).lower == 0.0
    for outcome in (0.0, 1.0):
        for count, by_prior in ((1, 0.5), (3, 0.5), (4, 0.5), (12, 0.75)):
            found = length_controlled(compared({str(k): [outcome] for k in range(count)}), 0.95)
            assert found.win_rate == pytest.approx(abs(1 - outcome - by_prior)), (
                "a few are not turned into their contrary"
            )
    with pytest.raises(PreflowError, match="no comparison"):
        win_rate(compared({}), 0.95)


def test_the_three_draws_differ_and_only_the_candidate_is_loaded(tmp_path: Path) -> None:
    evaluation = EvaluationConfig(generation=GenerationConfig(adapter="/sft", model="sft", num_completions=3))
    adapter = AdapterRef(uri=f"{tmp_path}/adapters/x", sha256="f" * 64, size=1, rows=1)
    sft, again = (draw_settings(evaluation, draw, str(tmp_path)) for draw in (proof.BASELINE, proof.NULL))
    new = draw_settings(evaluation, proof.CANDIDATE, str(tmp_path), adapter)
    assert len({draw.seed for draw in (sft, new, again)}) == 3
    assert {draw.num_completions for draw in (sft, new, again)} == {4}
    assert (sft.model, sft.adapter, sft.serve_from) == ("sft", "/sft", None)
    assert (new.model, new.adapter, new.serve_from) == ("candidate-" + "f" * 12, adapter.uri, adapter.uri)


def write_completions(store: Workspace, name: str, rows: dict[str, list[str]]) -> CompletionsRef:
    with store.writing(store.uri(name)) as out:
        for identity, texts in rows.items():
            out.write_row({"id": identity, "prompt": [{"role": "user", "content": identity}], "completions": texts})
    return CompletionsRef(uri=store.uri(name), **out.facts())


def test_samples_are_paired_once_and_what_the_new_adapter_failed_on_is_lost(tmp_path: Path) -> None:
    store = Workspace(tmp_path)
    a = write_completions(store, "a/a.jsonl", {"p": ["p0", "p1"], "q": ["q0", "q1"], "r": ["r0", "r1"], "s": ["s0"]})
    b = write_completions(store, "b/b.jsonl", {"r": ["R0", "R1"], "p": ["P0", ""]})
    store.write_bytes(store.uri("b/failures.jsonl"), b'{"id": "q", "reason": "context_length"}\n')
    paired = pair_samples(a, b, str(tmp_path))
    rows = [json.loads(line) for line in Path(paired.uri).read_text().splitlines()]
    assert [(row["id"], row["completions"]) for row in rows] == [
        ("p#0", ["p0", "P0"]), ("p#1", ["p1", ""]), ("q#0", ["q0", ""]), ("q#1", ["q1", ""]), ("r#0", ["r0", "R0"]),
        ("r#1", ["r1", "R1"]),
    ]  # fmt: skip
    won = [read_comparison({**row, "votes": votes(1, 1)}) for row in rows]
    assert [one.outcome for one in won] == [1, 0, 0, 0, 1, 1]
    found = win_rate(won, 0.95)
    assert (found.win_rate, found.silent, found.prompts) == (0.5, 3, 3)
    turned = win_rate(
        [read_comparison({**row, "completions": row["completions"][::-1], "votes": []}) for row in rows], 0.95
    )
    assert (turned.silent, turned.sft_silent, turned.samples) == (0, 3, 3)
    before = Path(paired.uri).stat().st_mtime_ns
    assert pair_samples(a, b, str(tmp_path)) == paired
    assert Path(paired.uri).stat().st_mtime_ns == before, "finished pairs are found, not written again"
    with pytest.raises(PreflowError, match="share no prompt"):
        pair_samples(a, write_completions(store, "c.jsonl", {"x": ["x"]}), str(tmp_path))


def test_joining_holds_only_rows_that_wait_for_their_partner() -> None:
    read: list[int] = []

    def rows(side: str) -> Iterator[Row]:
        for number in range(50):
            read.append(number)
            yield {"id": str(number), "prompt": [], "completions": [side]}

    for number, row in enumerate(join_samples(rows("old"), rows("new"), failed={"7"})):
        assert row["completions"] == ["old", "" if number == 7 else "new"]
        assert len(read) <= 2 * number + 4


@pytest.mark.parametrize("taste", fakes.LENGTH_JUDGES)
@pytest.mark.parametrize("longer", [0.3, 0.8])
def test_a_judge_that_likes_length_only_promotes_nothing(taste: fakes.Taste, longer: float) -> None:
    rng = np.random.default_rng(1)
    runs = [measured(draw_texts(rng, taste, longer)) for _ in range(8)]
    rates = [run.length_controlled.win_rate for run in runs if run.length_controlled]
    assert min(run.win_rate for run in runs) >= 0.58
    assert fmean(rates) == pytest.approx(0.5, abs=0.015)
    assert max(abs(rate - 0.5) for rate in rates) < 0.06
    assert sum(run.refusal(0.5) is None for run in runs) <= 1


def test_an_honest_win_stays_one_without_length_unless_every_sample_is_longer() -> None:
    found = measured(draw_texts(np.random.default_rng(2), fakes.better_wins, longer=0.2, merit=0.3))
    assert found.length_controlled.win_rate == pytest.approx(found.win_rate, abs=0.02)
    assert found.refusal(0.5) is None
    longer = measured(draw_texts(np.random.default_rng(4), fakes.better_wins, longer=3.0, merit=0.3))
    assert longer.lower > 0.5
    assert "length taken out" in (longer.refusal(0.5) or ""), "nothing tells length from merit"


def test_a_second_judge_sees_no_quirk_and_confirms_what_is_honest() -> None:
    rng = np.random.default_rng(5)
    for _ in range(5):
        honest, planted = (measured(*draw_opinions(rng, *drawn)).second for drawn in ((0.4, 0.0), (0.0, 0.6)))
        assert (honest.transfer or 0) > 0.7
        assert (planted.transfer or 0) < 0.3
    assert planted.judges == ("other",)
    no_gain = measured(*draw_opinions(rng, -0.3, 0.0)).second
    assert no_gain.transfer is None, "of no gain there is no share"
    assert measured(BETTER, compared({"a": [None, None]})).second is None, "nobody could read it"


def test_a_sound_null_test_is_called_false_in_one_of_a_hundred() -> None:
    rng = np.random.default_rng(7)
    drawn = [draw_groups(rng, 100, 1, 0.0) for _ in range(400)]
    assert sum(not win_rate(null, NULL_CONFIDENCE).holds(0.5) for null in drawn) <= 10
    null = measured(BETTER, null=drawn[0]).null
    assert null == win_rate(drawn[0], 0.99)


BETTER = compared({str(number): [float(number % 3 > 0)] for number in range(300)})


def measured(
    first: list[Comparison], second: list[Comparison] | None = None, null: list[Comparison] | None = None
) -> Evaluation:
    evaluation = EvaluationConfig(judges=(JudgeConfig(model="other"),))
    return judge_adapter("0" * 64, first, second or [], null, evaluation)
