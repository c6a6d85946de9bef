"""The sections of a run's report: what was found, how sure that is, and what to do next."""

from typing import Any

import pytest

from tasks.batch.costs import StageCost
from tasks.config import PipelineConfig
from tasks.judge.quality.metrics import measure_judgements
from tasks.report import sections
from tasks.report.overview import glance_section, inputs_section, run_figures, verdict, win_rate_figures
from tasks.report.page import Example, ReportSection, Side
from tasks.report.render import render_markdown
from tasks.report.run import changed_settings
from tasks.report.sections import evaluation_section, quality_section, sample_lengths, sample_rows, training_section
from tasks.store.measures import Evaluation, Health, Metric, QualityReport
from tasks.store.workspace import AdapterRef, Artifact, CompletionsRef, Cost, Manifest, Origin, PromptsRef, VerdictsRef

RATE: dict[str, Any] = {
    "win_rate": 0.61, "lower": 0.58, "upper": 0.64, "samples": 2000, "prompts": 500, "ties": 0.3, "confidence": 0.95,
    "adapter_sha256": "a" * 64,
}  # fmt: skip
EVEN = {**RATE, "win_rate": 0.5, "lower": 0.48, "upper": 0.52}
NULL = {**EVEN, "confidence": 0.99}
OFF = {**NULL, "win_rate": 0.6, "lower": 0.57, "upper": 0.63}
LOST = {"win_rate": 0.45, "lower": 0.42, "upper": 0.48}
FACTS: dict[str, Any] = {"size": 1, "rows": 10}


def evaluated(**changes: Any) -> Evaluation:
    return Evaluation.model_validate({**RATE, **changes})


def labelled(lower: float) -> dict[str, Any]:
    """Return what a person said of the judge: the lower bound of the agreement."""
    share = {"value": 0.7, "lower": lower, "upper": 0.8}
    return {"labels": 50, "share": share, "kappa": {"value": 0.4, "lower": 0.2, "upper": 0.6}, "corrected": EVEN}


@pytest.mark.parametrize(
    ("change", "bar", "said"),
    [
        ({}, 0.5, "Better"),
        ({"null": NULL}, 0.5, "Better"),
        ({}, 0.6, "Better, but not by enough"),
        ({"lower": 0.47}, 0.5, "Not shown to be better"),
        ({"length_controlled": {**EVEN, "lower": 0.46}}, 0.5, "Not shown to be better"),
        (LOST, 0.5, "Worse"),
        ({"null": OFF}, 0.5, "Not to be trusted"),
        ({"samples": 40, "sft_silent": 9}, 0.5, "Not to be trusted"),
        ({"agreement": labelled(0.62)}, 0.5, "Better"),
        ({"agreement": labelled(0.48)}, 0.5, "Better for the judge alone"),
        ({"agreement": labelled(0.48)}, 0.6, "Better, but not by enough"),
        # Whatever the bar is, fewer than half is not better.
        (LOST, 0.0, "Worse"),
    ],
)
def test_the_verdict_is_a_few_words_and_one_sentence(change: dict[str, Any], bar: float, said: str) -> None:
    headline, sentence = verdict(evaluated(**change), bar)
    assert headline == said
    assert "95 % interval" in sentence
    assert sentence.endswith((".", "%."))
    assert sentence[0].isupper()


def test_what_a_person_says_stands_on_the_first_page() -> None:
    found = evaluated(agreement=labelled(0.48))
    rows = {metric.title: (metric.ok, metric.text()) for metric in win_rate_figures(found, 0.5)}
    assert rows["Judge and person agree"] == (False, "70.0 % (48.0-80.0 %)")
    assert rows["The same beyond chance, kappa"] == (True, "0.40 (0.20 to 0.60)")
    assert rows["Corrected by 50 labels of a person"][0] is False
    assert any("a coin would in 50 %" in text for text in evaluation_section(found).advice)
    assert not glance_section(found, 0.5, "", [], []).is_good


def test_the_first_page_has_advice_only_where_nothing_is_proven() -> None:
    sides = Side("before", "old"), Side("after", "new", won=True)
    pages = [
        ReportSection("Evaluation", "", ("more samples", "b", "c", "d"),
                      examples=tuple(Example(f"{n}", "p", sides) for n in range(5))),
        ReportSection("Training", "", ("less",)),
    ]  # fmt: skip
    found = evaluated(lower=0.47)
    page = glance_section(found, 0.5, "It is not served.", list(win_rate_figures(found, 0.5)), pages)
    assert page.advice == ("Evaluation: more samples", "Evaluation: b", "Evaluation: c", "Training: less")
    assert page.summary.endswith("It is not served.")
    assert (page.is_good, page.notes) == (False, ())

    page = glance_section(evaluated(), 0.5, "", [], pages)
    assert (page.headline, page.is_good, page.advice) == ("Better", True, ())
    assert "Evaluation and Training" in page.notes[0]
    assert [(example.title, example.is_open) for example in page.examples] == [("0", True), ("1", True), ("2", True)]
    assert page.pictures[0].caption.endswith("intervals.")
    page = glance_section(evaluated(**LOST, null=NULL), 0.0, "It is served.", [], pages)
    assert (page.headline, page.is_good, len(page.advice)) == ("Worse", False, 4), "whatever the bar lets pass"
    assert page.pictures[0].caption.endswith("the band is SFT against itself.")


