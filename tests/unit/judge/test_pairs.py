"""From votes to pairs, and a split that nothing shifts."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest

from tasks.config import EvaluationConfig, JudgingConfig, PairPolicy
from tasks.errors import PreflowError
from tasks.judge.asking import plan_judging
from tasks.judge.elsewhere import import_preferences
from tasks.judge.pairs import Decision, check_groups, check_yield, decide, is_validation, make_preferences
from tasks.judge.quality.audit import measure_pairs
from tasks.store.measures import QualityReport
from tasks.store.records import Vote
from tasks.store.workspace import CompletionsRef, Cost, Manifest, PreferencesRef, VerdictsRef, Workspace, digest

Row = dict[str, Any]


ORDERS = [[0, 1, 2], [1, 2, 0], [2, 0, 1]]


def vote(best: int, worst: int, confidence: int | None = 4, order: int = 0) -> Row:
    return {"judge": "j", "order": ORDERS[order], "best": best, "worst": worst, "confidence": confidence}


def read_votes(votes: list[Row]) -> list[Vote]:
    return [Vote.model_validate(given) for given in votes]


ERROR: Row = {"judge": "j", "order": ORDERS[0], "error": "cut at 1024 tokens", "raw": "..."}
U, M, B = "unanimous", "majority", "borda"

CASES: list[tuple[str, list[Row], dict[PairPolicy, Any]]] = [
    ("all agree", [vote(0, 2), vote(0, 2)], {U: (0, 2), M: (0, 2), B: (0, 2)}),
    ("one vote", [vote(1, 0)], {U: (1, 0), M: (1, 0), B: (1, 0)}),
    ("worst differs", [vote(0, 2), vote(0, 1)], {U: "worst", M: "worst", B: "worst"}),
    ("best differs", [vote(0, 2), vote(1, 2)], {U: "best", M: "best", B: "best"}),
    ("turned round", [vote(0, 2), vote(2, 0)], {U: "best", M: "best", B: "best"}),
    ("two of three", [vote(0, 2), vote(0, 2), vote(1, 2)], {U: "best", M: (0, 2), B: (0, 2)}),
    ("three ways", [vote(0, 1), vote(1, 2), vote(2, 0)], {U: "best", M: "best", B: "best"}),
    ("sums decide", [vote(0, 1), vote(0, 2), vote(2, 1)], {U: "best", M: (0, 1), B: (0, 1)}),
    # 0 is named best twice and worst twice, 1 worst once: the majority sees none, the sums see 2 before 1.
    ("sums see more", [vote(0, 1), vote(2, 0), vote(2, 0), vote(0, 2)], {U: "best", M: "best", B: (2, 1)}),
    ("one unreadable of two", [vote(0, 2), ERROR], {U: "failed", M: "failed", B: "failed"}),
    ("one unreadable of three", [vote(0, 2), vote(0, 2), ERROR], {U: "failed", M: (0, 2), B: (0, 2)}),
    ("none readable", [ERROR, ERROR], {U: "failed", M: "failed", B: "failed"}),
    ("nothing to judge", [], {U: "skipped", M: "skipped", B: "skipped"}),
]


@pytest.mark.parametrize("policy", get_args(PairPolicy))
@pytest.mark.parametrize(("name", "votes", "expected"), CASES, ids=[case[0] for case in CASES])
def test_policies_decide_as_they_say(
    name: str, votes: list[Row], expected: dict[PairPolicy, Any], policy: PairPolicy
) -> None:
    decision, wanted = decide(read_votes(votes), JudgingConfig(pair_policy=policy)), expected[policy]
    if isinstance(wanted, tuple):
        assert (decision.status, decision.best, decision.worst, decision.reason) == ("pair", *wanted, None)
    elif wanted in ("best", "worst"):
        assert (decision.status, decision.reason) == ("dropped", f"{wanted} not {policy}")
    else:
        assert decision.status == wanted
        assert decision.reason


@pytest.mark.parametrize("policy", get_args(PairPolicy))
def test_no_policy_makes_a_pair_of_one_completion(policy: PairPolicy) -> None:
    for a, b, c in itertools.product(range(3), repeat=3):
        votes = [vote(a, (a + 1) % 3), vote(b, (b + 2) % 3), vote(c, (c + 1) % 3)]
        decision = decide(read_votes(votes), JudgingConfig(pair_policy=policy))
        assert decision.status != "pair" or decision.best != decision.worst


def test_unsure_pairs_are_dropped_and_say_how_unsure() -> None:
    votes = [vote(0, 2, 2), vote(0, 2, 3)]
    assert decide(read_votes(votes), JudgingConfig(min_confidence=2)).status == "pair"
    decision = decide(read_votes(votes), JudgingConfig(min_confidence=3))
    assert (decision.status, decision.reason, decision.confidence) == ("dropped", "confidence 2.5 < 3", 2.5)
    unknown = decide(read_votes([vote(0, 2, None), vote(0, 2, None)]), JudgingConfig(min_confidence=5))
    assert unknown.status == "pair", "no confidence is no low one"
    assert decide(read_votes([vote(0, 2), vote(0, 2), vote(1, 2)]), JudgingConfig()).agreement == 0.6667


def scored(*rows: list[int], policy: PairPolicy = "unanimous", **settings: Any) -> Decision:
    """Decide on one vote for each list of scores: best and worst are the highest and the lowest, shown in turn."""
    votes = []
    for shift, scores in enumerate(rows):
        order = [*range(shift, len(scores)), *range(shift)]
        best, worst = (scores.index(pick(scores)) for pick in (max, min))
        votes.append({**vote(best, worst), "order": order, "scores": [scores[index] for index in order]})
    return decide(read_votes(votes), JudgingConfig(pair_policy=policy, **settings))


# Mean 6, standard deviation 2.06: the worst, index 4, is further from it than twice that.
MANY = [10, 6, 6, 7, 1, 6, 6, 2, 6, 6, 7, 6, 6, 9, 6, 6]


def test_rejected_is_the_worst_or_what_lies_so_far_below_the_mean() -> None:
    assert (scored(MANY, MANY).best, scored(MANY, MANY).worst) == (0, 4)
    assert scored(MANY, MANY, rejected_sigmas=2).worst == 7
    assert scored(MANY, MANY, rejected_sigmas=0.1).worst == 1, "of equals the first"
    assert scored(MANY, MANY, rejected_sigmas=5).worst == 4
    assert scored(MANY, MANY, rejected_sigmas=2).scores[7] == 2
    mixed = [MANY, [*MANY[:4], 3, *MANY[5:7], 1, *MANY[8:]]]  # the votes differ in the worst, and it is not asked about
    assert scored(*mixed).reason == "worst not unanimous"
    assert (scored(*mixed, rejected_sigmas=2).worst, scored(*mixed, rejected_sigmas=2).scores[4]) == (4, 2)
    assert scored([5, 4, 3], [3, 4, 5], rejected_sigmas=2).reason == "best not unanimous"
    flat = decide(read_votes([{**vote(0, 2), "scores": [5, 5, 5]}]), JudgingConfig(rejected_sigmas=2))
    assert (flat.status, flat.reason, flat.worst) == ("dropped", "none scores lower than the best", None)


def test_the_best_of_bad_ones_makes_no_pair_below_the_floor() -> None:
    assert scored([6, 2, 3], [5, 2, 3], min_chosen_score=5.5).status == "pair"
    low = scored([6, 2, 3], [5, 2, 3], min_chosen_score=6)
    assert (low.status, low.reason, low.is_low) == ("dropped", "score of the best 5.5 < 6", True)
    assert not scored([6, 2, 3], [2, 5, 3], min_chosen_score=6).is_low, "the best is not known"


@pytest.mark.parametrize(
    ("votes", "settings", "status", "best"),
    [
        ([vote(0, 2), vote(0, 1)], {}, "sft_only", 0),
        ([vote(0, 2), vote(0, 2), vote(1, 2)], {}, "sft_only", 0),
        ([vote(0, 2), vote(1, 2)], {}, "dropped", None),
        ([vote(0, 2), vote(0, 2)], {}, "pair", 0),
        ([vote(0, 2, 1), vote(0, 2, 1)], {"min_confidence": 3}, "sft_only", 0),
        ([vote(0, 2), ERROR], {}, "failed", None),
    ],
)
def test_what_is_too_unsure_for_a_pair_goes_to_the_sft_term(
    votes: list[Row], settings: dict[str, Any], status: str, best: int | None
) -> None:
    decision = decide(read_votes(votes), JudgingConfig(unsure_for_sft=True, **settings))
    assert (decision.status, decision.best) == (status, best)
    assert (decision.reason is None) == (status == "pair")
    assert decision.worst == (2 if status == "pair" else None)
    assert decide(read_votes(votes), JudgingConfig(**settings)).status != "sft_only"


def test_a_low_best_is_not_imitated_either() -> None:
    rows = [6, 2, 3], [5, 3, 2]
    assert scored(*rows, unsure_for_sft=True, min_chosen_score=5).status == "sft_only"
    assert scored(*rows, unsure_for_sft=True, min_chosen_score=6).status == "dropped"


def test_rows_for_the_sft_term_have_equal_sides_and_are_never_held_out(tmp_path: Path) -> None:
    rows = make_rows(100)
    for row in rows[::5]:  # the best is sure, the worst is not
        row["votes"] = [vote(0, 1), vote(0, 2, order=1)]
    preferences, off = make(tmp_path, rows, unsure_for_sft=True), make(tmp_path, rows)
    found, without = sides(preferences), sides(off)
    alone = [row for row in found["train"] if row.get("sft_only")]
    assert all(row["chosen"] == row["rejected"] for row in alone)
    assert [row for row in found["train"] if not row.get("sft_only")] == without["train"]
    assert found["val"] == without["val"]
    counts = counts_of(preferences)
    assert counts["sft_only"] == len(alone) == preferences.rows - off.rows
    assert 0 < len(alone) < 20, "what lies on the held-out side is left out"
    quality = QualityReport.model_validate_json(Path(preferences.sibling("quality.json")).read_text())
    assert (quality.pairs, quality.statuses["sft_only"]) == (80, len(alone))
    assert quality.metric("degenerate_pairs").value == 0
    audited = measure_pairs(preferences.uri, preferences.sibling("val.jsonl"))
    assert (audited.pairs, audited.metric("degenerate_pairs").value) == (80, 0)
    imported = import_preferences(preferences.uri, str(tmp_path / "other"), JudgingConfig(seed=1, val_ratio=0.3))
    assert not any(row.get("sft_only") for row in sides_of(imported, "val"))
    assert any(row.get("sft_only") for row in sides_of(imported, "train"))


def test_nothing_but_rows_for_the_sft_term_is_no_pair(tmp_path: Path) -> None:
    rows = [{**row, "votes": [vote(0, 1), vote(0, 2, order=1)]} for row in make_rows(10)]
    preferences = make(tmp_path, rows, unsure_for_sft=True, val_ratio=0)
    assert preferences.rows == 10
    with pytest.raises(PreflowError, match="no pair to train on: of 10 prompts 10 sft_only"):
        check_yield(preferences, str(tmp_path), JudgingConfig(unsure_for_sft=True))


def test_settings_that_are_off_leave_keys_and_rows_as_they_were(tmp_path: Path) -> None:
    names = {"rejected_sigmas", "min_chosen_score", "unsure_for_sft"}
    on = JudgingConfig(rejected_sigmas=2, min_chosen_score=6, unsure_for_sft=True)
    assert not names & (JudgingConfig().identity().keys() | JudgingConfig().pairs_identity().keys())
    assert names <= on.pairs_identity().keys() & on.identity().keys()
    assert not names & on.verdict_identity().keys(), "another floor asks nobody"
    assert not EvaluationConfig(judging=on).comparison_judge().wants_scores, "comparisons need no scores"
    found = make(tmp_path, make_rows(10))
    assert not any("scores" in row or "scores" in row["votes"][0] for row in sides(found)["judged"])
    assert "low_scores" not in counts_of(found)


def test_scores_are_counted_measured_and_travel_with_the_pair(tmp_path: Path) -> None:
    rows = make_rows(10)
    for number, row in enumerate(rows):
        for given in row["votes"]:
            marks = {given["best"]: 4 + number % 5, given["worst"]: 1}
            given["scores"] = [marks.get(index, 3) for index in given["order"]]
    preferences = make(tmp_path, rows, min_chosen_score=6, val_ratio=0)
    found = sides(preferences)
    # Rows 0 and 5 have no best; of the others 1 and 6 score 5.
    assert [row["chosen_score"] for row in found["train"]] == [6, 7, 8] * 2
    assert {row["rejected_score"] for row in found["train"]} == {1}
    assert (counts_of(preferences)["low_scores"], counts_of(preferences)["train"]) == (2, 6)
    quality = QualityReport.model_validate_json(Path(preferences.sibling("quality.json")).read_text())
    assert quality.reasons == {"best not unanimous": 2, "score of the best n < n": 2}
    assert quality.metric("best_score").detail == {"histogram": {"5": 2, "6": 2, "7": 2, "8": 2}}


# ---- split


def test_the_split_has_the_wanted_size_depends_on_the_seed_and_divides_no_group() -> None:
    ids = [digest(number) for number in range(5000)]
    first, other, more = (
        {i for i in ids if is_validation(i, None, seed, share)} for seed, share in ((42, 0.1), (43, 0.1), (42, 0.2))
    )
    assert 420 < len(first) < 580  # 500 expected, standard deviation 21
    assert 20 < len(first & other) < 85  # 50 expected: two seeds are independent
    assert first < more, "a larger share only adds"
    assert not any(is_validation(i, None, 42, 0.0) for i in ids)
    for group, count in (("s01e01", 1), ("s09e24", 1), ("", 2)):  # an empty cell of a table is no group
        assert len({is_validation(i, group, 42, 0.5) for i in ids[:100]}) == count


def test_one_group_for_all_is_refused_before_the_judge_is_paid_and_with_verdicts_that_are_there(tmp_path: Path) -> None:
    store = Workspace(str(tmp_path))

    def check(groups: list[str], **settings: Any) -> None:
        rows = [{"id": f"{number}", "group": group, "completions": ["a", "b"]} for number, group in enumerate(groups)]
        completions = CompletionsRef(**write_rows(store.uri(digest(groups), "rows.jsonl"), rows))
        check_groups(plan_judging(completions, store.root, JudgingConfig(rubric="demo", **settings)))

    with pytest.raises(PreflowError, match="all 3 rows have the same `group`"):
        check(["book"] * 3)
    check(["book"] * 3, val_ratio=0)
    check(["book"])
    check([""] * 3)
    check(["book", "book", "film"])
    rows = [{**row, "group": "book"} for row in make_rows(3)]
    with pytest.raises(PreflowError, match="all 3 rows have the same `group`"):
        make(tmp_path, rows)
    assert not list(tmp_path.rglob("train.jsonl"))
    assert make(tmp_path, rows, val_ratio=0).rows == 2


# ---- the files


def write_rows(uri: str, rows: list[Row]) -> dict[str, Any]:
    with Workspace.holding(uri).writing(uri) as out:
        for row in rows:
            out.write_row(row)
    return {"uri": uri, **out.facts()}


def make_rows(count: int, first: int = 0, groups: int = 0) -> list[Row]:
    rows = []
    for number in range(first, first + count):
        votes = [vote(number % 3, (number + 1) % 3, order=order) for order in range(2)]
        if number % 5 == 0:
            votes[1] = vote((number + 1) % 3, number % 3, order=1)
        row = {
            "id": digest(number), "prompt": [{"role": "user", "content": f"scene {number}"}],
            "completions": [f"[ANN] {number} {word}." for word in ("one", "two", "three")], "votes": votes,
            "finish_reasons": ["stop"] * 3,
        }  # fmt: skip
        rows.append({**row, "group": f"episode {number % groups}"} if groups else row)
    return rows


def sides_of(preferences: PreferencesRef, name: str) -> list[Row]:
    return [json.loads(line) for line in Path(preferences.sibling(f"{name}.jsonl")).read_text().splitlines()]


def sides(preferences: PreferencesRef) -> dict[str, list[Row]]:
    return {name: sides_of(preferences, name) for name in ("train", "val", "judged")}


def counts_of(preferences: PreferencesRef) -> Any:
    return json.loads(Path(str(preferences.manifest)).read_text())["counts"]


def make(folder: Path, rows: list[Row], **settings: Any) -> PreferencesRef:
    store = Workspace(folder)
    place = store.uri("verdicts", digest(rows)[:8])
    verdicts = VerdictsRef(manifest=f"{place}/manifest.json", **write_rows(f"{place}/verdicts.jsonl", rows))
    cost = Cost(requests=2 * len(rows), prompt_tokens=7, completion_tokens=3)
    store.write_manifest(Manifest(artifact=verdicts, stage="judging", version=1, key="k", files={}, cost=cost))
    return make_preferences(verdicts, str(folder), JudgingConfig.model_validate({"val_ratio": 0.2, **settings}))


def test_a_pair_has_trl_s_form_and_carries_what_was_sampled(tmp_path: Path) -> None:
    rows = make_rows(10, groups=10)
    for number, row in enumerate(rows):
        row |= {
            "prompt_token_ids": [1, number],
            "token_ids": [[5], [6, 2], None],
            "finish_reasons": ["length", "stop", "a"],
        }
    found = sides(make(tmp_path, rows, val_ratio=0.0))
    assert found["train"][0] == {  # of row 1: completion 1 won, 2 lost
        "id": digest(1), "prompt": rows[1]["prompt"], "confidence": 4.0, "group": "episode 1",
        "chosen": [{"role": "assistant", "content": "[ANN] 1 two."}], "chosen_token_ids": [6, 2],
        "rejected": [{"role": "assistant", "content": "[ANN] 1 three."}], "prompt_token_ids": [1, 1],
        "chosen_finish_reason": "stop", "rejected_finish_reason": "a",
    }  # fmt: skip
    assert all("token_ids" not in row for row in found["judged"]), "judged.jsonl is for reading"


def test_pairs_with_a_cut_side_are_kept_or_left_out_and_counted(tmp_path: Path) -> None:
    rows = make_rows(50)
    for number, row in enumerate(rows):
        row["finish_reasons"] = [("length", "abort", "content_filter")[number % 3], "tool_calls", "unknown"]
    for leave_out in (False, True):
        preferences = make(tmp_path, rows, leave_out_cut=leave_out)
        found = sides(preferences)
        assert counts_of(preferences)["cut_pairs"] == 26
        ends = [
            {pair["chosen_finish_reason"], pair["rejected_finish_reason"]} for pair in found["train"] + found["val"]
        ]
        cut = [end for end in ends if end & {"length", "abort", "content_filter"}]
        assert len(cut) == (0 if leave_out else 26)
        assert sum(row.get("reason") == "a side did not end by itself" for row in found["judged"]) == 26 * leave_out


def test_every_row_is_listed_and_every_pair_is_the_judge_s(tmp_path: Path) -> None:
    rows = make_rows(100)
    found = sides(make(tmp_path, rows))
    assert [row["id"] for row in found["judged"]] == [row["id"] for row in rows]
    assert Counter(row["status"] for row in found["judged"]) == {"pair": 80, "dropped": 20}
    assert all(row["reason"] == "best not unanimous" for row in found["judged"] if row["status"] == "dropped")
    pairs = {row["id"]: row for row in [*found["train"], *found["val"]]}
    assert len(pairs) == len(found["train"]) + len(found["val"]) == 80
    for row in rows:
        if row["id"] in pairs:
            best, worst = row["votes"][0]["best"], row["votes"][0]["worst"]
            assert pairs[row["id"]]["chosen"][0]["content"] == row["completions"][best]
            assert pairs[row["id"]]["rejected"][0]["content"] == row["completions"][worst]


def test_added_prompts_move_none_from_one_side_to_the_other_and_groups_stay_together(tmp_path: Path) -> None:
    before, after = sides(make(tmp_path, make_rows(100))), sides(make(tmp_path, make_rows(150, -50)[::-1]))
    for side in ("train", "val"):
        ids = {row["id"] for row in before[side]}
        assert ids < {row["id"] for row in after[side]}
    found = sides(make(tmp_path, make_rows(100, groups=20), val_ratio=0.4))
    train, val = ({row["group"] for row in found[side]} for side in ("train", "val"))
    assert train
    assert val
    assert not train & val


FILES = ("train.jsonl", "val.jsonl", "judged.jsonl", "quality.json")


def test_equal_inputs_give_equal_bytes_and_are_made_once_unless_a_file_is_damaged(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a", make_rows(50)), make(tmp_path / "b", make_rows(50))
    for name in FILES:
        assert Path(first.sibling(name)).read_bytes() == Path(second.sibling(name)).read_bytes(), name
    written = Path(first.uri).stat().st_mtime_ns
    assert make(tmp_path / "a", make_rows(50)) == first
    assert Path(first.uri).stat().st_mtime_ns == written
    for name in FILES:
        path = Path(first.sibling(name))
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert make(tmp_path / "a", make_rows(50)) == first
        assert path.read_bytes() == content, name


def test_without_a_pair_the_error_says_what_the_judge_does(tmp_path: Path) -> None:
    rows = make_rows(200)
    for row in rows:
        row["votes"] = [{**vote(order[-1], order[0]), "order": order} for order in ORDERS[:2]]
    preferences = make(tmp_path, rows)
    assert (preferences.rows, preferences.val_rows) == (0, 0)
    with pytest.raises(PreflowError) as caught:
        check_yield(preferences, str(tmp_path), JudgingConfig())
    assert "no pair to train on: of 200 prompts 200 dropped" in str(caught.value)
    assert "The judge prefers late positions" in str(caught.value)
    assert "stronger judging.model" in str(caught.value)
    with pytest.raises(PreflowError, match=r"no pair to train on: all 1 are held out \(judging.val_ratio is 0.9\)"):
        check_yield(preferences.model_copy(update={"val_rows": 1}), str(tmp_path), JudgingConfig(val_ratio=0.9))
    some = make(tmp_path, make_rows(50))
    assert check_yield(some, str(tmp_path), JudgingConfig()) is some
