"""Reports: every character of the data is shown, none of it is obeyed."""

import base64
import random
from html.parser import HTMLParser
from typing import Any

import pytest
from markdown_it import MarkdownIt

from tasks.batch.costs import Ledger, StageCost
from tasks.judge.quality import measure_judgements, plot_quality
from tasks.report.page import Example, Picture, ReportSection, Table
from tasks.report.plots import plot_metrics
from tasks.report.render import render_html, render_markdown, render_text_table
from tasks.report.sections import (
    cost_section,
    evaluation_section,
    lineage_section,
    pairs_section,
    quality_section,
    sample_rows,
    training_section,
)
from tasks.store.measures import Evaluation, Health, Metric, QualityReport
from tasks.store.workspace import Artifact, CompletionsRef, Cost, Manifest, Origin, PromptsRef, VerdictsRef

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></div></section><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "&lt;b&gt; & &amp;",
    "<!-- comment --> <style>* { display: none }</style>",
    "![picture](https://example.org/x.png) [link](javascript:alert(1)) <https://example.org>",
    "| a | b |\n| --- | --- |\n| 1 | 2 |",
    "# heading\n\n- list\n1. one\n> quote\n---\n===\n    code\n```\nfence\n``` `tick`",
    "**bold** _soft_ ~~gone~~ \\ a\\| b\\",
]


class Page(HTMLParser):
    """The tags, attributes and visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.depth: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.depth.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.depth.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def section_of(text: str) -> ReportSection:
    """A section with `text` wherever a section takes text."""
    return ReportSection(
        title=text,
        summary=text,
        advice=(text,),
        tables=(Table(text, (text, "n"), ((text, 1), (None, 2))),),
        pictures=(Picture(PNG, text),),
        notes=(text,),
        examples=(Example(text, text, text, text, text, text),),
        blocks=((text, text),),
    )


def make_report(rows: int = 60) -> QualityReport:
    rng = random.Random(0)
    judged = []
    for number in range(rows):
        votes = [
            {
                "judge": "j",
                "order": order,
                "best": order[-1],
                "worst": order[0],
                "confidence": 4,
            }
            for order in ([0, 1, 2], [1, 2, 0])
        ]
        texts = [f"[ANN] {rng.random()} line\n[BOB] {rng.random()}" for _ in range(3)]
        judged.append(
            {
                "id": str(number),
                "completions": texts,
                "votes": votes,
                "status": "pair" if number % 2 else "dropped",
                "reason": None if number % 2 else "best not unanimous",
                "best": 0,
                "worst": 1,
            }
        )
    usage = {"requests": 2 * rows, "prompt_tokens": 180 * rows, "completion_tokens": 18 * rows}
    return measure_judgements(judged, usage)


WIN_RATE: dict[str, Any] = {
    "win_rate": 0.61,
    "lower": 0.58,
    "upper": 0.64,
    "samples": 2000,
    "prompts": 500,
    "effective_samples": 1500.0,
    "ties": 0.3,
    "confidence": 0.95,
    "adapter_sha256": "a" * 64,
}
NULL = {**WIN_RATE, "win_rate": 0.5, "lower": 0.48, "upper": 0.52}


def evaluated(**changes: Any) -> Evaluation:
    return Evaluation.model_validate({**WIN_RATE, **changes})


@pytest.mark.parametrize("text", HOSTILE)
def test_html_shows_hostile_text_and_obeys_none_of_it(text: str) -> None:
    clean = Page(render_html("plain", [section_of("plain")]))
    page = Page(render_html(text, [section_of(text)]))
    assert [(tag, set(attrs)) for tag, attrs in page.tags] == [(tag, set(attrs)) for tag, attrs in clean.tags]
    assert page.depth == []
    assert "".join(page.texts).count(text) == "".join(clean.texts).count("plain") > 10


def test_html_needs_nothing_from_outside() -> None:
    page = Page(render_html("run", [section_of("text"), quality_section(make_report(), plot_quality(make_report()))]))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "form"}
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 2
    assert all(source and source.startswith("data:image/png;base64,") for source in sources)
    assert all(str(attrs["href"]).startswith("#s") for tag, attrs in page.tags if tag == "a")
    policies = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_pictures_arrive_whole() -> None:
    page = Page(render_html("run", [section_of("text")]))
    source = next(attrs["src"] for tag, attrs in page.tags if tag == "img")
    assert source is not None
    assert base64.b64decode(source.partition(",")[2]) == PNG


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_hostile_text_and_obeys_none_of_it(text: str) -> None:
    """Read with raw HTML, tables and strike-through on, as the Prefect UI does."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])

    def kinds(markdown: str) -> list[str]:
        tokens = [child for token in parser.parse(markdown) for child in [token, *(token.children or [])]]
        return [token.type for token in tokens if token.type not in ("text", "text_special", "hardbreak")]

    plain = "\n".join("plain" if line.strip() else "" for line in text.split("\n"))
    found = kinds(render_markdown(section_of(text)))
    assert found == kinds(render_markdown(section_of(plain)))
    assert not {"html_block", "html_inline", "link_open"} & set(found)
    assert found.count("image") == 1