def test_win_rates_are_shown_each_against_its_bar() -> None:
    second = {"judges": ["other"], "rate": RATE, "transfer": 0.2}
    found = evaluated(
        null=NULL, length_controlled=EVEN, second=second, silent=3, sft_silent=9, samples=40, detectable=0.553
    )
    rows = [(m.title, m.ok, m.text()) for m in win_rate_figures(found, 0.5)]
    assert rows == [
        ("New adapter against SFT", True, "61.0 % (58.0-64.0 %)"),
        ("The same, length taken out", False, "50.0 % (48.0-52.0 %)"),
        ("The same, by other", True, "61.0 % (58.0-64.0 %)"),
        ("SFT against itself", True, "50.0 % (48.0-52.0 %)"),
        ("Gain that the second judge sees too", False, "20 %"),
        ("Lost because the new adapter wrote nothing", False, "3"),
        ("The SFT adapter wrote nothing", False, "9"),
        ("Smallest true win rate told from 50 %", None, "55.3 %"),
    ]
    assert list(win_rate_figures(evaluated(detectable=1.0), 0.5))[-1].text() == "none: too few comparisons"


def test_training_figures_are_those_that_tell() -> None:
    names = ("rewards/accuracies", "logps/chosen", "weights/moved")
    readings = tuple(Metric(name=name, title=name, value=1.0, healthy="> 0", ok=True) for name in names)
    health, quality = Health(source="s", readings=readings), measure_judgements([])
    trained = {"first_loss": 0.693147, "exact_share": 0.5}
    found = {metric.title: metric for metric in run_figures(evaluated(), 0.5, quality, health, trained)}
    assert found["Loss before the first update"].text() == "0.6931"
    assert found["Sides trained on exactly the sampled tokens"].ok is False
    assert {"rewards/accuracies", "weights/moved"} <= set(found)
    assert "logps/chosen" not in found


def made(stage: str, artifact: Artifact, *upstream: Origin, **facts: Any) -> Manifest:
    return Manifest(artifact=artifact, stage=stage, version=1, key="k", upstream=upstream, files={}, **facts)


def test_what_went_in_names_files_counts_and_digests() -> None:
    verdicts = VerdictsRef(uri="v", sha256="a" * 64, **FACTS)
    models = (Origin(kind="base_model", uri="llama", sha256="c" * 64),
              Origin(kind="sft_adapter", uri="sft", sha256="b" * 64))  # fmt: skip
    counts = {"read": 12, "duplicates": 2, "in_training": 0}
    judging = {"model": "j1", "rubric": "seinfeld"}
    panel = {**judging, "panel": [{"model": "j2"}], "a field that is no more": 1}
    file = Origin(kind="file", uri="/data/scenes.jsonl", sha256="c" * 64)
    manifests = [
        made("prompts", PromptsRef(uri="p", sha256="a" * 64, **FACTS), file, counts=counts),
        made("judging", verdicts, config=panel),
        made("judging", verdicts, config=judging),
        made("training", AdapterRef(uri="a", sha256="a" * 64, **FACTS), *models),
    ]
    page = inputs_section(manifests, {"training.beta": 0.2, "judging.seed": None})
    assert page.tables[0].rows == (("pairs", "scenes.jsonl", 12, 2, 0, 10, "a" * 12),)
    pairs_given = inputs_section([manifests[-1], manifests[0]], {})
    assert pairs_given.tables[0].rows[0][0] == "comparison"
    assert page.tables[1].rows == (
        ("judge", "j1", None), ("judge", "j2", None), ("rubric", "seinfeld", None), ("base model", "llama", "c" * 12),
        ("SFT adapter", "sft", "b" * 12),
    )  # fmt: skip
    assert page.tables[2].rows == (("training.beta", "0.2"), ("judging.seed", "empty"))


