"""A person's labels: which comparisons are shown, what is kept, and what they say of the judge and the win rate."""

from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.config import EvaluationConfig, JudgingConfig, PromotionConfig
from tasks.errors import PreflowError
from tasks.evaluate import labels as person
from tasks.evaluate.labels import Labelling, choose_rows, measure_agreement, read_labels, record_agreement
from tasks.promote.pointer import find_disagreement
from tasks.store.measures import read_evaluation
from tasks.store.workspace import PromotionRef, Workspace
from tests.fakes.comparisons import ERRING_JUDGES, PlantedJudge, draw_labels
from tests.fakes.evaluated import evaluated

Row = dict[str, Any]
measure = partial(measure_agreement, evaluation=EvaluationConfig(judging=JudgingConfig(model="j")))


def rows(*outcomes: float | None, start: int = 0) -> list[Row]:
    """Return comparisons, one a prompt, whose votes in both orders come to these outcomes; None was not asked."""
    best = {1.0: (1, 1), 0.0: (0, 0), 0.5: (0, 1)}
    return [
        {
            "id": f"p{number}#0", "prompt_id": f"p{number}",
            "completions": ["a", "b" if outcome is not None else ""],
            "votes": [{"judge": "j", "best": side} for side in best[outcome]] if outcome is not None else [],
        }
        for number, outcome in enumerate(outcomes, start)
    ]  # fmt: skip


def test_the_sample_is_random_the_same_each_time_and_of_as_many_prompts_as_there_are() -> None:
    asked = [{"id": f"p{p}#{s}", "prompt_id": f"p{p}", "votes": [1]} for p in range(30) for s in range(4)]
    silent = [{"id": f"q{p}#0", "prompt_id": f"q{p}", "votes": []} for p in range(30)]
    chosen = choose_rows(asked + silent, 40)
    assert choose_rows(reversed(asked), 40) == chosen
    assert len({row["id"] for row in chosen}) == 40
    assert len({row["prompt_id"] for row in chosen[:30]}) == 30
    assert all(row["votes"] for row in chosen)
    assert choose_rows(asked, 50)[:40] == chosen, "with more pairs, those that were judged stay"
    assert {row["id"][-1] for row in chosen[:30]} == set("0123"), "any sample of a prompt"
    assert 20 <= sum(person.new_is_left(row["id"]) for row in asked[:60]) <= 40


def test_answers_are_kept_as_they_come_and_outlive_another_judge(tmp_path: Path) -> None:
    made = evaluated(tmp_path, lambda identity: [1, 1])
    labelling = Labelling(made, 12)
    for number in range(12):
        left, _ = labelling.show(number)["sides"]
        labelling.answer(number, "1" if "new" in left else "2")
        assert len(read_labels(made)) == number + 1
    assert Labelling(made, 12).missing == []
    assert len(Labelling(made, 16).missing) == 4
    assert set(read_labels(made).values()) == {1.0}
    labelling.answer(0, "0")
    assert list(read_labels(made).values()).count(0.5) == 1
    found = record_agreement(made)
    assert read_evaluation(made).agreement == found
    kept = Path(person.labels_uri(made)).rename(tmp_path / "labels.json")
    assert record_agreement(made) is None
    assert read_evaluation(made).agreement is None, "of labels that were deleted nothing counts"
    kept.rename(person.labels_uri(made))
    again = evaluated(tmp_path, lambda identity: [0, 0], judges=("other",))
    assert again.uri != made.uri
    assert len(read_labels(again)) == 12
    disagreeing = record_agreement(again)
    assert disagreeing.share.value == pytest.approx(0.5 / 12)


def test_nothing_to_judge_and_nothing_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = evaluated(tmp_path, lambda identity: [1, 1], prompts=2)
    monkeypatch.delattr(Workspace, "delete")
    assert record_agreement(made) is None, "who may only read can write evidence"
    assert not Path(person.labels_uri(made)).exists()
    Path(made.sibling("comparisons.jsonl")).write_text("")
    with pytest.raises(PreflowError, match="asked nothing"):
        Labelling(made, 40)
    (tmp_path / "verdicts/main/manifest.json").unlink()
    with pytest.raises(PreflowError, match="missing"):
        read_labels(made)


