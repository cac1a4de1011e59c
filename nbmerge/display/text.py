"""Renders a view as text for a terminal: at most about 110 columns, no escape codes."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from nbmerge.display.model import PROBLEM, Alert, Cell, Fact, Grid, Section, Table, View
from nbmerge.display.words import visible

_WIDTH = 108
_GAP = "  "
_NARROWEST = 14  # columns of text are wrapped down to this
_BREAK = re.compile(r"(?<=[\s/·])|(?<=[.,])(?!\d)|(?<=\.\.)(?=\d)")
_LAST_BREAK = re.compile(r"(?<=[_=\-])")
"""Where a cell may be wrapped, and where a piece of it that is still too long: never inside a number."""


def render_text(view: View) -> str:
    """The whole view as lines of text."""
    return "\n".join(line.rstrip() for line in _lines(view))


def _lines(view: View) -> Iterator[str]:
    drawing = f"; {visible(view.drawing)}" if view.drawing else ""
    yield from _wrapped(f"{view.title}: {visible(view.sentence)}{drawing}", "  ")
    for alert in view.alerts:
        yield from _alert(alert)
    if view.facts:
        yield ""
        yield from _facts(view.facts)
    for section in view.sections:
        yield ""
        yield from _section(section)
    if view.code:
        yield ""
        if view.code_title:
            yield f"{view.code_title}:"
        yield from (f"  {visible(line)}" for line in view.code)


def _wrapped(text: str, indent: str) -> list[str]:
    # Long words stay whole, so that a path can be copied and a number is never cut.
    return textwrap.wrap(
        text, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ) or [""]  # fmt: skip


def _alert(alert: Alert) -> Iterator[str]:
    mark = "✗ problem: " if alert.kind == PROBLEM else "! attention: "
    yield from _wrapped(mark + visible(alert.what), "    ")
    width = max((len(label) for label, _ in alert.details), default=0)
    for label, text in alert.details:
        indent = " " * (4 + width + 2)
        yield from _wrapped(f"    {label + ':':{width + 1}} {visible(text)}", indent)


def _facts(facts: Sequence[Fact]) -> Iterator[str]:
    width = max(len(visible(fact.label)) for fact in facts)
    for fact in facts:
        yield from _wrapped(f"  {visible(fact.label):{width}}  {visible(fact.value)}", " " * (width + 4))


def _section(section: Section) -> Iterator[str]:
    yield from _wrapped(f"{section.title}" + (f": {visible(section.summary)}" if section.summary else ""), "  ")
    if section.facts:
        yield from _facts(section.facts)
    for grid in section.grids:
        yield from _grid(grid)
    for table in section.tables:
        yield from _table(table)
    for note in section.notes:
        yield from _wrapped(f"  {visible(note)}", "  ")


def _grid(grid: Grid) -> Iterator[str]:
    """The drawing in boxes of lines."""
    if grid.title:
        yield from _wrapped(f"  {visible(grid.title)}", "    ")
    left = max(len(visible(head)) for head in grid.row_heads)
    columns = list(zip(grid.column_heads, *[[patch.text for patch in row] for row in grid.patches], strict=True))
    widths = [max(len(visible(text)) for text in column) + 2 for column in columns]
    if any(grid.column_heads):
        heads = " ".join(f"{visible(head):^{width}}" for head, width in zip(grid.column_heads, widths, strict=True))
        yield f"  {'':{left}}  {heads}   {grid.corner}"
    elif grid.corner:
        yield f"  {grid.corner}"
    yield f"  {'':{left}} {_rule('┌┬┐', widths)}"
    for head, row in zip(grid.row_heads, grid.patches, strict=True):
        texts = (f"{visible(patch.text):^{width}}" for patch, width in zip(row, widths, strict=True))
        yield f"  {visible(head):>{left}} │{'│'.join(texts)}│"
    yield f"  {'':{left}} {_rule('└┴┘', widths)}"
    for note in grid.notes:
        yield from _wrapped(f"  {visible(note)}", "    ")


def _rule(corners: str, widths: Sequence[int]) -> str:
    return corners[0] + corners[1].join("─" * width for width in widths) + corners[2]


def _table(table: Table) -> Iterator[str]:
    if table.title:
        yield from _wrapped(f"  {visible(table.title)}", "    ")
    heads = tuple(Cell(column.title) for column in table.columns)
    rows = [["  " * cell.indent + visible(cell.text) for cell in row] for row in (heads, *table.rows)]
    widths = _widths(table, rows)
    for number, row in enumerate(rows):
        yield from _row(table, row, widths)
        if number == 0:
            yield "  " + _GAP.join("─" * width for width in widths)
    if table.cut:
        yield f"  {visible(table.cut)}"


def _widths(table: Table, rows: list[list[str]]) -> list[int]:
    """The columns' widths; the widest columns of text give way until the row fits."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
    soft = [i for i, column in enumerate(table.columns) if not column.number]
    room = _WIDTH - 2 - len(_GAP) * (len(widths) - 1)
    while sum(widths) > room and soft:
        widest = max(soft, key=lambda i: widths[i])
        if widths[widest] <= _NARROWEST:
            break
        widths[widest] -= 1
    return widths


def _row(table: Table, row: list[str], widths: list[int]) -> Iterator[str]:
    cells = [
        [text] if column.number else _folded(text, width)
        for text, width, column in zip(row, widths, table.columns, strict=True)
    ]
    for parts in zip_longest(*cells, fillvalue=""):
        padded = (
            f"{part:>{width}}" if column.number else f"{part:{width}}"
            for part, width, column in zip(parts, widths, table.columns, strict=True)
        )
        yield "  " + _GAP.join(padded)


def _folded(text: str, width: int) -> list[str]:
    """The text in lines of at most `width`, broken after spaces, dots and the like; a longer word stays whole."""
    if len(text) <= width:
        return [text]
    words = text.lstrip(" ")
    indent = min(len(text) - len(words), width // 2)
    return [" " * indent + line for line in _lines_of(words, width - indent)]


def _lines_of(text: str, width: int) -> list[str]:
    lines = [""]
    for piece in _BREAK.split(text):
        for part in [piece] if len(piece.rstrip()) <= width else _LAST_BREAK.split(piece):
            if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
                lines.append("")
            lines[-1] += part
    return [line.strip() for line in lines]
