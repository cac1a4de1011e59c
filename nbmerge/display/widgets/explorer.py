"""What explorers have in common: a live widget, and its static twin, which stays in the saved notebook."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets

from nbmerge.display.fit import fit
from nbmerge.display.html import render_html
from nbmerge.display.model import View
from nbmerge.display.text import render_text
from nbmerge.display.widgets.styles import STYLE
from nbmerge.shown import Displayed

_numbers = itertools.count(1)


class Explorer(Displayed, ABC):
    """A widget that shows a part of an object, as its user chooses.

    widget: the ipywidgets container. In a notebook it comes with its static twin, `view()` as HTML and text: the twin
    is hidden while the widget lives, follows what is chosen, and is what GitHub, an export or an untrusted notebook
    shows.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        # An explorer of an earlier kernel may still be in the notebook, so a number alone is not enough.
        self._twin_class = f"nbm-twin-{id(self):x}-{next(_numbers)}"
        self._twins: list[Any] = []
        self.widget = widgets.VBox([html(STYLE + self._hide_twin()), *parts])
        self.widget.add_class("nbm-explore")

    @abstractmethod
    def view(self) -> View:
        """What is shown now, as plain data."""

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        live = self.widget._repr_mimebundle_()
        return {**live, "text/html": render_html(fit(self.view())), "text/plain": repr(self)}

    def _ipython_display_(self) -> None:
        """Shows the widget and, as an output of its own, the twin: to change that one takes no focus from the other."""
        from IPython.display import display

        view = self.view()
        live = {**self.widget._repr_mimebundle_(), "text/plain": f"{view.title}, as it was last:"}
        display(live, raw=True)
        self._twins.append(display(self._twin(), raw=True, display_id=True))

    def _follow(self) -> None:
        """Brings the twin up to date."""
        for shown in self._twins:
            if shown is not None:  # outside of a shell there is none
                shown.update(self._twin(), raw=True)

    def _twin(self) -> dict[str, str]:
        view = fit(self.view())
        static = f'<div class="{self._twin_class}">{self._hide_empty()}{render_html(view)}</div>'
        return {"text/html": static, "text/plain": render_text(view)}

    def _hide_empty(self) -> str:
        """A style of the twin, so that the output before it is hidden while and where no widget lives in it.

        A notebook that is opened again has no widget any more, and JupyterLab says there that its model was not found.
        """
        before = f".jp-OutputArea-child:has(+.jp-OutputArea-child .{self._twin_class})"
        return f"<style>{before}:not(:has(.nbm-explore)){{display:none}}</style>"

    def _hide_twin(self) -> str:
        """A style of the widget, so that the twin is hidden only while and where there is one."""
        twin = f".{self._twin_class}"
        return f"<style>{twin},.jp-OutputArea-child:has({twin}){{display:none!important}}</style>"


def html(text: str = "", *, width: str = "100%") -> Any:
    """A widget that shows HTML as it is: all that came from a checkpoint must be escaped in it."""
    return widgets.HTML(text, layout=widgets.Layout(width=width, margin="0"))


def bar(*parts: Any) -> Any:
    """Widgets side by side, in several lines where there is no room."""
    box = widgets.HBox(parts, layout=widgets.Layout(flex_flow="row wrap"))
    box.add_class("nbm-bar")
    return box


def labelled(kind: Any, description: str, **traits: Any) -> Any:
    """An input with a description that is as wide as its text."""
    return kind(description=description, style={"description_width": "initial"}, **traits)