def test_markdown_keeps_the_words() -> None:
    text = HOSTILE[5]
    rendered = MarkdownIt("commonmark").render(render_markdown(section_of(text)))
    assert "![picture](https://example.org/x.png) [link](javascript:alert(1))" in rendered
    assert "<script" not in rendered


def test_markdown_has_pictures_as_data_and_figures_to_the_right() -> None:
    markdown = render_markdown(section_of("words"))
    assert f"![words](data:image/png;base64,{base64.b64encode(PNG).decode()})" in markdown
    assert "| words | n |\n| --- | ---: |\n| words | 1 |\n| – | 2 |" in markdown


def test_control_characters_and_lone_surrogates_do_not_get_out() -> None:
    text = "a\x1b[31mred\x07\u202egnp.\ud800 end\r\nnext"
    section = section_of(text)
    for out in (render_html(text, [section]), render_markdown(section), render_text_table([[text], [text]])):
        out.encode()
        assert not set(out) & set("\x1b\x07\u202e\r")
        assert "end" in out


def test_long_texts_are_cut_and_say_so() -> None:
    page = render_html("run", [section_of("x" * 10_000)])
    assert "… (4,000 characters more)" in page
    assert "x" * 6001 not in page


def test_text_table_lines_up() -> None:
    long = "a very " + "long " * 20
    body: list[list[Any]] = [["judge", 1021, True], ["train", 58, False], [long, None, None]]
    table = render_text_table([["stage", "rows", "state"], *body])
    assert table.splitlines()[0].split() == ["stage", "rows", "state"]
    assert table.splitlines()[2].split() == ["judge", "1,021", "✓", "ok"]
    assert table.splitlines()[2].index("1,021") + 3 == table.splitlines()[3].index("58")
    assert max(map(len, table.splitlines())) <= 60 + 3 + 5 + 3 + 14
    assert render_text_table([]) == ""


def test_tables_with_ragged_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="2 cells in a row under 1 columns"):
        Table("t", ("a",), ((1, 2),))


def test_quality_section_says_what_is_wrong_and_what_to_do() -> None:
    report = make_report()
    section = quality_section(report, PNG)
    assert section.summary.startswith("30 pairs of 60 rows;")
    assert any(text.startswith("The judge prefers late positions") for text in section.advice)
    measured = {row[0]: row for row in section.tables[0].rows}
    assert measured["Prompts that gave a pair"][1:] == (True, "50.0 %", "at least 30 %")
    assert measured["Best changes with the order"][2] == "100.0 %"
    captions = [table.caption for table in section.tables]
    assert captions[1].startswith("Best completion by position (chi-squared 240, p < 0.001)")
    assert {"Lines by speaker", "Judge's confidence (1-5)", "Tokens of the judge"} <= set(captions)
    assert section.tables[-1].rows == (("best not unanimous", 30),)


