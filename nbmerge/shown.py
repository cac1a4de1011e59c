"""The one link between the objects of the engine and their displays: a mixin that imports display when asked."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbmerge.display.model import View

_log = logging.getLogger(__name__)


class Displayed:
    """Gives `view()`, `__repr__` and `_repr_html_` to a class that `nbmerge.display.views` knows.

    A view that fails never breaks a cell: text falls back to the class name, HTML to the text.
    """

    __slots__ = ()

    def view(self) -> View:
        """What a notebook shows of the object, as plain data. Reads no tensor data."""
        from nbmerge.display.views import view_of

        return view_of(self)

    def __repr__(self) -> str:
        try:
            from nbmerge.display.text import render_text

            return render_text(self.view())
        except Exception:  # noqa: BLE001 - whatever a view does, the cell must live
            _log.debug("the view of %s failed", type(self).__name__, exc_info=True)
            return f"<{type(self).__module__}.{type(self).__name__}>"

    def _repr_html_(self) -> str | None:
        try:
            from nbmerge.display.html import render_html

            return render_html(self.view())
        except Exception:  # noqa: BLE001 - IPython then shows the text
            _log.debug("the HTML of %s failed", type(self).__name__, exc_info=True)
            return None
