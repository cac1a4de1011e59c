"""A table to choose a row from, in pages: rows are buttons with aligned columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ipywidgets as widgets
from markupsafe import escape

from nbmerge.display.model import Cell, Column, Table
from nbmerge.display.widgets.explorer import bar, html, labelled
from nbmerge.display.widgets.keys import Keys
from nbmerge.display.words import visible

PAGE = 15  # rows at most
_GAP = "  "
_HINT = "<small>keys: ↑ ↓ after Tab from the filter</small>"


class Picker:
    """Rows in pages, one of which is chosen by a click or by arrow keys, which go from page to page.

    A row is a button because it is told of every click; a list box is not told of one on the row that is chosen.

    columns: their heads; row: makes the cells of a key; chosen: called after another row was chosen; home: the input
    for text, beside which `arrows` belong; most: how many rows there will be.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        row: Callable[[str], Sequence[Cell]],
        chosen: Callable[[], None],
        home: Any,
        most: int,
    ) -> None:
        self._columns, self._row, self._chosen = tuple(columns), row, chosen
        self._keys: Sequence[str] = ()
        self._quiet = False
        self.at = 0  # the number of the chosen row, from 0
        self.heads = html()
        self.heads.add_class("nbm-heads")
        self.rows = _buttons(min(max(most, 1), PAGE))
        for number, button in enumerate(self.rows):
            button.on_click(partial(self._on_click, number))
        self.arrows = Keys("rows of the table", self.step, home)
        self.arrows.field.add_class("nbm-to-rows")
        table = widgets.Box([_rows_box([self.heads, *self.rows])])
        table.add_class("nbm-table")
        self.back = widgets.Button(description="◂ Previous", tabbable=False, layout=sized("auto"))
        self.ahead = widgets.Button(description="Next ▸", tabbable=False, layout=sized("auto"))
        self.number = labelled(widgets.BoundedIntText, "Page", value=1, min=1, max=1, layout=sized("130px"))
        self.where, self.of = html(width="auto"), html(width="auto")
        self._paging = (self.number, self.of, self.back, self.ahead)
        self.widget = widgets.VBox([table, bar(self.where, *self._paging, html(_HINT, width="auto"))])
        self.number.observe(self._on_page, "value")
        self.back.on_click(lambda _: self._on_turn(-1))
        self.ahead.on_click(lambda _: self._on_turn(1))

    @property
    def key(self) -> str | None:
        """The key of the chosen row; None where there are no rows."""
        return self._keys[self.at] if self._keys else None

    @property
    def page(self) -> int:
        """The page in sight, from 0: the one with the chosen row."""
        return self.at // PAGE

    @property
    def pages(self) -> int:
        """How many there are, at least one."""
        return max(-(-len(self._keys) // PAGE), 1)

    def show(self, keys: Sequence[str]) -> None:
        """Shows other rows. The chosen one stays chosen where it is among them, else the first one is."""
        before = self.key
        self._keys = keys
        self.at = keys.index(before) if before is not None and before in keys else 0
        self._fill()
        self._chosen()

    def choose(self, at: int) -> None:
        """Another row; the first or the last one where there is no such row."""
        page, self.at = self.page, min(max(at, 0), max(len(self._keys) - 1, 0))
        if page == self.page:
            self._mark()
        else:
            self._fill()
        self._chosen()

    def step(self, rows: int) -> None:
        """A later row, or an earlier one."""
        self.choose(self.at + rows)

    def table(self) -> Table:
        """The page as a table of a view."""
        rows = tuple(tuple(self._row(key)) for key in self._shown())
        return Table(self._columns, rows, hidden=len(self._keys) - len(rows))

    def _shown(self) -> Sequence[str]:
        return self._keys[self.page * PAGE : (self.page + 1) * PAGE]

    def _fill(self) -> None:
        """Draws the page with the chosen row."""
        keys = self._shown()
        heads, *labels = self._aligned([[cell.text for cell in self._row(key)] for key in keys])
        self.heads.value = str(escape(heads))
        for number, button in enumerate(self.rows):
            there = number < len(keys)
            with button.hold_sync():
                button.description = labels[number] if there else ""
                button.tooltip = visible(keys[number])[:_HOVER] if there else ""
                button.disabled = not there
        for widget in self._paging:
            widget.layout.display = "none" if self.pages == 1 else None
        self.of.value = f"of {self.pages:,}"
        self.back.disabled, self.ahead.disabled = self.page == 0, self.page == self.pages - 1
        self._mark()

    def _mark(self) -> None:
        """Shows which row is chosen."""
        for number, button in enumerate(self.rows):
            if number == self.at % PAGE and self._keys:
                button.add_class("nbm-on")
            else:
                button.remove_class("nbm-on")
        self.where.value = f"Row {self.at + 1:,} of {len(self._keys):,}" if self._keys else "No rows"
        self._quiet = True
        try:
            self.number.max = self.pages
            self.number.value = self.page + 1
        finally:
            self._quiet = False

    def _on_click(self, number: int, _: object) -> None:
        self.choose(self.page * PAGE + number)
        self.arrows.leave()

    def _on_turn(self, pages: int) -> None:
        self._to_page(self.page + pages)
        self.arrows.leave()

    def _on_page(self, _: object) -> None:
        if not self._quiet:
            self._to_page(self.number.value - 1)

    def _to_page(self, page: int) -> None:
        """The first row of a page."""
        self.choose(min(max(page, 0), self.pages - 1) * PAGE)

    def _aligned(self, rows: Sequence[Sequence[str]]) -> list[str]:
        """The heads and the rows with each column as wide as its widest cell."""
        texts = [[column.title for column in self._columns], *[[visible(text) for text in row] for row in rows]]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        return [self._line(row, widths) for row in texts]

    def _line(self, row: Sequence[str], widths: Sequence[int]) -> str:
        cells = (
            f"{text:>{width}}" if column.number else f"{text:{width}}"
            for text, width, column in zip(row, widths, self._columns, strict=True)
        )
        return _GAP.join(cells).rstrip()


_HOVER = 1_000  # characters of a name that are shown where the mouse rests on it


def _buttons(count: int) -> list[Any]:
    """Buttons that share what they look like. They are out of Tab's way: it comes to the arrow keys instead."""
    layout, style = sized("auto"), widgets.ButtonStyle()
    made = [widgets.Button(layout=layout, style=style, tabbable=False) for _ in range(count)]
    for button in made:
        button.add_class("nbm-row")
    return made


def _rows_box(parts: Sequence[Any]) -> Any:
    box = widgets.VBox(parts)
    box.add_class("nbm-rows")
    return box


def sized(width: str) -> Any:
    """A layout of so wide an input."""
    return widgets.Layout(width=width)
