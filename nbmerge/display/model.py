"""The view model: what is shown of an object, as plain data that knows neither text nor HTML nor a notebook.

View
├── sentence          what the object is, at a glance
├── alerts            what is wrong, or must not be overlooked; shown first
├── facts             label and value
├── sections          each folds away: facts, grids, tables, notes
└── code              what to type next
"""

from __future__ import annotations

from dataclasses import dataclass

PROBLEM, ATTENTION = "problem", "attention"


@dataclass(frozen=True, slots=True)
class Fact:
    """A label and its value. code: whether the value is a name or a path that a user would copy."""

    label: str
    value: str
    code: bool = False


@dataclass(frozen=True, slots=True)
class Alert:
    """What must be seen first. kind: `problem` (the work stops) or `attention` (it goes on); details: label, text.

    more: how many alerts were cut, for the one that says so.
    """

    kind: str
    what: str
    details: tuple[tuple[str, str], ...] = ()
    more: int = 0


@dataclass(frozen=True, slots=True)
class Column:
    """The head of a column. number: aligned to the right; code: holds names or paths."""

    title: str
    number: bool = False
    code: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell. bar: a fraction from 0 to 1 that can be drawn behind the text; the text says it too.

    indent: how many levels below the rows of the top it stands.
    """

    text: str
    bar: float | None = None
    indent: int = 0


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under columns; the first cell of a row is its head.

    hidden: how many further rows were cut; rows_are: what they are, in the plural; rest: where all of them are.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    hidden: int = 0
    rows_are: str = "rows"
    rest: str = ""

    @property
    def cut(self) -> str:
        """What was cut, as a sentence; empty where nothing was."""
        if not self.hidden:
            return ""
        of_all = f"{self.hidden:,} of {self.hidden + len(self.rows):,} {self.rows_are}"
        return f"… {of_all} not shown" + (f"; all are in {self.rest}" if self.rest else "")


@dataclass(frozen=True, slots=True)
class Patch:
    """A cell of a grid. hue: a number that patches of one kind share (a rank); None draws nothing behind the text."""

    text: str
    hue: int | None = None


@dataclass(frozen=True, slots=True)
class Grid:
    """A drawing of boxes in rows and columns, as they lie in a tensor or on a mesh.

    down, across: what the rows and the columns are; row_heads, column_heads: one for each, `0:65`;
    sizes: how tall each row is, as a share of the tallest; notes: what the drawing leaves out.
    """

    title: str
    down: str
    across: str
    row_heads: tuple[str, ...]
    column_heads: tuple[str, ...]
    patches: tuple[tuple[Patch, ...], ...]
    sizes: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def corner(self) -> str:
        """What its heads are, in words: `dim 0 ↓  dim 1 →`; empty where neither has any."""
        return "  ".join([f"{self.down} ↓"] * bool(self.down) + [f"{self.across} →"] * bool(self.across))


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a view with a title and a summary of its content. opened: whether it starts unfolded."""

    title: str
    summary: str = ""
    facts: tuple[Fact, ...] = ()
    grids: tuple[Grid, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    opened: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """All that is shown of an object.

    title: its class, in the user's words; drawing: a line of bars that ends the sentence; code: lines to run next.
    """

    title: str
    sentence: str
    alerts: tuple[Alert, ...] = ()
    facts: tuple[Fact, ...] = ()
    sections: tuple[Section, ...] = ()
    code: tuple[str, ...] = ()
    code_title: str = ""
    drawing: str = ""
