"""The one link between the objects of the engine and their displays: mixins that import display when asked."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from nbmerge.errors import NotSupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nbmerge.display.model import View
    from nbmerge.display.widgets.explorer import Explorer

_log = logging.getLogger(__name__)


def _is_frozen(shown: object) -> bool:
    """Whether the object stays as it is, so that what is shown of it does too."""
    parameters = getattr(type(shown), "__dataclass_params__", None)
    return parameters is not None and parameters.frozen and hasattr(shown, "__dict__")


class Displayed:
    """Gives `view()`, `__repr__` and `_repr_html_` to a class that `nbmerge.display.views` knows.

    A view that fails never breaks a cell: text falls back to the class name, HTML to the text.
    """

    __slots__ = ()

    def view(self) -> View:
        """What a notebook shows of the object, as plain data. Reads no tensor data."""
        from nbmerge.display.views import view_of

        if not _is_frozen(self):
            return view_of(self)
        if "_view" not in self.__dict__:  # IPython asks for text and for HTML, of every object that it shows
            self.__dict__["_view"] = view_of(self)
        made: View = self.__dict__["_view"]
        return made

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


class Plotted:
    """Gives `plot()` to a class that `nbmerge.display.figures` knows."""

    __slots__ = ()

    def plot(self, kind: str | None = None, *, theme: str | None = None) -> Figure:
        """A matplotlib figure of the object, for those who would rather look than read. Reads no tensor data.

        A notebook shows it once, at the end of the cell at the latest, also with a semicolon or where it is assigned.

        kind: one of the figures that the class has, the first by default; theme: `light` or `dark`; None draws with
        matplotlib's own settings. Raises OptionError, and NotSupportedError where matplotlib is not installed.
        """
        try:
            from nbmerge.display.figures import figure_of
        except ModuleNotFoundError as error:
            raise NotSupportedError("figures need matplotlib", fix="pip install matplotlib") from error
        return figure_of(self, kind, theme=theme)


class Explored:
    """Gives `explore()` to a class that `nbmerge.display.widgets` knows."""

    __slots__ = ()

    def explore(self) -> Explorer:
        """Widgets to look around in the object, for mouse and keyboard; a static twin stays in the saved notebook.

        Reads tensor data only where a button says so. Raises NotSupportedError where ipywidgets is not installed.
        """
        try:
            from nbmerge.display.widgets import explorer_of
        except ModuleNotFoundError as error:
            raise NotSupportedError("explorers need ipywidgets", fix="pip install ipywidgets") from error
        return explorer_of(self)
