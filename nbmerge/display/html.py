"""Renders a view as static HTML that survives what notebooks do to it.

GitHub and an untrusted JupyterLab drop `<style>`, scripts, SVG, `<input>` and every `var()`; what is left here
still reads: tables, `<details>`, alignment as attributes, and bars as gradients of literal colours that are legible
on light and on dark. The one `<style>` improves it where it is kept. Everything that is shown is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import escape

from nbmerge.display.model import PROBLEM, Alert, Cell, Column, Fact, Grid, Patch, Section, Table, View
from nbmerge.display.words import visible

_STYLE = """<style>
.nbm{--nbm-line:var(--jp-border-color2,rgba(128,128,128,.35));font-size:var(--jp-content-font-size1,14px)}
.nbm table{font-size:var(--jp-ui-font-size1,13px);font-variant-numeric:tabular-nums}
.nbm tbody tr,.nbm thead tr{background:none!important}
.nbm tbody tr:hover{background:var(--jp-layout-color2,rgba(128,128,128,.12))!important}
.nbm th,.nbm td{border:0;border-bottom:1px solid var(--nbm-line);padding:3px 10px 3px 0;vertical-align:top}
.nbm td+td,.nbm th+td,.nbm th+th{padding-left:10px}
.nbm thead th{vertical-align:bottom}
.nbm [align=right]{text-align:right}
.nbm code{background:none!important;padding:0!important;color:inherit!important}
.nbm .nbm-k code{white-space:nowrap}
.nbm summary:focus-visible{outline:2px solid rgb(76,139,245);outline-offset:2px}
.nbm .nbm-map td{border:0;border-radius:3px;padding:2px 10px;vertical-align:middle;white-space:nowrap}
.nbm .nbm-map th{border:0;padding:2px 8px 2px 0;vertical-align:middle;white-space:nowrap}
.nbm .nbm-map tbody tr:hover{background:none!important}
.nbm-facts th,.nbm-facts td{border:0!important;padding-top:1px!important;padding-bottom:1px!important}
</style>"""

_BAR = "rgba(76,139,245,.35)"
_LEFT = ' style="text-align:left"'
_HEAD = ' style="text-align:left;font-weight:normal"'
_CENTRED = ' style="text-align:center;font-weight:normal"'
_SHORT = 23  # characters of a cell that are kept on one line
_NAME = 60  # characters of a name that are kept on one line where the style is kept
_TABLE = '<div style="overflow-x:auto"><table style="border-collapse:collapse;margin:4px 0 8px 0"'
_HUES = ("76,139,245", "230,150,0", "0,160,120", "200,80,160", "120,110,220", "190,120,60", "40,160,200", "150,160,40")
"""Grounds of patches, red, green and blue; half see-through, so that text is legible on light and on dark."""
_TALLEST = 40  # pixels of a row of a map
_ALERTS = {  # mark, edge, ground
    True: ("✗ Problem", "rgba(220,50,47,.9)", "rgba(220,50,47,.13)"),
    False: ("▲ Attention", "rgba(200,140,0,.9)", "rgba(230,170,0,.16)"),
}


def render_html(view: View) -> str:
    """The whole view as one block of HTML."""
    return "".join(_parts(view))


def _parts(view: View) -> Iterator[str]:
    yield f'{_STYLE}<div class="nbm" style="overflow-wrap:break-word">'
    drawing = f'; <span style="white-space:nowrap">{_safe(view.drawing)}</span>' if view.drawing else ""
    yield f'<p style="margin:0 0 6px 0"><b>{_safe(view.title)}</b> · {_safe(view.sentence)}{drawing}</p>'
    for alert in view.alerts:
        yield from _alert(alert)
    if view.facts:
        yield from _facts(view.facts)
    for section in view.sections:
        yield from _section(section)
    if view.code:
        title = f"<b>{_safe(view.code_title)}</b>" if view.code_title else ""
        code = "\n".join(_safe(line) for line in view.code)
        yield f'<div style="margin:6px 0 0 0">{title}<pre style="margin:2px 0;white-space:pre-wrap">{code}</pre></div>'
    yield "</div>"


def _safe(text: str) -> str:
    return str(escape(visible(text)))


def _alert(alert: Alert) -> Iterator[str]:
    mark, edge, ground = _ALERTS[alert.kind == PROBLEM]
    yield (
        f'<div style="border-left:4px solid {edge};background:{ground};padding:6px 10px;margin:0 0 6px 0">'
        f"<b>{mark}:</b> {_safe(alert.what)}"
    )
    for label, text in alert.details:
        yield f'<div style="margin-left:1.2em"><b>{_safe(label)}</b> {_safe(text)}</div>'
    yield "</div>"


def _facts(facts: Sequence[Fact]) -> Iterator[str]:
    yield f'{_TABLE} class="nbm-facts"><tbody>'
    for fact in facts:
        label = _safe(fact.label)
        if len(label) <= _SHORT:
            label = label.replace(" ", "\N{NO-BREAK SPACE}")
        yield (
            f'<tr><th scope="row" align="left"{_HEAD}>{label}</th>'
            f"<td{_LEFT}>{_code(_safe(fact.value), code=fact.code)}</td></tr>"
        )
    yield "</tbody></table></div>"


def _section(section: Section) -> Iterator[str]:
    opened = " open" if section.opened else ""
    summary = f" · {_safe(section.summary)}" if section.summary else ""
    yield f'<details{opened} style="margin:0 0 4px 0"><summary style="cursor:pointer">'
    yield f"<b>{_safe(section.title)}</b>{summary}</summary>"
    if section.facts:
        yield from _facts(section.facts)
    for grid in section.grids:
        yield from _grid(grid)
    for table in section.tables:
        yield from _table(table)
    for note in section.notes:
        text = f"<small>{_safe(note)}</small>" if section.tables or section.grids else _safe(note)
        yield f'<div style="margin:2px 0 6px 0">{text}</div>'
    yield "</details>"


def _grid(grid: Grid) -> Iterator[str]:
    """The drawing as a table whose cells have a ground for each hue."""
    yield '<div style="display:inline-block;vertical-align:top;max-width:100%;margin:4px 28px 8px 0">'
    if grid.title:
        yield f"<div>{_safe(grid.title)}</div>"
    yield '<div style="overflow-x:auto"><table class="nbm-map" style="border-collapse:separate;border-spacing:2px">'
    if any(grid.column_heads) or grid.corner:
        heads = "".join(f'<th scope="col" align="center"{_CENTRED}>{_safe(head)}</th>' for head in grid.column_heads)
        yield f"<thead><tr><th{_HEAD}><small>{_safe(grid.corner)}</small></th>{heads}</tr></thead>"
    yield "<tbody>"
    for number, (head, patches) in enumerate(zip(grid.row_heads, grid.patches, strict=True)):
        tall = f' style="height:{max(16, round(_TALLEST * grid.sizes[number]))}px"' if grid.sizes else ""
        cells = "".join(map(_patch, patches))
        yield f'<tr{tall}><th scope="row" align="right"{_HEAD}>{_safe(head)}</th>{cells}</tr>'
    yield "</tbody></table></div>"
    for note in grid.notes:
        yield f"<div><small>{_safe(note)}</small></div>"
    yield "</div>"


def _patch(patch: Patch) -> str:
    ground = f";background:rgba({_HUES[patch.hue % len(_HUES)]},.32)" if patch.hue is not None else ""
    return f'<td align="center" style="text-align:center{ground}">{_safe(patch.text)}</td>'


def _table(table: Table) -> Iterator[str]:
    if table.title:  # no <caption>, which would be as narrow as the table
        yield f'<div style="margin:4px 0 0 0">{_safe(table.title)}</div>'
    yield f"{_TABLE}>"
    drawn = [any(row[i].bar is not None for row in table.rows) for i in range(len(table.columns))]
    heads = (_head(column, drawn=bars) for column, bars in zip(table.columns, drawn, strict=True))
    yield f"<thead><tr>{''.join(heads)}</tr></thead><tbody>"
    for row in table.rows:
        cells = (_cell(cell, column, i == 0) for i, (cell, column) in enumerate(zip(row, table.columns, strict=True)))
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"
    if table.cut:
        yield f'<div style="margin:0 0 6px 0">{_safe(table.cut)}</div>'


def _head(column: Column, *, drawn: bool) -> str:
    if not column.number:
        return f'<th scope="col" align="left"{_LEFT}>{_safe(column.title)}</th>'
    width = ' width="80"' if drawn else ""  # room for bars to be compared
    return f'<th scope="col" align="right"{width}>{_safe(column.title)}</th>'


def _cell(cell: Cell, column: Column, first: bool) -> str:
    text = _safe(cell.text)
    if column.number or (len(cell.text) <= _SHORT and not column.code):
        text = text.replace(" ", "\N{NO-BREAK SPACE}")  # a number keeps its unit also where styles are dropped
    content = "\N{NO-BREAK SPACE}" * 4 * cell.indent + _code(text, code=column.code)
    if first:
        whole = ' class="nbm-k"' if column.code and len(cell.text) <= _NAME else ""
        return f'<th scope="row" align="left"{whole}{_HEAD}>{content}</th>'
    if not column.number:
        return f"<td{_LEFT}>{content}</td>"
    bar = f' style="background:{_gradient(cell.bar)}"' if cell.bar is not None else ""
    return f'<td align="right"{bar}>{content}</td>'


def _gradient(fraction: float) -> str:
    """A bar from the left, as long as the fraction of the cell."""
    stop = f"{100 * min(max(fraction, 0.0), 1.0):.0f}%"
    return f"linear-gradient(90deg,{_BAR} {stop},transparent {stop})"


def _code(content: str, *, code: bool) -> str:
    return f"<code>{content}</code>" if code else content
