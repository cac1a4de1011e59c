"""A table to choose a row from: a native list box with aligned columns, in pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets
from markupsafe import escape

from nbmerge.display.model import Cell, Column, Table
from nbmerge.display.widgets.explorer import html, labelled
from nbmerge.display.words import visible

PAGE = 50  # rows at most
_ROWS = 12  # of them in sight
_GAP = "  "
_HARD_SPACE = "\N{NO-BREAK SPACE}"  # a list box draws several spaces as one


class Picker:
    """Rows in pages, one of which is chosen. A page is one message to the browser, however many rows there are.

    JupyterLab keeps arrows and letters for itself while a list box has the focus, and leaves them to a number's input:
    so the box is for the mouse, and the number of the row for the keyboard.

    columns: their heads; row: makes the cells of a key; chosen: called after another row was chosen.
    """

    def __init__(
        self, columns: Sequence[Column], row: Callable[[str], Sequence[Cell]], chosen: Callable[[], None], label: str
    ) -> None:
        self._columns, self._row, self._chosen = tuple(columns), row, chosen
        self._keys: Sequence[str] = ()
        self._quiet = False
        self.heads = html()
        self.heads.add_class("nbm-heads")
        self.box = widgets.Select(
            options=(), rows=_ROWS, layout=widgets.Layout(width="100%"), tooltip=label, tabbable=False
        )
        self.row = labelled(widgets.BoundedIntText, "Row", value=1, min=1, max=1, layout=sized("130px"))
        self.back = widgets.Button(description="◂ Previous page", layout=widgets.Layout(width="auto"))
        self.ahead = widgets.Button(description="Next page ▸", layout=widgets.Layout(width="auto"))
        self.where = html(width="auto")
        self.pager = widgets.HBox(
            [self.row, self.where, self.back, self.ahead], layout=widgets.Layout(align_items="center")
        )
        self.widget = widgets.VBox([self.heads, self.box, self.pager])
        self.page = 0
        self.box.observe(self._on_box, "index")
        self.row.observe(self._on_row, "value")
        self.back.on_click(lambda _: self.turn(-1))
        self.ahead.on_click(lambda _: self.turn(1))

    @property
    def key(self) -> str | None:
        """The key of the chosen row; None where there are no rows."""
        value = self.box.value
        return None if value is None else str(value)

    @property
    def pages(self) -> int:
        """How many there are, at least one."""
        return max(-(-len(self._keys) // PAGE), 1)

    def show(self, keys: Sequence[str]) -> None:
        """Shows other rows. The chosen one stays chosen where it is among them, else the first one is."""
        before = self.key
        self._keys = keys
        place = keys.index(before) if before is not None and before in keys else 0
        self._fill(place // PAGE, place % PAGE)

    def turn(self, pages: int) -> None:
        """Shows a later page, or an earlier one, and chooses its first row."""
        self._fill(min(max(self.page + pages, 0), self.pages - 1), 0)

    def table(self) -> Table:
        """The page as a table of a view."""
        rows = tuple(tuple(self._row(key)) for key in self._shown())
        return Table(self._columns, rows, hidden=len(self._keys) - len(rows))

    def _shown(self) -> Sequence[str]:
        return self._keys[self.page * PAGE : (self.page + 1) * PAGE]

    def _fill(self, page: int, at: int) -> None:
        self.page = page
        keys = self._shown()
        heads, *labels = self._aligned([[cell.text for cell in self._row(key)] for key in keys])
        self._quiet = True
        try:
            with self.box.hold_sync():
                self.box.index = None
                self.box.options = list(zip(labels, keys, strict=True))
                self.box.index = at if keys else None
            self.row.max = max(len(self._keys), 1)
            self.row.value = page * PAGE + at + 1
        finally:
            self._quiet = False
        self.heads.value = str(escape(heads))
        self.back.disabled, self.ahead.disabled = page == 0, page == self.pages - 1
        for button in (self.back, self.ahead):
            button.layout.display = "none" if self.pages == 1 else None
        self.row.disabled = not keys
        of = f"of {len(self._keys):,}"
        self.where.value = of if self.pages == 1 else f"{of}, page {page + 1:,} of {self.pages:,}"
        self._chosen()

    def _on_box(self, _: object) -> None:
        if not self._quiet and self.box.index is not None:
            self._choose(self.page, self.box.index)

    def _on_row(self, _: object) -> None:
        if not self._quiet:
            self._choose(*divmod(self.row.value - 1, PAGE))

    def _choose(self, page: int, at: int) -> None:
        """Another row. The page stays as it is where the row is on it."""
        if page != self.page:
            self._fill(page, at)
            return
        self._quiet = True
        try:
            self.box.index, self.row.value = at, page * PAGE + at + 1
        finally:
            self._quiet = False
        self._chosen()

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
        return _GAP.join(cells).rstrip().replace(" ", _HARD_SPACE)


def sized(width: str) -> Any:
    """A layout of so wide an input."""
    return widgets.Layout(width=width)
