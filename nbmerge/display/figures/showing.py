"""Shows a figure at the end of its cell, once: `diff.plot();` and `figure = diff.plot()` show it as `diff.plot()` does.

That is what people know of pyplot's figures. These are not pyplot's, so that nothing needs to be imported, chosen
(`%matplotlib inline`) or closed.
"""

from __future__ import annotations

import sys
from typing import Any

_waiting: list[Any] = []


def show_later(figure: Any) -> None:
    """Has the figure shown when the cell is over, unless something shows it before. Only where a notebook runs."""
    shell: Any = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if not hasattr(shell, "kernel"):
        return
    if _show not in shell.events.callbacks["post_run_cell"]:
        shell.events.register("post_run_cell", _show)
    _waiting.append(figure)


def was_shown(figure: Any) -> None:
    """Something shows the figure now."""
    _waiting[:] = [one for one in _waiting if one is not figure]


def _show(_: object) -> None:
    """Shows what waits. IPython calls it after a cell."""
    from IPython.display import display

    figures = list(_waiting)
    _waiting.clear()
    for figure in figures:
        display(figure)
