"""Keeps a view small enough for a notebook: cuts its tables, drawings and alerts in turn, and says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nbmerge.display.html import render_html
from nbmerge.display.model import Alert, Cell, Section, Table, View
from nbmerge.display.tree import kept

LIMIT = 30_000  # bytes of HTML that a view may have
_ROW = 500  # bytes of a row, about
_MANY, _FEW, _FEWEST = 24, 8, 1  # rows that a table keeps, the fewer the less else there is to cut
_DRAWINGS = 2  # of a section, that are kept until tables have few rows


def fit(view: View) -> View:
    """The view, cut until its HTML takes at most 30 kB, or until there is nothing more to cut."""
    while (over := len(render_html(view).encode("utf-8", "replace")) - LIMIT) > 0:
        rows = -(-over // _ROW)
        smaller = (
            _with_a_shorter_table(view, _MANY, rows)
            or _without_a_grid(view, _DRAWINGS)
            or _with_a_shorter_table(view, _FEW, rows)
            or _without_a_grid(view, 0)
            or _with_a_shorter_table(view, _FEWEST, rows)
            or _with_fewer_alerts(view)
        )
        if smaller is None:
            break
        view = smaller
    return view


def _with_a_shorter_table(view: View, fewest: int, less: int) -> View | None:
    """The view with so many rows less in its longest table; None where no table has more than `fewest`."""
    tables = [(len(table.rows), s, t) for s, part in enumerate(view.sections) for t, table in enumerate(part.tables)]
    rows, section, number = max(tables, key=lambda found: found[0], default=(0, 0, 0))
    if rows <= fewest:
        return None
    part = view.sections[section]
    shorter = _shorter(part.tables[number], max(fewest, rows - less))
    tables_then = (*part.tables[:number], shorter, *part.tables[number + 1 :])
    return _with_section(view, section, replace(part, tables=tables_then))


def _shorter(table: Table, room: int) -> Table:
    """The first rows of a table; of a tree those that are missed most."""
    left = kept([(row[0].indent, _bar(row) if row[0].indent else 0.0) for row in table.rows], room)
    return replace(table, rows=tuple(table.rows[at] for at in left), hidden=table.hidden + len(table.rows) - len(left))


def _bar(row: Sequence[Cell]) -> float:
    return max((cell.bar or 0.0 for cell in row), default=0.0)


def _without_a_grid(view: View, fewest: int) -> View | None:
    """The view without the last drawing of the section that has the most; None where none has more than `fewest`."""
    number = max(range(len(view.sections)), key=lambda s: len(view.sections[s].grids), default=0)
    if not view.sections or len(view.sections[number].grids) <= fewest:
        return None
    part = view.sections[number]
    left = part.grids[:-1]
    notes = tuple(note for note in part.notes if note != _LEFT_OUT) if left or part.tables else ()
    return _with_section(view, number, replace(part, grids=left, notes=(*notes, _LEFT_OUT)))


_LEFT_OUT = "drawings were left out to keep this small"


def _with_fewer_alerts(view: View) -> View | None:
    """The view with one alert less, and a word on how many there were; None where one is left."""
    alerts, more = view.alerts, 1
    if alerts and alerts[-1].more:
        alerts, more = alerts[:-1], alerts[-1].more + 1
    if len(alerts) <= 1:
        return None
    return replace(view, alerts=(*alerts[:-1], Alert(alerts[-1].kind, f"{more:,} more not shown", more=more)))


def _with_section(view: View, number: int, section: Section) -> View:
    return replace(view, sections=(*view.sections[:number], section, *view.sections[number + 1 :]))
