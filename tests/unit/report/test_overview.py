"""The first page: one sentence that says whether the adapter is better, how sure that is, and what to do next."""

from typing import Any

import pytest

from tasks.config import PipelineConfig
from tasks.report.overview import (
    approval_section,
    glance_section,
    inputs_section,
    training_figures,
    verdict,
    win_rate_figures,
)
from tasks.report.page import ReportSection
from tasks.report.run import changed_settings
from tasks.store.workspace import AdapterRef, Manifest, Origin, PromptsRef, VerdictsRef

RATE: dict[str, Any] = {
    "win_rate": 0.61,
    "lower": 0.58,
    "upper": 0.64,
    "samples": 2000,
    "prompts": 500,
    "ties": 0.3,
    "confidence": 0.95,
}
NULL = {**RATE, "win_rate": 0.5, "lower": 0.48, "upper": 0.52}


@pytest.mark.parametrize(
    ("change", "bar", "said"),
    [
        ({}, 0.5, "Better: it wins 61.0 % (58.0-64.0 %)"),
        ({"null": NULL}, 0.5, "Better: "),
        ({}, 0.6, "Better, but not by enough: "),
        ({"lower": 0.47}, 0.5, "Not shown to be better: "),
        ({"win_rate": 0.45, "lower": 0.42, "upper": 0.48}, 0.5, "Worse: "),
        ({"null": {**NULL, "win_rate": 0.6, "lower": 0.57, "upper": 0.63}}, 0.5, "Not to be trusted: "),
        # Whatever the bar is, fewer than half is not better.
        ({"win_rate": 0.45, "lower": 0.42, "upper": 0.48}, 0.0, "Worse: "),
    ],
)
def test_the_verdict_is_one_sentence(change: dict[str, Any], bar: float, said: str) -> None:
    sentence = verdict({**RATE, **change}, bar)
    assert sentence.startswith(said)
    assert "95 % interval" in sentence
    assert sentence.endswith((".", "%."))


def test_the_first_page_repeats_the_first_advice_of_each_page() -> None:
    pages = [
        ReportSection("Evaluation", "", advice=("more samples", "b", "c", "d")),
        ReportSection("Training", "", advice=("less",)),
    ]
    page = glance_section(RATE, 0.5, "It is not served.", win_rate_figures(RATE, 0.5), pages)
    assert page.advice == ("Evaluation: more samples", "Evaluation: b", "Evaluation: c", "Training: less")
    assert page.summary.endswith("It is not served.")
    assert "yourself" in glance_section(RATE, 0.5, "", [], []).advice[0]


def test_too_few_decided_comparisons_are_marked_unless_the_gain_shows_all_the_same() -> None:
    few = {**RATE, "samples": 200}
    assert win_rate_figures(few, 0.5)[1] == ("Decided comparisons", 140, "615 to see 55 %, 152 to see 60 %", True)
    unseen = win_rate_figures({**few, "lower": 0.48}, 0.5)
    assert [row[3] for row in unseen] == [False, False]
    assert win_rate_figures({**RATE, "null": NULL}, 0.5)[2][3] is True


def test_training_figures_are_those_that_tell() -> None:
    readings = [
        {"name": name, "value": 1.0, "healthy": "> 0", "ok": True, "meaning": ""}
        for name in ("rewards/accuracies", "logps/chosen", "weights/moved")
    ]
    rows = training_figures({"readings": readings}, 0.693147)
    assert [row[0] for row in rows] == ["Loss before the first update", "rewards/accuracies", "weights/moved"]
    assert rows[0][1] == "0.6931"


def test_what_went_in_names_files_counts_and_digests() -> None:
    facts = {"sha256": "a" * 64, "size": 1, "rows": 10}
    verdicts, file = VerdictsRef(uri="v", **facts), Origin(kind="file", uri="/data/scenes.jsonl", sha256="c" * 64)
    models = (
        Origin(kind="base_model", uri="llama", sha256="c" * 64),
        Origin(kind="sft_adapter", uri="sft", sha256="b" * 64),
    )
    common = {"version": 1, "key": "k", "files": {}}
    counts = {"read": 12, "duplicates": 2, "in_training": 0}
    judging = {"model": "j1", "rubric": "seinfeld"}
    panel = {**judging, "panel": [{"model": "j2"}], "a field that is no more": 1}
    manifests = [
        Manifest(artifact=PromptsRef(uri="p", **facts), stage="prompts", upstream=(file,), counts=counts, **common),
        Manifest(artifact=verdicts, stage="judging", config=panel, **common),
        Manifest(artifact=verdicts, stage="judging", config=judging, **common),
        Manifest(artifact=AdapterRef(uri="a", **facts), stage="training", upstream=models, **common),
    ]
    page = inputs_section(manifests, {"training.beta": 0.2})
    assert page.tables[0].rows == (("pairs", "scenes.jsonl", 12, 2, 0, 10, "a" * 12),)
    assert page.tables[1].rows == (
        ("judge", "j1", None),
        ("judge", "j2", None),
        ("rubric", "seinfeld", None),
        ("base model", "llama", "c" * 12),
        ("SFT adapter", "sft", "b" * 12),
    )
    assert page.tables[2].rows == (("training.beta", "0.2"),)


def test_changed_settings_leave_out_what_was_only_written_out() -> None:
    config = PipelineConfig.model_validate({"training": {"beta": 0.2}, "judging": {"model": "strong"}}).filled()
    changed = changed_settings(config)
    assert changed == {
        "generation.adapter": "adapters/sft",
        "judging.model": "strong",
        "training.beta": 0.2,
    }


def test_what_is_to_be_approved_has_requests_and_both_costs() -> None:
    estimate = {
        "model": "judge", "requests": 100, "known": 20, "prompt_tokens": 50_000, "completion_tokens": 3_000,
        "most_completion_tokens": 102_400, "usd": 0.02, "most_usd": 0.3,
    }  # fmt: skip
    page = approval_section([estimate], 480)
    assert "asked 100 questions (about 0.02 US$, at most 0.30)" in page.summary
    assert "up to 480 verdicts more" in page.summary
    free = approval_section([{**estimate, "usd": 0.0, "most_usd": 0.0}], 0)
    assert "no price is set" in free.summary
    assert "judging.prompt_price" in free.advice[0]
