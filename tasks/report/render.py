"""Sections as HTML, markdown and terminal text. Completions are untrusted: nothing of them is ever taken for markup."""

import base64
import html
import re
from collections.abc import Sequence

from tasks.report.page import Cell, Example, Picture, ReportSection, Table

LONGEST_TEXT = 6000
LONGEST_CELL = 60
# Control characters (terminal escapes), text direction overrides and lone surrogates, which UTF-8 cannot hold.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
FIGURE = re.compile(r"(< ?)?[-+]?\d[\d,.]*(-\d[\d,.]*)?(e[-+]\d+)?( %| s| points from chance| min.*| h.*)?|[-–]")

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1d2430; --soft: #5b6677; --line: #dfe3ea;
  --accent: #2a6fb0; --good: #1e7f4f; --bad: #b4451f; --warn: #fdf3e4; --quote: #f3f5f8; }
@media (prefers-color-scheme: dark) { :root { --page: #14181f; --card: #1c222c; --text: #e3e8f0; --soft: #9aa6b8;
  --line: #323b49; --accent: #7db4e8; --good: #63c795; --bad: #f0906b; --warn: #33281a; --quote: #232b37; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
header, main { max-width: 70rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2rem; }
h1 { margin: 0 0 .75rem; font-size: 1.8rem; line-height: 1.2; }
h2 { margin: 0 0 .5rem; font-size: 1.3rem; }
h3 { margin: 1.25rem 0 .5rem; font-size: 1rem; }
nav { display: flex; flex-wrap: wrap; gap: .5rem; margin-bottom: 1.25rem; }
nav a { padding: .2rem .75rem; border: 1px solid var(--line); border-radius: 1rem; background: var(--card);
  color: var(--accent); text-decoration: none; }
nav b { color: var(--bad); }
section { margin: 0 0 1.25rem; padding: 1.25rem 1.5rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
p { margin: 0 0 .75rem; max-width: 46rem; }
.note { margin-top: .75rem; color: var(--soft); font-size: .9rem; }
.advice { margin: .75rem 0; padding: .75rem 1rem .75rem 2rem; background: var(--warn);
  border-left: 4px solid var(--bad); border-radius: .3rem; }
.advice li + li { margin-top: .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
caption { padding: .9rem 0 .3rem; text-align: left; font-weight: 600; }
th, td { padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: break-word; }
th { color: var(--soft); font-weight: 600; overflow-wrap: normal; }
.figure { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.good { color: var(--good); font-weight: 600; white-space: nowrap; }
.bad { color: var(--bad); font-weight: 600; white-space: nowrap; }
figure { margin: 1rem 0; }
img { display: block; max-width: 100%; background: #fff; border: 1px solid var(--line); border-radius: .4rem; }
figcaption { margin-top: .3rem; color: var(--soft); font-size: .9rem; }
details { border-top: 1px solid var(--line); padding: .5rem 0; }
summary { cursor: pointer; font-weight: 500; overflow-wrap: anywhere; }
details details { border: 0; } details details summary { color: var(--soft); font-weight: 400; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin-top: .5rem; }
.pair h4 { margin: 0 0 .25rem; font-size: .9rem; color: var(--soft); }
pre { margin: 0; padding: .75rem; background: var(--quote); border-radius: .4rem; font: .9rem/1.5 inherit;
  font-family: inherit; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
pre.code { font-family: ui-monospace, monospace; font-size: .82rem; max-height: 30rem; overflow: auto; }
@media (max-width: 44rem) {
  .pair { grid-template-columns: 1fr; } section { padding: 1rem; } table { min-width: 34rem; } }
@media print { body { background: #fff; } nav { display: none; }
  details > * { display: block; } details::details-content { content-visibility: visible; } }
"""


def render_html(title: str, sections: Sequence[ReportSection]) -> str:
    """Return one page that needs nothing else: no script, style and pictures inside, light or dark as the reader's."""
    links = "".join(_html_link(number, section) for number, section in enumerate(sections, 1))
    body = "\n".join(_html_section(number, section) for number, section in enumerate(sections, 1))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_html(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{_html(title)}</h1>\n<nav>{links}</nav>\n</header>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def render_markdown(section: ReportSection) -> str:
    """Return one section as markdown for a Prefect artifact: pictures as data URIs, no raw HTML."""
    parts = [f"## {_markdown(section.title)}", _markdown(section.summary)]
    if section.advice:
        parts.append("**What to do**\n\n" + "\n".join(f"- {_markdown(text)}" for text in section.advice))
    parts += [f"![{_markdown(picture.caption)}]({_data_uri(picture)})" for picture in section.pictures]
    parts += [_markdown_table(table) for table in section.tables]
    parts += [_markdown(text) for text in section.notes]
    parts += [_markdown_example(example) for example in section.examples]
    parts += [f"**{_markdown(title)}**\n\n{_markdown_code(text)}" for title, text in section.blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def render_text_table(rows: Sequence[Sequence[Cell]]) -> str:
    """Return rows as a table for a terminal, the first one as its heading; figures stand to the right."""
    if not rows:
        return ""
    lines = [[_shorten(_inline(_cell_text(cell)), LONGEST_CELL) for cell in row] for row in rows]
    columns = list(zip(*lines, strict=True))
    widths = [max(len(text) for text in column) for column in columns]
    right = [_is_figures(column[1:]) for column in columns]
    out = [_text_line(line, widths, right) for line in lines]
    out.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(out) + "\n"


def _text_line(line: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    cells = zip(line, widths, right, strict=True)
    return "  ".join(text.rjust(width) if to_right else text.ljust(width) for text, width, to_right in cells).rstrip()


def _clean(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", _shorten(text, LONGEST_TEXT))


def _shorten(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    return f"{text[:limit]}… ({len(text) - limit:,} characters more)" if limit > 100 else f"{text[: limit - 1]}…"


def _inline(text: str) -> str:
    return " ".join(_clean(text).split())


def _cell_text(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "✓ ok" if cell else "✗ look here"
    if isinstance(cell, float):
        return f"{cell:,.4g}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def _is_figures(column: Sequence[str]) -> bool:
    return any(text not in "-–" for text in column) and all(FIGURE.fullmatch(text) for text in column)


def _figure_columns(table: Table) -> list[bool]:
    return [_is_figures([_cell_text(row[k]) for row in table.rows]) for k in range(len(table.columns))]


def _data_uri(picture: Picture) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"


def _html(text: str) -> str:
    return html.escape(_clean(text))


def _html_link(number: int, section: ReportSection) -> str:
    count = f" <b>{len(section.advice)} to do</b>" if section.advice else ""
    return f'<a href="#s{number}">{_html(section.title)}{count}</a>'


def _html_section(number: int, section: ReportSection) -> str:
    parts = [f"<h2>{_html(section.title)}</h2>", f"<p>{_html(section.summary)}</p>"]
    if section.advice:
        parts.append(f'<ul class="advice">{"".join(f"<li>{_html(text)}</li>" for text in section.advice)}</ul>')
    parts += [_html_picture(picture) for picture in section.pictures]
    parts += [_html_table(table) for table in section.tables]
    parts += [f'<p class="note">{_html(text)}</p>' for text in section.notes]
    if section.examples:
        parts.append("<h3>To read</h3>")
    parts += [_html_example(example) for example in section.examples]
    parts += [
        f'<details><summary>{_html(title)}</summary><pre class="code">{_html(text)}</pre></details>'
        for title, text in section.blocks
    ]
    return f'<section id="s{number}">\n' + "\n".join(parts) + "\n</section>"


def _html_picture(picture: Picture) -> str:
    caption = _html(picture.caption)
    return f'<figure><img alt="{caption}" src="{_data_uri(picture)}"><figcaption>{caption}</figcaption></figure>'


def _html_table(table: Table) -> str:
    kinds = [' class="figure"' if figures else "" for figures in _figure_columns(table)]
    heading = "".join(f"<th{kind}>{_html(name)}</th>" for name, kind in zip(table.columns, kinds, strict=True))
    rows = "\n".join(
        f"<tr>{''.join(_html_cell(cell, kind) for cell, kind in zip(row, kinds, strict=True))}</tr>"
        for row in table.rows
    )
    head = f"<caption>{_html(table.caption)}</caption>\n<thead><tr>{heading}</tr></thead>"
    return f'<div class="scroll"><table>{head}\n<tbody>{rows}</tbody></table></div>'


def _html_cell(cell: Cell, kind: str) -> str:
    if isinstance(cell, bool):
        kind = ' class="good"' if cell else ' class="bad"'
    return f"<td{kind}>{_html(_cell_text(cell))}</td>"


def _html_example(example: Example) -> str:
    sides = ((example.left_label, example.left), (example.right_label, example.right))
    columns = "".join(f"<div><h4>{_html(label)}</h4><pre>{_html(text)}</pre></div>" for label, text in sides)
    prompt = f"<details><summary>the prompt</summary><pre>{_html(example.prompt)}</pre></details>"
    return f'<details><summary>{_html(example.title)}</summary>{prompt}<div class="pair">{columns}</div></details>'


def _markdown(text: str) -> str:
    """Escape one line of text so that markdown shows it and obeys nothing in it."""
    line = html.escape(_inline(text), quote=False)
    line = re.sub(r"([\\`*_\[\]|~])", r"\\\1", line)
    line = re.sub(r"^([#+=-])", r"\\\1", line)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)


def _markdown_table(table: Table) -> str:
    marks = ["---:" if figures else "---" for figures in _figure_columns(table)]
    lines = [[_markdown(name) for name in table.columns], marks]
    lines += [[_markdown(_cell_text(cell)) for cell in row] for row in table.rows]
    return f"**{_markdown(table.caption)}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_quote(text: str) -> str:
    lines = [_markdown(line) for line in _clean(text).split("\n")]
    return "\n".join(f"> {line}\\" if line else ">" for line in lines).removesuffix("\\")


def _markdown_example(example: Example) -> str:
    return "\n\n".join(
        (
            f"### {_markdown(example.title)}",
            f"**{_markdown(example.left_label)}**",
            _markdown_quote(example.left),
            f"**{_markdown(example.right_label)}**",
            _markdown_quote(example.right),
        )
    )


def _markdown_code(text: str) -> str:
    text = _clean(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
