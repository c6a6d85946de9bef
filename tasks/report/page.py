"""What a report page is made of. All text in it is data: the renderers escape every character of it."""

import base64
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

# None is shown as a dash, True and False as "ok" and "out of range".
Cell: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True)
class Table:
    """A table; every row has as many cells as there are columns. One without rows is not shown."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.caption!r}: {len(row)} cells in a row under {len(self.columns)} columns")


@dataclass(frozen=True)
class Picture:
    """A PNG and what it shows; narrow enough to be read on a phone (`plots.WIDTH`)."""

    png: bytes
    caption: str

    def data_uri(self) -> str:
        """Return the picture as an address that holds it whole."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


class Side(NamedTuple):
    """One of the two texts of an example."""

    label: str
    text: str
    won: bool = False


@dataclass(frozen=True)
class Example:
    """Two texts on one prompt, side by side."""

    title: str
    prompt: str
    sides: tuple[Side, Side]
    is_open: bool = False


@dataclass(frozen=True)
class ReportSection:
    """One part of the report: a summary, what to do, and what shows it.

    `headline` is shown in large letters, green or red by `is_good`: a first page, where a first table of two columns
    stands next to the picture, and examples come before the other tables. `notes` say how the tables are to be read;
    `blocks` are (title, text) pairs that are shown as they are, folded.
    """

    title: str
    summary: str
    advice: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()
    blocks: tuple[tuple[str, str], ...] = ()
    headline: str = ""
    is_good: bool = True
