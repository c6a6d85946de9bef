"""What a report page is made of. All text in it is data: the renderers escape every character of it."""

from dataclasses import dataclass
from typing import TypeAlias

# None is shown as a dash, True and False as "ok" and "look here".
Cell: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True)
class Table:
    """A table; every row has as many cells as there are columns."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.caption!r}: {len(row)} cells in a row under {len(self.columns)} columns")


@dataclass(frozen=True)
class Picture:
    """A PNG and what is to be seen on it."""

    png: bytes
    caption: str


@dataclass(frozen=True)
class Example:
    """Two texts on one prompt, side by side."""

    title: str
    prompt: str
    left_label: str
    left: str
    right_label: str
    right: str


@dataclass(frozen=True)
class ReportSection:
    """One part of the report: a summary, what to do, and what shows it.

    `notes` say how the tables are to be read; `blocks` are (title, text) pairs that are shown as they are, folded.
    """

    title: str
    summary: str
    advice: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()
    blocks: tuple[tuple[str, str], ...] = ()
