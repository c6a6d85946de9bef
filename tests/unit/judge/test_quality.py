"""Quality of judgements and pairs: planted biases must be found, and fair judges must pass."""

import json
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import krippendorff
import numpy as np
import pytest

from tasks.errors import PreflowError
from tasks.judge.quality.audit import measure_pairs
from tasks.judge.quality.metrics import measure_judgements, wilson_interval
from tasks.judge.quality.tally import Tally
from tasks.store.measures import QualityReport

WORDS = [a + b for a in ("lan", "ket", "mar", "sil", "tun", "vel") for b in ("tern", "tle", "ble", "ver", "nel", "vet")]
Row = dict[str, Any]


def make_text(rng: random.Random, lines: int = 4) -> str:
    names = rng.choices(["ANN", "BOB", "CYD"], k=lines)
    return "\n".join(f"[{name}] {' '.join(rng.choices(WORDS, k=8))}." for name in names)


def make_vote(order: list[int], best: int, worst: int, **more: Any) -> Row:
    return {"judge": "j", "order": order, "best": best, "worst": worst, "confidence": 4, **more}


def make_judged(number: int, votes: list[Row], completions: list[str], **more: Any) -> Row:
    """Return a row of `judged.jsonl`: a pair if all votes agree."""
    decision: Row = {"status": "dropped", "reason": "best not unanimous", "best": None, "worst": None}
    if len({(vote.get("best"), vote.get("worst")) for vote in votes}) == 1 and "error" not in votes[0]:
        decision = {"status": "pair", "reason": None, "best": votes[0]["best"], "worst": votes[0]["worst"]}
    row = {"id": f"{number}", "completions": completions, "finish_reasons": ["stop"] * len(completions), "votes": votes}
    return {**row, **decision, **more}