def test_changed_settings_leave_out_what_was_only_written_out_and_what_is_of_this_run_alone() -> None:
    judge = {"endpoint": "http://127.0.0.1:9/v1", "prompt_price": 3.0, "max_concurrency": 2, "temperature": 0.5}
    config = PipelineConfig.model_validate({"training": {"beta": 0.2}, "judging": judge}).filled()
    changed = dict(changed_settings(config, PipelineConfig()))
    assert changed == {"judging.temperature": 0.5, "training.beta": 0.2}


def test_quality_section_says_what_is_wrong_and_what_to_do() -> None:
    judged = []
    for number in range(60):
        votes = [
            {"judge": "j", "order": order, "best": order[-1], "worst": order[0], "confidence": 4}
            for order in ([0, 1, 2], [1, 2, 0])
        ]
        decision = {"status": "pair"} if number % 2 else {"status": "dropped", "reason": "best not unanimous"}
        texts = [f"[ANN] {number} line\n[BOB] {n}" for n in range(3)]
        judged.append({"id": f"{number}", "completions": texts, "votes": votes, "best": 0, "worst": 1, **decision})
    report = measure_judgements(judged, {"requests": 120, "prompt_tokens": 10_800, "completion_tokens": 1_080})
    section = quality_section(report)
    assert section.summary.startswith("30 pairs of 60 rows;")
    assert any(text.startswith("The judge prefers late positions") for text in section.advice)
    measured = {row[0]: row for row in section.tables[0].rows}
    assert measured["Prompts that gave a pair"][1:] == (True, "50.0 %", "at least 30 %")
    assert measured["Best changes with the order"][2] == "100.0 %"
    tables = {table.caption: table.rows for table in section.tables}
    positions = tables["Best completion by position (chi-squared 240, p < 0.001)"]
    assert positions[2] == (3, 120, "100.0 %", "96.9-100.0 %", "33.3 %", 3.0)
    assert {"Lines by speaker", "Judge's confidence (1-5)", "Tokens of the judge"} <= set(tables)
    assert tables["Why rows gave no pair"] == (("best not unanimous", 30),)
    again = QualityReport.model_validate_json(report.model_dump_json())
    assert render_markdown(quality_section(again)) == render_markdown(section)


def test_pairs_are_shown_side_by_side() -> None:
    said = {"chosen": [{"content": "good"}], "rejected": [{"content": "bad"}]}
    pairs = [
        {"prompt": [{"role": "system", "content": "write"}, {"role": "user", "content": f"scene {k}"}], **said,
         "confidence": 4.5 if k else None}
        for k in range(25)
    ]  # fmt: skip
    section = sections.pairs_section(pairs)
    assert len(section.examples) == 20
    assert section.examples[0].title == "1. scene 0"
    sides = Side("chosen", "good"), Side("rejected", "bad")
    prompt = "(system)\nwrite\n\n(user)\nscene 1"
    assert section.examples[1] == Example("2. confidence 4.5: scene 1", prompt, sides)


def test_training_section_shows_readings_their_advice_and_the_course() -> None:
    chosen = {"value": -0.2, "healthy": ">= -0.1", "ok": False, "meaning": "unlearns"}
    reading = Metric(name="rewards/chosen", title="rewards/chosen", **chosen)
    health = Health(source="step 58", readings=(reading,), warnings=("first",), advice=("then",))
    metrics = [{"step": 1, "loss": 0.7}, {"step": 2, "eval_loss": 0.6}, {"step": 3, "loss": 0.5}]
    counts = {"train_pairs": 9, "train_used": 8, "train_refused": 1, "train_cut_sides": 2, "train_longest": 99}
    section = training_section(health, metrics, {**counts, "train_exact": 12})
    assert section.summary == "Needs attention: readings from step 58."
    assert section.advice == ("first", "then")
    assert [table.rows for table in section.tables] == [
        (("rewards/chosen", False, "-0.2", ">= -0.1", "unlearns"),),
        (("Training loss", 0.7, 0.5, 0.5, 0.7), ("Held-out loss", 0.6, 0.6, 0.6, 0.6)),
        (("to train", 9, 8, 1, 2, 99, "75.0 %", 0),),
    ]
    assert [picture.caption for picture in section.pictures] == ["Loss, by optimizer step."]
    empty = training_section(Health(source="step 0"), [])
    assert [table.rows for table in empty.tables] == [(), (), ()]
    assert empty.pictures == ()


def test_evaluation_that_passes() -> None:
    passed = evaluation_section(evaluated(null=NULL))
    assert "61.0 % (58.0-64.0 %)" in passed.summary
    assert "58.0 %, over the bar of 50 %" in passed.summary
    assert [text.partition(":")[0] for text in passed.advice] == ["There is no verdict of another judge"]
    assert [row[1:5] for row in passed.tables[0].rows] == [
        (True, "61.0 %", "58.0-64.0 %", "95 %"),
        (True, "50.0 %", "48.0-52.0 %", "99 %"),
    ]


