"""Keeps a view small enough for a notebook: cuts rows of its longest tables, then alerts, and says what was cut."""

from __future__ import annotations

from dataclasses import replace

from nbmerge.display.html import render_html
from nbmerge.display.model import Alert, View

LIMIT = 30_000  # bytes of HTML that a view may have
_FEWEST = 1  # rows that a table keeps


def fit(view: View) -> View:
    """The view, with the longest tables cut until its HTML takes at most 30 kB, then with fewer alerts."""
    while _is_too_long(view) and (longest := _longest_table(view)):
        view = _cut(view, *longest)
    alerts = view.alerts
    for shown in range(len(alerts) - 1, 0, -1):
        if not _is_too_long(view):
            break
        more = Alert(alerts[shown - 1].kind, f"{len(alerts) - shown:,} more not shown")
        view = replace(view, alerts=(*alerts[:shown], more))
    return view


def _is_too_long(view: View) -> bool:
    return len(render_html(view).encode("utf-8", "replace")) > LIMIT


def _longest_table(view: View) -> tuple[int, int] | None:
    """The numbers of a section and of its table; None where no table has rows to spare."""
    lengths = {
        (s, t): len(table.rows) for s, part in enumerate(view.sections) for t, table in enumerate(part.tables)
    }  # fmt: skip
    longest = max(lengths, key=lambda place: lengths[place], default=None)
    return longest if longest and lengths[longest] > _FEWEST else None


def _cut(view: View, section: int, table: int) -> View:
    """The view with three quarters of the table's rows."""
    part = view.sections[section]
    old = part.tables[table]
    keep = max(_FEWEST, len(old.rows) * 3 // 4)
    new = replace(old, rows=old.rows[:keep], hidden=old.hidden + len(old.rows) - keep)
    tables = (*part.tables[:table], new, *part.tables[table + 1 :])
    sections = (*view.sections[:section], replace(part, tables=tables), *view.sections[section + 1 :])
    return replace(view, sections=sections)