def test_agreement_by_hand() -> None:
    human, judge = [1, 0, 0, 0.5, 1], [1, 1, 0, 0.5, 0.5]
    found = measure(rows(*judge, 0, 1, 1), {f"p{k}#0": worth for k, worth in enumerate(human)})
    assert (found.labels, found.share.value) == (5, pytest.approx((1 + 0 + 1 + 1 + 0.5) / 5))
    chance = np.mean([1 - abs(h - j) for h in human for j in judge])
    assert found.kappa.value == pytest.approx((0.7 - chance) / (1 - chance))
    assert found.share.lower < 0.7 < found.share.upper


def test_labels_of_what_nobody_asked_and_of_other_runs_do_not_count() -> None:
    judged = [*rows(1, 0, None), {**rows(1, start=3)[0], "votes": [{"judge": "j", "error": "unreadable"}]}]
    assert measure(judged, {"p2#0": 1.0, "p3#0": 1.0, "x": 1.0}) is None
    found = measure(judged, {"p0#0": 1.0, "p2#0": 1.0})
    assert (found.labels, found.corrected.samples) == (1, 3)
    same = measure(rows(*[1.0] * 50), {f"p{number}#0": 1.0 for number in range(50)})
    assert (same.kappa, same.share.value, same.share.upper) == (None, 1.0, 1.0), "of one answer there is no kappa"
    assert 0.9 < same.share.lower < 0.95


def test_a_judge_that_always_agrees_is_left_alone_and_one_that_errs_is_corrected() -> None:
    judged = rows(*[1.0, 1.0, 0.0] * 100)
    right = {row["id"]: float(row["votes"][0]["best"]) for row in judged[:60]}
    assert measure(judged, right).corrected.win_rate == pytest.approx(2 / 3, abs=0.01)
    corrected = measure(judged, {one: worth * (k % 2) for k, (one, worth) in enumerate(right.items())}).corrected
    assert corrected.win_rate == pytest.approx(1 / 3, abs=0.03)
    assert corrected.upper < 0.5


@pytest.mark.slow  # a simulation
@pytest.mark.parametrize("judge", ERRING_JUDGES, ids=lambda judge: judge.name)
def test_the_corrected_interval_holds_the_true_rate(judge: PlantedJudge) -> None:
    rng, held = np.random.default_rng(17), 0
    for rate, labels in [(0.5, 40), (0.5, 60), (0.65, 40), (0.65, 60)] * 100:
        _, lower, upper = person.correct_rate(*astuple(draw_labels(rng, judge, rate, labels)), 0.95)
        held += lower <= rate <= upper
    # 95 % of 400 is 380, standard deviation 4.4.
    assert held >= 367


def test_a_judge_that_agrees_in_55_of_100_is_refused_and_a_good_one_is_not() -> None:
    rng = np.random.default_rng(19)
    for wins, least, most in ((0.55, 0.95, 1.0), (0.85, 0.0, 0.15)):
        drawn = [draw_labels(rng, PlantedJudge("", wins, wins), 0.6).agreement()[0] for _ in range(400)]
        assert least <= np.mean([share.lower <= 0.6 for share in drawn]) <= most
        assert np.mean([share.lower <= wins <= share.upper for share in drawn]) >= 0.92


def test_a_run_waits_for_labels_only_if_it_won_and_is_told_to(tmp_path: Path) -> None:
    won, asks = evaluated(tmp_path, lambda identity: [1, 1]), PromotionConfig(min_agreement=0.6)
    assert "nobody has labelled" in (find_disagreement(won, asks) or "")
    assert find_disagreement(won, PromotionConfig()) is None
    assert find_disagreement(won, asks.model_copy(update={"min_win_rate": 0.999})) is None, "it lost"
    served = PromotionRef(uri="p", sha256="b" * 64, size=1, rows=1, name="mine", adapter_sha256="a" * 64)
    assert find_disagreement(won, asks, served) is None, "what is served stays so"
    labelling = Labelling(won, 40)
    for number in range(labelling.total):
        labelling.answer(number, "1" if "new" in labelling.show(number)["sides"][0] else "2")
    record_agreement(won)
    assert find_disagreement(won, asks) is None
    for number in range(labelling.total):
        labelling.answer(number, "0")
    record_agreement(won)
    assert "agrees with a person in 50.0 %" in (find_disagreement(won, asks) or "")
    found = read_evaluation(won)
    assert found.refusal(0.5) is None, "labels count where they are asked for"
    assert "min_agreement (60 %)" in (found.refusal(0.5, 0.6) or "")