def rotations(rng: random.Random, n: int) -> list[list[int]]:
    base = rng.sample(range(n), n)
    return [base, base[n // 2 :] + base[: n // 2]]


def judged_by_position(rows: int, n: int = 3) -> Iterator[Row]:
    """A judge that names the last one best and the first one worst, whatever they say."""
    rng = random.Random(1)
    for number in range(rows):
        votes = [make_vote(order, order[-1], order[0]) for order in rotations(rng, n)]
        yield make_judged(number, votes, [make_text(rng) for _ in range(n)])


def judged_by_content(rows: int, n: int = 3, confidence: tuple[int, ...] = (2, 3, 4, 5)) -> Iterator[Row]:
    """A judge that always finds the same best and worst, wherever they stand."""
    rng = random.Random(2)
    for number in range(rows):
        best, worst = rng.sample(range(n), 2)
        votes = [make_vote(o, best, worst, confidence=rng.choice(confidence)) for o in rotations(rng, n)]
        yield make_judged(number, votes, [make_text(rng, rng.randint(2, 7)) for _ in range(n)])


def write_jsonl(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_jsonl(path: str) -> list[Row]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def make_audit(folder: Path, places: list[tuple[int, int]], val: int = 2) -> tuple[str, str, str]:
    """Write completions and pairs whose chosen and rejected stand at `places`; pairs come in another order."""
    rng = random.Random(3)
    rows, pairs = [], []
    for number, (best, worst) in enumerate(places):
        prompt = [{"role": "system", "content": "write"}, {"role": "user", "content": f"scene {number}"}]
        texts = [make_text(rng) for _ in range(3)]
        rows.append({"prompt": prompt, "completions": texts})
        sides = {"chosen": best, "rejected": worst}
        pairs.append({"prompt": prompt, **{s: [{"role": "assistant", "content": texts[k]}] for s, k in sides.items()}})
    rng.shuffle(pairs)
    parts = {"train": pairs[val:], "val": pairs[:val], "completions": rows}
    train, held_out, completions = (write_jsonl(folder / f"{name}.jsonl", part) for name, part in parts.items())
    return train, held_out, completions


# ---- pairs that something else made


def test_audit_says_that_a_judge_preferred_late_positions(tmp_path: Path) -> None:
    # Best at 201/390/430 and worst at 536/249/236 of 1,021.
    counts = {(0, 1): 100, (0, 2): 101, (1, 0): 255, (1, 2): 135, (2, 0): 281, (2, 1): 149}
    places = [place for place, count in counts.items() for _ in range(count)]
    report = measure_pairs(*make_audit(tmp_path, places, val=102))
    assert (report.pairs, report.statuses) == (1021, {"train": 919, "val": 102})
    best, worst = report.metric("position_best"), report.metric("position_worst")
    assert [row["observed"] for row in best.detail["positions"]] == [201, 390, 430]
    assert [row["observed"] for row in worst.detail["positions"]] == [536, 249, 236]
    assert (best.ok, best.detail["p_value"] < 1e-15) == (False, True)
    said = str(best.advice)
    assert said.startswith("The judge prefers late positions: the best was at position 3 in 42.1 %")
    assert "judging.orders" in said
    assert str(worst.advice).startswith("The judge puts down early positions: the worst was at position 1 in 52.5 %")
    assert "Best completion by position" in report.summary()
    assert (report.metric("unmatched_pairs").value, report.metric("shared_prompts").ok) == (0, True)


def test_audit_of_a_fair_judge_finds_nothing(tmp_path: Path) -> None:
    places = [(a, b) for a in range(3) for b in range(3) if a != b] * 30
    train, val, completions = make_audit(tmp_path, places)
    report = measure_pairs(train, val, completions)
    assert report.problems() == []
    assert report.metric("position_best").detail["tendency"] == "none"
    names = {metric.name for metric in measure_pairs(train).metrics}
    assert not names & {"position_best", "unmatched_pairs"}, "without completions there are no positions"
    assert "longer_chosen" in names


def test_audit_counts_what_it_cannot_place_and_prompts_on_both_sides(tmp_path: Path) -> None:
    train, val, completions = make_audit(tmp_path, [(0, 1), (1, 2), (2, 0)] * 20)
    rows, pairs = read_jsonl(completions), read_jsonl(train)
    pairs[0]["prompt"][1]["content"] = "a scene that nobody sampled"
    pairs[1]["chosen"][0]["content"] = "[ANN] a text that nobody sampled"
    twin = next(row for row in rows if row["prompt"] == pairs[2]["prompt"])
    twin["completions"] = [pairs[2]["chosen"][0]["content"]] * 2 + [pairs[2]["rejected"][0]["content"]]
    pairs[3]["chosen"][0]["content"] += "\n  "
    rows.append({**rows[0], "completions": ["[ANN] x", "[BOB] y", "[CYD] z"]})  # a prompt that was sampled twice
    held_out = [*read_jsonl(val), pairs[4]]
    report = measure_pairs(
        write_jsonl(Path(train), pairs), write_jsonl(Path(val), held_out), write_jsonl(Path(completions), rows)
    )
    assert report.reasons == {
        "prompt not among the completions": 1,
        "text not among the prompt's completions": 1,
        "text at more than one position": 1,
    }
    assert report.metric("unmatched_pairs").value == pytest.approx(3 / 61, rel=1e-5)
    assert report.metric("position_best").detail["verdicts"] == 58
    shared = report.metric("shared_prompts")
    assert (shared.value, shared.ok) == (1, False)


def test_audit_reads_confidence_and_names_the_line_that_is_wrong(tmp_path: Path) -> None:
    train, val, _ = make_audit(tmp_path, [(0, 1)] * 30)
    pairs = read_jsonl(train)
    graded = [{**pair, "confidence": number % 3 + 2.0} for number, pair in enumerate(pairs)]
    report = measure_pairs(write_jsonl(tmp_path / "graded.jsonl", graded), val)
    assert set(report.metric("confidence").detail["histogram"]) == {"2", "3", "4"}
    for bad, message in (
        ({**pairs[2], "confidence": "high"}, r"broken\.jsonl, row 3: confidence"),
        ({**pairs[2], "confidence": 10**400}, r"broken\.jsonl, row 3: confidence"),
        ({**pairs[2], "confidence": float("nan")}, r"broken\.jsonl:3: .*NaN"),
        ({"prompt": [{"role": "user", "content": "x"}]}, r"broken\.jsonl:3: no chosen and rejected"),
    ):
        broken = write_jsonl(tmp_path / "broken.jsonl", [*pairs[:2], bad])
        with pytest.raises(PreflowError, match=message):
            measure_pairs(broken, val)


def test_audit_holds_all_turns_of_sides_that_part_before_the_last(tmp_path: Path) -> None:
    turns = [{"role": role, "content": "the same"} for role in ("assistant", "user", "assistant")]
    sides = [[{**turns[0], "content": text}, *turns[1:]] for text in ("one", "two")]
    pair = {"prompt": "Hello", "chosen": sides[0], "rejected": sides[1]}
    report = measure_pairs(write_jsonl(tmp_path / "pairs.jsonl", [pair, {**pair, "rejected": sides[0]}]))
    assert (report.pairs, report.metric("degenerate_pairs").value) == (2, 1)


# ---- judges


def test_judge_that_follows_the_position_gives_no_pair_and_is_named() -> None:
    report = measure_judgements(judged_by_position(300))
    assert (report.pairs, report.reasons) == (0, {"best not unanimous": 300})
    assert report.metric("pair_yield").ok is False
    assert report.metric("flip_rate").value == 1
    assert report.metric("agreement").value == pytest.approx(-0.5, abs=0.01)
    said = str(report.metric("position_best").advice)
    assert said.startswith("The judge prefers late positions: the best was at position 3 in 100 %")
    rng = random.Random(4)
    orders = [rng.sample(range(3), 3) for _ in range(200)]
    rows = [make_judged(k, [make_vote(o, o[1], o[0])], [make_text(rng) for _ in o]) for k, o in enumerate(orders)]
    said = str(measure_judgements(rows).metric("position_best").advice)
    assert said.startswith("The judge prefers position 2:")


def test_judge_that_follows_the_content_passes() -> None:
    report = measure_judgements(judged_by_content(300))
    assert report.pairs == 300
    assert report.problems() == []
    assert report.metric("flip_rate").value == 0
    assert report.metric("agreement").value == 1


def test_flips_need_two_orders_of_one_judge() -> None:
    rows = [make_judged(k, [make_vote([0, 1], k % 2, 1 - k % 2)], ["a b", "c d"]) for k in range(10)]
    report = measure_judgements(rows)
    for metric in (report.metric("flip_rate"), report.metric("agreement")):
        assert (metric.value, metric.ok) == (None, None)
        assert "judging.orders" in str(metric.advice)
    votes = [make_vote([0, 1], 0, 1), make_vote([0, 1], 1, 0), make_vote([1, 0], 0, 1, judge="k")]
    report = measure_judgements([make_judged(1, votes, ["a b", "c d"])])
    assert report.metric("flip_rate").value is None
    assert report.metric("agreement").detail["prompts"] == 1


@pytest.mark.parametrize("raters", [2, 3, 5])
def test_agreement_is_krippendorffs_alpha_of_the_votes(raters: int) -> None:
    rng = np.random.default_rng(raters)
    truth = rng.integers(0, 4, 200)
    votes = np.where(rng.random((raters, 200)) < 0.6, truth, rng.integers(0, 4, (raters, 200))).astype(float)
    votes[rng.random(votes.shape) < 0.15] = np.nan
    rows = []
    for number, unit in enumerate(votes.T):
        named = {f"{k}": int(best) for k, best in enumerate(unit) if not np.isnan(best)}
        given = [make_vote([0, 1, 2, 3], best, (best + 1) % 4, judge=judge) for judge, best in named.items()]
        rows += [make_judged(number, given, ["a", "b", "c", "d"], status="dropped")] if given else []
    expected = krippendorff.alpha(reliability_data=votes, level_of_measurement="nominal")
    assert measure_judgements(rows).metric("agreement").value == pytest.approx(expected, abs=1e-5)


def test_wilson_interval_is_the_published_one() -> None:
    # Newcombe 1998, table I: 81 of 263.
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_failures_and_cuts_are_counted() -> None:
    good = make_vote([0, 1], 0, 1)
    cut: Row = {"judge": "j", "order": [1, 0], "error": "cut at 1024 tokens", "raw": ""}
    others = [{**cut, "error": error} for error in ("cut at 2048 tokens", "refused: content_filter")]
    rows = [
        make_judged(k, [good, vote], ["a b c", "d e f"], finish_reasons=["length", "stop"])
        for k, vote in enumerate([cut, *others, make_vote([1, 0], 0, 1)])
    ]
    rows[0] |= {"status": "failed"}
    report = measure_judgements(rows)
    parse = report.metric("parse_failures")
    assert (parse.value, parse.detail["refused"]) == (pytest.approx(2 / 8), 1)
    assert parse.detail["errors"] == {"cut at n tokens": 2, "refused: content_filter": 1}
    assert "judging.max_tokens" in str(parse.advice)
    assert report.metric("failed_prompts").value == pytest.approx(1 / 4)
    assert report.metric("cut_by_length").value == pytest.approx(0.5)


def test_tokens_of_a_verdict_are_those_of_the_whole_stage() -> None:
    usage = {"requests": 20, "prompt_tokens": 4000, "completion_tokens": 400, "thinking_tokens": 0}
    for given, tokens in ((None, None), (usage, 220)):
        assert measure_judgements(judged_by_content(10), usage=given).metric("tokens_per_verdict").value == tokens


@pytest.mark.parametrize(("given", "said"), [((5,), "tells nothing"), ((1, 2), "judging.min_confidence")])
def test_confidence_that_is_always_the_same_or_low_is_called_out(given: tuple[int, ...], said: str) -> None:
    metric = measure_judgements(judged_by_content(50, confidence=given)).metric("confidence")
    assert metric.ok is False
    assert said in str(metric.advice)


# ---- texts


def test_longer_is_chosen_is_seen_in_characters() -> None:
    rows = []
    for k in range(200):
        texts = [make_text(random.Random(k), 3), make_text(random.Random(-k - 1), 5)]
        best = int(k % 10 != 0)
        rows.append(make_judged(k, [make_vote([0, 1], best, 1 - best)], texts))
    report = measure_judgements(rows)
    metric = report.metric("longer_chosen")
    assert (metric.value, metric.ok) == (pytest.approx(0.9), False)
    assert "prefers the longer" in str(metric.advice)
    histogram = report.detail["lengths"]
    assert sum(histogram["chosen"]) == sum(histogram["rejected"]) == 200
    assert histogram["medians"]["chosen"] > histogram["medians"]["rejected"]
    assert len(histogram["edges"]) == len(histogram["chosen"]) + 1


def test_distinct_n_is_the_share_of_distinct_ngrams_of_a_prompt() -> None:
    rows = [make_judged(1, [make_vote([0, 1, 2], 0, 1)], ["a b a b", "A b c", "x y z"])]
    detail = measure_judgements(rows).metric("distinct_2").detail
    # Unigrams a b a b a b c: 3 of 7; bigrams ab ba ab | ab bc: 3 of 5; trigrams aba bab | abc: 3 of 3.
    assert [detail[f"distinct_{n}"] for n in (1, 2, 3)] == pytest.approx([3 / 7, 3 / 5, 1], rel=1e-5)
    alike = [make_judged(k, [make_vote([0, 1], 0, 1)], ["[ANN] the same old words"] * 2) for k in range(5)]
    report = measure_judgements(alike)
    assert report.metric("distinct_2").ok is False
    degenerate = report.metric("degenerate_pairs")
    assert (degenerate.value, degenerate.ok) == (5, False)


def test_speakers_that_are_chosen_for_themselves_are_found() -> None:
    def rows(bias: bool) -> Iterator[Row]:
        rng = random.Random(5)
        for k in range(150):
            texts = [make_text(rng), make_text(rng)]
            if bias:
                texts[0] = texts[0].replace("[ANN]", "[CYD]")
            yield make_judged(k, [make_vote([0, 1], 0, 1)], texts)

    assert measure_judgements(rows(False)).metric("speaker_balance").ok is True
    biased = measure_judgements(rows(True)).metric("speaker_balance")
    assert biased.ok is False
    assert {row["speaker"]: row["chosen"] for row in biased.detail["speakers"]}["ANN"] == 0
    plain = measure_judgements([make_judged(1, [make_vote([0, 1], 0, 1)], ["plain words", "more words"])])
    with pytest.raises(KeyError):
        plain.metric("speaker_balance")


# ---- the report


def test_rows_without_votes_and_no_rows_at_all_are_reported() -> None:
    decision = {"status": "skipped", "reason": "one distinct completion", "best": None, "worst": None, "votes": []}
    report = measure_judgements([{**make_judged(1, [make_vote([0, 1], 0, 1)], ["same", "same"]), **decision}])
    assert report.statuses == {"skipped": 1}
    assert "generation.temperature" in str(report.metric("pair_yield").advice)
    empty = measure_judgements([])
    assert (empty.rows, empty.pairs, empty.problems()) == (0, 0, [])


def test_report_is_plain_json_and_the_same_each_time() -> None:
    first, second = (measure_judgements(judged_by_content(60)) for _ in range(2))
    text = json.dumps(first.model_dump(mode="json"), allow_nan=False)
    assert text == json.dumps(second.model_dump(mode="json"), allow_nan=False)
    assert QualityReport.model_validate_json(text) == first


def test_of_a_row_only_a_few_numbers_are_kept() -> None:
    def kept(rows: int) -> int:
        tally = Tally()
        for row in judged_by_content(rows):
            tally.add(row)
        return len(pickle.dumps(tally))

    # Two verdicts of six numbers and a pair of two, 4 bytes each; a row's texts alone are 500 bytes and more.
    assert kept(800) - kept(300) <= 60 * 500


def test_names_from_data_cannot_fill_the_memory() -> None:
    rows = [make_judged(k, [make_vote([0, 1], 0, 1)], [f"[N{k}] a b", f"[M{k}] c d"]) for k in range(500)]
    report = measure_judgements(rows)
    assert len(report.model_dump_json()) < 20_000
    assert report.metric("speaker_balance").value == pytest.approx(0.4, abs=0.01)