def test_quality_section_reads_back_from_json() -> None:
    report = make_report()
    again = QualityReport.model_validate_json(report.model_dump_json())
    assert render_markdown(quality_section(again)) == render_markdown(quality_section(report))


def test_pairs_are_shown_side_by_side() -> None:
    pairs = [
        {
            "prompt": [{"role": "system", "content": "write"}, {"role": "user", "content": f"scene {k}"}],
            "chosen": [{"role": "assistant", "content": f"good {k}"}],
            "rejected": [{"role": "assistant", "content": f"bad {k}"}],
            "confidence": 4.5 if k else None,
        }
        for k in range(25)
    ]
    section = pairs_section(pairs)
    assert len(section.examples) == 20
    assert section.examples[0].title == "1. scene 0"
    second = section.examples[1]
    assert (second.title, second.left, second.right) == ("2. confidence 4.5: scene 1", "good 1", "bad 1")
    assert second.prompt == "(system)\nwrite\n\n(user)\nscene 1"


def test_training_section_shows_readings_and_their_advice() -> None:
    accuracy = {"value": 0.612, "healthy": "> 0.55", "ok": True, "meaning": "learning"}
    chosen = {"value": -0.2, "healthy": ">= -0.1", "ok": False, "meaning": "unlearns"}
    readings = (
        Metric(name="rewards/accuracies", title="rewards/accuracies", **accuracy),
        Metric(name="rewards/chosen", title="rewards/chosen", **chosen),
    )
    health = Health(source="step 58", readings=readings, warnings=("first",), advice=("then",))
    metrics = [{"step": 1, "loss": 0.7}, {"step": 2, "eval_loss": 0.6}, {"step": 3, "loss": 0.5}]
    section = training_section(health, metrics, PNG)
    assert section.summary == "Needs attention: readings from step 58."
    assert section.advice == ("first", "then")
    assert section.tables[0].rows[1] == ("rewards/chosen", False, "-0.2", ">= -0.1", "unlearns")
    assert section.tables[1].rows == (
        ("Training loss", 0.7, 0.5, 0.5, 0.7),
        ("Held-out loss", 0.6, 0.6, 0.6, 0.6),
    )


def test_training_without_rows_still_gives_a_section_and_a_picture() -> None:
    assert training_section(Health(source="step 0"), []).tables == ()
    assert plot_metrics([]).startswith(b"\x89PNG")
    rows = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}]
    assert plot_metrics(rows) != plot_metrics(rows[:1])


def test_evaluation_that_passes_and_one_that_does_not() -> None:
    passed = evaluation_section(evaluated(null=NULL))
    assert "61.0 % (58.0-64.0 %)" in passed.summary
    assert "58.0 %, over the bar of 50 %" in passed.summary
    assert [text.partition(":")[0] for text in passed.advice] == ["No other judge was asked"]
    assert [row[1] for row in passed.tables[0].rows] == [True, True]

    by_length = evaluation_section(evaluated(length_controlled={**NULL, "lower": 0.46}))
    assert "46.0 %, not over the bar" in by_length.summary
    assert [row[1] for row in by_length.tables[0].rows] == [True, False]
    assert by_length.advice[0].startswith("With length taken out the win rate is 50.0 % (46.0-")
    small = evaluation_section(evaluated(lower=0.47, samples=120, detectable=0.7))
    assert "47.0 %, not over the bar" in small.summary
    assert "evaluation.num_samples" in small.advice[0]
    worse = evaluation_section(evaluated(win_rate=0.45, lower=0.42, upper=0.48))
    assert "not promoted" in worse.advice[0]
    strict = evaluation_section(evaluated(), bar=0.6)
    assert strict.tables[0].rows[0][1] is False


