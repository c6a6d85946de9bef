"""What a report page is made of. All text in it is data: the renderers escape every character of it."""

import base64
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

# None is shown as a dash, True and False as "ok" and "out of range".
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
    """A PNG and what it shows; a wide one is scrolled on a phone, where it would be too small to read."""

    png: bytes
    caption: str
    is_wide: bool = True

    def data_uri(self) -> str:
        """Return the picture as an address that holds it whole."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


class Side(NamedTuple):
    """One of the two texts of an example."""

    label: str
    text: str
    won: bool


@dataclass(frozen=True)
class Example:
    """Two texts on one prompt, side by side; `winner` is 0 for the left one, 1 for the right one, or None."""

    title: str
    prompt: str
    left_label: str
    left: str
    right_label: str
    right: str
    winner: int | None = None
    is_open: bool = False

    def sides(self) -> tuple[Side, Side]:
        """Return both texts, each with whether it won."""
        left = Side(self.left_label, self.left, self.winner == 0)
        return left, Side(self.right_label, self.right, self.winner == 1)


@dataclass(frozen=True)
class ReportSection:
    """One part of the report: a summary, what to do, and what shows it.

    `headline` is shown in large letters, green or red by `is_good`; `notes` say how the tables are to be read; `blocks`
    are (title, text) pairs that are shown as they are, folded.
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
