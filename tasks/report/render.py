"""Sections as HTML, markdown and terminal text. Completions are untrusted: nothing of them is ever taken for markup."""

import html
import io
import re
from collections.abc import Sequence
from datetime import UTC, datetime

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from tasks.report.page import Cell, ReportSection, Table

LONGEST_TEXT = 6000
LONGEST_CELL = 60
# In characters, of a cell that is worth a line of its own.
ONE_LINE = 24
# Control characters (terminal escapes), text direction overrides and lone surrogates, which UTF-8 cannot hold.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
# What the UI makes a link of, where it stands in a text (GitHub's autolinks).
LINKED = re.compile(r"https?:(?=//)|www(?=[.])|(?<=[-.+\w])@(?=[-\w])", re.IGNORECASE)
FIGURE = re.compile(r"(< ?)?[-+]?\d[\d,.]*(-\d[\d,.]*)?(e[-+]\d+)?( %| [MG]| s| points from chance| min.*| h.*)?|[-–]")


def render_html(title: str, sections: Sequence[ReportSection]) -> str:
    """Return one page that needs nothing else: no script, style and pictures inside, light or dark as the reader's."""
    page = Environment(autoescape=True, undefined=StrictUndefined, loader=PackageLoader("tasks.report", ""))
    page.filters.update(clean=_clean, joined=_joined, cell_text=_cell_text, cell_class=_cell_class)
    page.filters.update(figure_columns=_figure_columns, table_class=_table_class)
    written = f"{datetime.now(UTC):%-d %B %Y, %H:%M} UTC"
    return page.get_template("report.html.j2").render(title=title, sections=sections, written=written)


def _cell_class(is_figure: bool, cell: Cell) -> Markup:
    """Return the class of a cell: good or bad for a state, figure in a column of figures, short to stay in one line."""
    if isinstance(cell, bool):
        return Markup(' class="good"') if cell else Markup(' class="bad"')
    is_short = len(_cell_text(cell)) <= ONE_LINE
    return Markup(' class="figure"') if is_figure else Markup(' class="short"') if is_short else Markup(' class="long"')


def _table_class(table: Table) -> str:
    """Return how a table is laid out on a phone: `two` a line for each row, `stacks` a line for each cell."""
    cells = [*table.columns, *(_cell_text(cell) for row in table.rows for cell in row)]
    if len(table.columns) == 2:
        return "two"
    return "three" if len(table.columns) == 3 and max(map(len, cells)) <= ONE_LINE // 2 else "stacks"


def render_markdown(section: ReportSection) -> str:
    """Return one section as markdown for a Prefect artifact: pictures as data URIs, no raw HTML."""
    parts = [f"## {_markdown(section.title)}", f"**{_markdown(section.headline)}**" if section.headline else ""]
    parts.append(_markdown(section.summary))
    if section.advice:
        parts.append("**What to do**\n\n" + "\n".join(f"- {_markdown(text)}" for text in section.advice))
    for picture in section.pictures:
        caption = _markdown(picture.caption)
        parts.append(f"![{caption}]({picture.data_uri()})\n\n*{caption}*")
    for table in (table for table in section.tables if table.rows):
        marks = ["---:" if figures else "---" for figures in _figure_columns(table)]
        rows = [[_markdown(_cell_text(cell)) for cell in row] for row in (table.columns, *table.rows)]
        lines = (f"| {' | '.join(line)} |" for line in (rows[0], marks, *rows[1:]))
        parts.append(f"**{_markdown(table.caption)}**\n\n" + "\n".join(lines))
    parts += [_markdown(text) for text in section.notes]
    for example in section.examples:
        parts.append(f"### {_markdown(example.title)}")
        for side in example.sides:
            quoted = (_markdown(line) for line in _clean(side.text).split("\n"))
            parts.append(f"**{_markdown(side.label)}**{' ✓ won' if side.won else ''}")
            parts.append("\n".join(f"> {line}\\" if line else ">" for line in quoted).removesuffix("\\"))
    for title, text in section.blocks:
        shown = _clean(text)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
        parts.append(f"**{_markdown(title)}**\n\n{fence}\n{shown}\n{fence}")
    return "\n\n".join(part for part in parts if part) + "\n"


def render_text_table(rows: Sequence[Sequence[Cell]]) -> str:
    """Return rows as a table for a terminal, the first one as its heading; figures stand to the right."""
    if not rows:
        return ""
    lines = [[_shorten(" ".join(_clean(_cell_text(cell)).split()), LONGEST_CELL) for cell in row] for row in rows]
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name, *column in zip(*lines, strict=True):
        is_figures = all(FIGURE.fullmatch(text) for text in column)
        table.add_column(Text(name), justify="right" if is_figures else "left", no_wrap=True)
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    console = Console(width=LONGEST_CELL * len(rows[0]) + 80, color_system=None, file=io.StringIO())
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def _clean(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", _shorten(text, LONGEST_TEXT))


def _joined(text: str) -> str:
    """Return a text in which no line ends between a figure and its unit."""
    return re.sub(r"(?<=\d) (?=%|US\$|min\b|s\b)", "\N{NO-BREAK SPACE}", _clean(text))


def _shorten(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    return f"{text[:limit]}… ({len(text) - limit:,} characters more)" if limit > 100 else f"{text[: limit - 1]}…"


def _cell_text(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "✓ ok" if cell else "✗ out of range"
    if isinstance(cell, float):
        return f"{cell:,.4g}"
    if not isinstance(cell, int):
        return cell
    # A longer figure runs over into the next column of the UI.
    return f"{cell:,}" if cell < 10_000_000 else f"{cell / 1e6:,.1f} M" if cell < 1e9 else f"{cell / 1e9:,.1f} G"


def _figure_columns(table: Table) -> list[bool]:
    """Tell of each column whether it holds figures alone."""
    columns = range(len(table.columns))
    return [all(FIGURE.fullmatch(_cell_text(row[column])) for row in table.rows) for column in columns]


def _markdown(text: str) -> str:
    """Escape one line of text so that markdown shows it and obeys nothing in it."""
    # The UI breaks no word, however long: a model that repeats one letter would push its page apart.
    broken = re.sub(r"(\w{32})(?=\w)", "\\1\N{ZERO WIDTH SPACE}", " ".join(_clean(text).split()))
    broken = LINKED.sub("\\g<0>\N{ZERO WIDTH SPACE}", broken)
    line = re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(broken, quote=False))
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", re.sub(r"^([#+=-])", r"\\\1", line))
