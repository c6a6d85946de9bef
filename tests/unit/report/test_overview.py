"""The first page: one sentence that says whether the adapter is better, how sure that is, and what to do next."""

from typing import Any

import pytest

from tasks.config import PipelineConfig
from tasks.judge.quality import measure_judgements
from tasks.report.overview import (
    approval_section,
    glance_section,
    inputs_section,
    run_figures,
    verdict,
    win_rate_figures,
)
from tasks.report.page import Example, ReportSection
from tasks.report.run import changed_settings
from tasks.store.measures import Evaluation, Health, Metric
from tasks.store.workspace import AdapterRef, Manifest, Origin, PromptsRef, VerdictsRef

RATE: dict[str, Any] = {
    "win_rate": 0.61,
    "lower": 0.58,
    "upper": 0.64,
    "samples": 2000,
    "prompts": 500,
    "ties": 0.3,
    "confidence": 0.95,
    "adapter_sha256": "a" * 64,
}
NULL = {**RATE, "win_rate": 0.5, "lower": 0.48, "upper": 0.52}


def evaluated(**changes: Any) -> Evaluation:
    return Evaluation.model_validate({**RATE, **changes})


@pytest.mark.parametrize(
    ("change", "bar", "said"),
    [
        ({}, 0.5, "Better"),
        ({"null": NULL}, 0.5, "Better"),
        ({}, 0.6, "Better, but not by enough"),
        ({"lower": 0.47}, 0.5, "Not shown to be better"),
        ({"length_controlled": {**NULL, "lower": 0.46}}, 0.5, "Not shown to be better"),
        ({"win_rate": 0.45, "lower": 0.42, "upper": 0.48}, 0.5, "Worse"),
        ({"null": {**NULL, "win_rate": 0.6, "lower": 0.57, "upper": 0.63}}, 0.5, "Not to be trusted"),
        # Whatever the bar is, fewer than half is not better.
        ({"win_rate": 0.45, "lower": 0.42, "upper": 0.48}, 0.0, "Worse"),
    ],
)
def test_the_verdict_is_a_few_words_and_one_sentence(change: dict[str, Any], bar: float, said: str) -> None:
    headline, sentence = verdict(evaluated(**change), bar)
    assert headline == said
    assert "95 % interval" in sentence
    assert sentence.endswith((".", "%."))


def pages() -> list[ReportSection]:
    examples = tuple(Example(f"{n}", "p", "before", "old", "after", "new", winner=1) for n in range(5))
    return [
        ReportSection("Evaluation", "", advice=("more samples", "b", "c", "d"), examples=examples),
        ReportSection("Training", "", advice=("less",)),
    ]


def test_the_first_page_repeats_the_first_advice_of_each_page_where_nothing_is_proven() -> None:
    found = evaluated(lower=0.47)
    page = glance_section(found, 0.5, "It is not served.", list(win_rate_figures(found, 0.5)), pages())
    assert page.advice == ("Evaluation: more samples", "Evaluation: b", "Evaluation: c", "Training: less")
    assert page.summary.endswith("It is not served.")
    assert not page.is_good


def test_a_proven_win_is_not_headed_by_advice_and_opens_three_comparisons() -> None:
    page = glance_section(evaluated(), 0.5, "", [], pages())
    assert (page.headline, page.is_good, page.advice) == ("Better", True, ())
    assert "Evaluation and Training" in page.notes[0]
    assert [(e.title, e.is_open, e.winner) for e in page.examples] == [("0", True, 1), ("1", True, 1), ("2", True, 1)]
    assert page.pictures[0].png.startswith(b"\x89PNG")


def test_win_rates_are_shown_each_against_its_bar() -> None:
    second = {"judges": ["other"], "rate": RATE, "transfer": 0.2}
    found = evaluated(null=NULL, length_controlled=NULL, second=second, silent=3, detectable=0.553)
    rows = [(m.title, m.ok, m.text()) for m in win_rate_figures(found, 0.5)]
    assert rows == [
        ("Win rate", True, "61.0 % (58.0-64.0 %)"),
        ("Win rate, length taken out", False, "50.0 % (48.0-52.0 %)"),
        ("By other", True, "61.0 % (58.0-64.0 %)"),
        ("Gain that the second judge sees too", False, "20 %"),
        ("SFT against itself", True, "50.0 % (48.0-52.0 %)"),
        ("Lost because the new adapter wrote nothing", False, "3"),
        ("Smallest true win rate that passes", None, "55.3 %"),
    ]


def test_training_figures_are_those_that_tell() -> None:
    names = ("rewards/accuracies", "logps/chosen", "weights/moved")
    readings = tuple(Metric(name=name, title=name, value=1.0, healthy="> 0", ok=True) for name in names)
    health, quality = Health(source="s", readings=readings), measure_judgements([])
    rows = run_figures(evaluated(), 0.5, quality, health, {"first_loss": 0.693147})
    found = {metric.title: metric.text() for metric in rows}
    assert found["Loss before the first update"] == "0.6931"
    assert {"rewards/accuracies", "weights/moved"} <= set(found)
    assert "logps/chosen" not in found


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
    assert changed == {"judging.model": "strong", "training.beta": 0.2}


def test_addresses_and_prices_of_this_run_are_not_shown_as_those_of_the_run_that_made_the_result() -> None:
    judge = {"endpoint": "http://127.0.0.1:9/v1", "prompt_price": 3.0, "max_concurrency": 2, "temperature": 0.5}
    assert changed_settings(PipelineConfig.model_validate({"judging": judge})) == {"judging.temperature": 0.5}


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