@pytest.mark.parametrize(
    ("change", "bar", "states", "summary", "advice"),
    [
        ({"length_controlled": {**EVEN, "lower": 0.46}}, 0.5, [True, False], "46.0 %, not over the bar",
         "With length taken out the win rate is 50.0 % (46.0-"),
        ({"lower": 0.47, "detectable": 0.7}, 0.5, [False], "47.0 %, not over the bar", "This evaluation finds a true"),
        ({"lower": 0.47, "detectable": 1.0}, 0.5, [False], "47.0 %", "This evaluation finds no true win rate"),
        (LOST, 0.5, [False], "42.0 %, not over", "The win rate is not proven to be over 50 %"),
        ({}, 0.6, [False], "bar of 60 %", "The win rate is not proven to be over 60 %"),  # better than SFT it is
        ({"null": OFF}, 0.5, [True, False], "58.0 %, over", "Two draws of the SFT adapter come out at 60.0 %"),
    ],
)  # fmt: skip
def test_evaluation_that_does_not_pass_says_what_to_do(
    change: dict[str, Any], bar: float, states: list[bool], summary: str, advice: str
) -> None:
    section = evaluation_section(evaluated(**change), bar=bar)
    assert summary in section.summary
    assert [row[1] for row in section.tables[0].rows] == states
    assert section.advice[0].startswith(advice)


def test_comparisons_are_before_and_after() -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "scene"}], "completions": ["old", "new one"], "outcome": outcome}
        for outcome in (1.0, 0.0, 0.5, None)
    ]
    section = evaluation_section(evaluated(), rows, lengths=sample_lengths([*rows, {"completions": ["", "a b"]}]))
    assert [(example.title.split(". ")[1], *(side.won for side in example.sides)) for example in section.examples] == [
        ("the new adapter won: scene", False, True),
        ("the SFT adapter won: scene", True, False),
        ("undecided: scene", False, False),
        ("undecided: scene", False, False),
    ]
    before, after = section.examples[0].sides
    assert (before.label, before.text, after.label, after.text) == ("before (SFT)", "old", "after (DPO)", "new one")
    assert section.tables[1].rows == (("before (SFT)", 0.8, 1), ("after (DPO)", 2.0, 0))
    assert sample_lengths([]).rows == ()


def test_no_money_is_claimed_without_prices() -> None:
    costs = [StageCost(stage=name, used=Cost(requests=10, usd=0.5)) for name in ("judge", "total")]
    free = [StageCost(stage="total", used=Cost(requests=10))]
    for given, is_priced, said in ((costs, True, "cost 0.50"), (free, False, "not known"), (free, True, "cost 0.00")):
        section = sections.cost_section(given, is_priced)
        assert said in section.summary
        assert [row[0] for row in section.tables[0].rows] == [cost.stage for cost in given]


def test_lineage_shows_what_came_from_what_and_mixed_versions() -> None:
    prompts = PromptsRef(uri="/w/prompts.jsonl", sha256="a" * 64, **FACTS)
    completions = CompletionsRef(uri=f"/w/{'e' * 64}/completions.jsonl", sha256="b" * 64, **FACTS)
    verdicts = VerdictsRef(uri="/w/verdicts.jsonl", sha256="c" * 64, **FACTS)
    manifests = [
        made("prompts", prompts, Origin(kind="file", uri="p.jsonl", sha256="d" * 64), packages={}),
        made("generation", completions, prompts, packages={"openai": "3.54.0"}, config={"seed": 42}),
        made("judging", verdicts, completions, packages={"openai": "3.55.0"}),
    ]
    section = sections.lineage_section(manifests, "/w")
    assert section.tables[0].rows[1] == (
        "generation", 10, "b" * 8, f"prompts {'a' * 8}", "eeeeeeee…/completions.jsonl",
    )  # fmt: skip
    assert section.tables[1].rows == (("openai", "3.54.0", "generation"), ("openai", "3.55.0", "judging"))
    assert "different versions of openai" in section.advice[0]
    assert section.blocks == (("Settings of generation, bbbbbbbbbbbb", '{\n  "seed": 42\n}'),)


def test_sample_is_even_repeatable_and_in_order() -> None:
    rows = [{"n": n} for n in range(1000)]
    sample = sample_rows(iter(rows), 20)
    assert len(sample) == 20
    assert sample == sorted(sample, key=lambda row: row["n"]) == sample_rows(iter(rows), 20)
    assert sample_rows(iter(rows[:3]), 20) == rows[:3]
    means = [sum(row["n"] for row in sample_rows(iter(rows), 20, seed)) / 20 for seed in range(200)]
    assert sum(means) / len(means) == pytest.approx(499.5, abs=25)