def test_a_null_that_is_off_takes_the_trust_away() -> None:
    section = evaluation_section(evaluated(null={**NULL, "win_rate": 0.6, "lower": 0.57, "upper": 0.63}))
    assert "do not trust this win rate" in section.advice[0]


def test_comparisons_are_before_and_after() -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "scene"}], "completions": ["old", "new"], "outcome": outcome}
        for outcome in (1.0, 0.0, 0.5)
    ]
    examples = evaluation_section(evaluated(), rows).examples
    assert [example.title.split(". ")[1] for example in examples] == [
        "the new adapter won: scene",
        "the SFT adapter won: scene",
        "undecided: scene",
    ]
    assert [example.winner for example in examples] == [1, 0, None]
    assert {(e.left_label, e.left, e.right_label, e.right) for e in examples} == {
        ("before (SFT)", "old", "after (DPO)", "new")
    }


def test_cost_section_sums_up_and_shows_what_the_cache_saved() -> None:
    ledger = Ledger().plus(StageCost(stage="judge", used=Cost(requests=10, usd=0.5), cached=Cost(usd=1.25)))
    section = cost_section(ledger)
    assert section.summary == (
        "Making everything in this run cost 0.50 US$, whichever run made it. Results kept from earlier runs saved "
        "another 1.25 US$."
    )
    assert [row[0] for row in section.tables[0].rows] == ["judge", "total", "saved by the cache"]


def test_a_cost_without_prices_is_not_known_rather_than_nothing() -> None:
    ledger = Ledger().plus(StageCost(stage="judge", used=Cost(requests=10)))
    assert "not known" in cost_section(ledger, is_priced=False).summary
    assert "cost 0.00 US$" in cost_section(ledger, is_priced=True).summary


def made(stage: str, artifact: Artifact, *upstream: Origin, **facts: Any) -> Manifest:
    return Manifest(artifact=artifact, stage=stage, version=1, key="k", upstream=upstream, files={}, **facts)


def test_lineage_shows_what_came_from_what_and_mixed_versions() -> None:
    facts = {"size": 1, "rows": 10}
    prompts = PromptsRef(uri="/w/prompts.jsonl", sha256="a" * 64, **facts)
    completions = CompletionsRef(uri="/w/completions.jsonl", sha256="b" * 64, **facts)
    verdicts = VerdictsRef(uri="/w/verdicts.jsonl", sha256="c" * 64, **facts)
    manifests = [
        made("prompts", prompts, Origin(kind="file", uri="p.jsonl", sha256="d" * 64), packages={}),
        made("generation", completions, prompts, packages={"openai": "3.54.0"}, config={"seed": 42}),
        made("judging", verdicts, completions, packages={"openai": "3.55.0"}),
    ]
    section = lineage_section(manifests)
    assert section.tables[0].rows[1] == (
        "generation",
        10,
        "b" * 8,
        f"prompts {'a' * 8}",
        "/w/completions.jsonl",
    )
    assert section.tables[1].rows == (("openai", "3.54.0", "generation"), ("openai", "3.55.0", "judging"))
    assert "different versions of openai" in section.advice[0]
    assert section.blocks == (("Settings of generation, bbbbbbbbbbbb", '{\n  "seed": 42\n}'),)


def test_sample_is_even_repeatable_and_in_order() -> None:
    rows = [{"n": n} for n in range(1000)]
    sample = sample_rows(iter(rows), 20)
    numbers = [row["n"] for row in sample]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 20
    assert sample == sample_rows(iter(rows), 20)
    assert sample_rows(iter(rows[:3]), 20) == rows[:3]
    means = [sum(row["n"] for row in sample_rows(iter(rows), 20, seed)) / 20 for seed in range(200)]
    assert sum(means) / len(means) == pytest.approx(499.5, abs=25)
