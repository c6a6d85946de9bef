"""Pages: every character of the data is shown, none of it is obeyed."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from markdown_it import MarkdownIt

from tasks.report.page import Example, Picture, ReportSection, Side, Table
from tasks.report.render import render_html, render_markdown, render_text_table

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
        tables=(Table(text, (text, "n"), ((text, 1), (None, 2))), Table("without rows", (text,), ())),
        pictures=(Picture(PNG, text),),
        notes=(text,),
        examples=(Example(text, text, (Side(text, text), Side(text, text, won=True))),),
        blocks=((text, text),),
        headline=text,
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_html_shows_hostile_text_and_obeys_none_of_it(text: str) -> None:
    clean = Page(render_html("plain", [section_of("plain")]))
    page = Page(render_html(text, [section_of(text)]))
    assert [(tag, set(attrs)) for tag, attrs in page.tags] == [(tag, set(attrs)) for tag, attrs in clean.tags]
    assert page.depth == []
    assert "".join(page.texts).count(text) == "".join(clean.texts).count("plain") > 10


def test_html_needs_nothing_from_outside_and_pictures_arrive_whole() -> None:
    page = Page(render_html("run", [section_of("text")]))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "form"}
    (source,) = (str(attrs["src"]) for tag, attrs in page.tags if tag == "img")
    assert source.startswith("data:image/png;base64,")
    assert base64.b64decode(source.partition(",")[2]) == PNG
    assert all(str(attrs["href"]).startswith("#s") for tag, attrs in page.tags if tag == "a")
    policies = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert [attrs.get("class") for tag, attrs in page.tags if tag == "td"] == ["short", "figure"] * 2
    assert "without rows" not in "".join(page.texts)
    long = render_html("run", [section_of("x" * 10_000)])
    assert "… (4,000 characters more)" in long
    assert "x" * 6001 not in long


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


def test_markdown_keeps_the_words_the_pictures_and_figures_to_the_right() -> None:
    rendered = MarkdownIt("commonmark").render(render_markdown(section_of(HOSTILE[5])))
    shown = rendered.replace("\N{ZERO WIDTH SPACE}", "")
    assert "![picture](https://example.org/x.png) [link](javascript:alert(1))" in shown
    markdown = render_markdown(section_of("words"))
    assert f"![words](data:image/png;base64,{base64.b64encode(PNG).decode()})" in markdown
    assert "| words | n |\n| --- | ---: |\n| words | 1 |\n| – | 2 |" in markdown
    assert markdown.count("✓ won") == 1
    assert "without rows" not in markdown


@pytest.mark.parametrize("text", ["see HTTPS://evil.example/login", "(www.evil.example)", "write to me+x@evil.example"])
def test_an_address_in_a_text_is_no_link_in_the_ui(text: str) -> None:
    """The UI links bare addresses, by these patterns of mdast-util-gfm-autolink-literal; code is left alone."""
    section = section_of(text)
    markdown = render_markdown(replace(section, pictures=(), blocks=()))
    assert not re.search(r"(https?://|www(?=\.))([-.\w]+)|([-.\w+]+)@([-\w]+(?:\.[-\w]+)+)", markdown, re.IGNORECASE)
    assert text in markdown.replace("\N{ZERO WIDTH SPACE}", "")


def test_control_characters_and_lone_surrogates_do_not_get_out() -> None:
    text = "a\x1b[31mred\x07\u202egnp.\ud800 end\r\nnext"
    section = section_of(text)
    for out in (render_html(text, [section]), render_markdown(section), render_text_table([[text], [text]])):
        out.encode()
        assert not set(out) & set("\x1b\x07\u202e\r")
        assert "end" in out


def test_text_table_lines_up() -> None:
    long = "a very " + "long " * 20
    body: list[list[Any]] = [["judge", 1021, True], ["train", 58, False], [long, None, None]]
    table = render_text_table([["stage", "rows", "state"], *body])
    assert table.splitlines()[0].split() == ["stage", "rows", "state"]
    assert table.splitlines()[2].split() == ["judge", "1,021", "✓", "ok"]
    assert table.splitlines()[2].index("1,021") + 3 == table.splitlines()[3].index("58")
    assert max(map(len, table.splitlines())) <= 60 + 3 + 5 + 3 + 14
    assert render_text_table([]) == ""


def test_large_figures_are_short_and_tables_with_ragged_rows_are_refused() -> None:
    tokens = Table("t", ("a", "b", "c"), ((9_999_999, 12_345_678, 1_000_000_000),))
    assert "| ---: | ---: | ---: |\n| 9,999,999 | 12.3 M | 1.0 G |" in render_markdown(
        ReportSection("t", "", tables=(tokens,))
    )
    with pytest.raises(ValueError, match="2 cells in a row under 1 columns"):
        Table("t", ("a",), ((1, 2),))
