"""Keeps a view small enough for a notebook: cuts rows of its longest tables, then alerts, and says what was cut."""

from __future__ import annotations

from dataclasses import replace

from markupsafe import escape

from nbmerge.display.model import Alert, Cell, Fact, Section, Table, View

BUDGET = 28_000  # bytes of HTML; below the 30 kB that a view may have, for what this estimate leaves out
_PER_CELL = 52  # bytes of tags and style around a cell's text, the first and those with bars apart: see html.py
_PER_ROW = 75
_PER_BAR = 85
_PER_LINE = 110
_FRAME = 1_900  # the style, and the tags around everything
_FEWEST = 1  # rows that a table keeps


def fit(view: View) -> View:
    """The view, with the longest tables cut until its HTML takes at most 30 kB."""
    size = _FRAME + len(view.sentence) + sum(_alert(alert) for alert in view.alerts) + _facts(view.facts)
    size += sum(_text(line) for line in view.code) + sum(_section(section) for section in view.sections)
    while size > BUDGET:
        longest = max(
            ((len(table.rows), s, t) for s, part in enumerate(view.sections) for t, table in enumerate(part.tables)),
            default=(0, 0, 0),
        )
        rows, section, table = longest
        if rows <= _FEWEST:
            break
        keep = max(_FEWEST, rows * 3 // 4)
        size -= sum(_row(row) for row in view.sections[section].tables[table].rows[keep:])
        view = _cut(view, section, table, keep)
    return _fewer_alerts(view, BUDGET - size) if size > BUDGET else view


def _fewer_alerts(view: View, room: int) -> View:
    """The view without its last alerts, of which their number is left. room: bytes, less than 0."""
    alerts = list(view.alerts)
    while room < 0 and len(alerts) > 1:
        room += _alert(alerts.pop())
    hidden = len(view.alerts) - len(alerts)
    if hidden:
        alerts.append(Alert(alerts[-1].kind, f"{hidden:,} more not shown"))
    return replace(view, alerts=tuple(alerts))


def _cut(view: View, section: int, table: int, keep: int) -> View:
    part = view.sections[section]
    old = part.tables[table]
    new = replace(old, rows=old.rows[:keep], hidden=old.hidden + len(old.rows) - keep)
    tables = (*part.tables[:table], new, *part.tables[table + 1 :])
    sections = (*view.sections[:section], replace(part, tables=tables), *view.sections[section + 1 :])
    return replace(view, sections=sections)


def _text(text: str) -> int:
    """Bytes of the escaped text and of the tags around it."""
    return len(escape(text).encode("utf-8", "replace")) + _PER_LINE


def _alert(alert: Alert) -> int:
    return _text(alert.what) + sum(_text(label) + _text(text) for label, text in alert.details)


def _facts(facts: tuple[Fact, ...]) -> int:
    return sum(_text(fact.label) + _text(fact.value) for fact in facts)


def _section(section: Section) -> int:
    return (
        _text(section.title)
        + _text(section.summary)
        + _facts(section.facts)
        + sum(_text(note) for note in section.notes)
        + sum(_table(table) for table in section.tables)
    )


def _table(table: Table) -> int:
    heads = sum(_text(column.title) for column in table.columns)
    return _text(table.title) + _text(table.cut) + heads + sum(_row(row) for row in table.rows)


def _row(row: tuple[Cell, ...]) -> int:
    bars = sum(_PER_BAR for cell in row if cell.bar is not None)
    return _PER_ROW + bars + sum(len(escape(cell.text).encode("utf-8", "replace")) + _PER_CELL for cell in row)
