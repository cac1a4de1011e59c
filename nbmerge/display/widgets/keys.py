"""Arrow keys for choosers that are no inputs: a list of rows, a dropdown, a slider.

JupyterLab keeps every key for its own shortcuts (arrows go to another cell, `d d` deletes one) unless the element with
the focus is an input for text or a number. So a number field that nobody sees stands beside each chooser: Tab comes to
it in place of the chooser, and its steps up and down are the chooser's. After a click the focus goes to the explorer's
input for text, where no key does harm: ipywidgets can give it to that, and cannot to a number field.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import ipywidgets as widgets

_MOST = 50  # steps at once, of a key that is held; more are digits that somebody typed
_LATE = 2.0  # seconds after a click, when its user may be elsewhere


class Keys:
    """Steps up and down, by the keyboard.

    label: what a screen reader says; step: called with the number of steps, positive for those along `upward`, which
    is 1 where Up goes to a higher number, as on a slider, and -1 where it goes to an earlier row; home: the input for
    text.
    """

    def __init__(self, label: str, step: Callable[[int], None], home: Any, *, upward: int = -1) -> None:
        self._step, self._home, self._upward = step, home, upward
        self._stepping = False
        self.field = widgets.IntText(description=f"{label}: arrow keys, up and down")
        self.field.add_class("nbm-keys")
        self.field.observe(self._on_value, "value")

    def around(self, *parts: Any) -> Any:
        """A box of what the keys move, which shows where they are."""
        box = widgets.Box([*parts, self.field])
        box.add_class("nbm-keyed")
        return box

    def leave(self) -> None:
        """Gives the focus to the input for text, where it is a click that is being handled."""
        if not self._stepping and _clicked_now():
            self._home.focus()

    def _on_value(self, change: Any) -> None:
        steps = change["new"] - change["old"]
        if abs(steps) > _MOST:
            return
        self._stepping = True
        try:
            self._step(steps * self._upward)
        finally:
            self._stepping = False


def keyed(chooser: Any, label: str, home: Any, *, upward: int = -1) -> Any:
    """The dropdown or slider in a box with its keys."""

    def step(steps: int) -> None:
        chooser.index = min(max(chooser.index + steps, 0), len(chooser.options) - 1)

    keys = Keys(label, step, home, upward=upward)
    chooser.tabbable = False
    chooser.observe(lambda _: keys.leave(), "index")
    return keys.around(chooser)


def _clicked_now() -> bool:
    """Whether a message of a widget is being handled that the browser sent just now, and no cell or an old message."""
    from IPython import get_ipython

    kernel: Any = getattr(get_ipython(), "kernel", None)
    if not hasattr(kernel, "get_parent"):
        return False
    header = kernel.get_parent().get("header", {})
    sent = header.get("date")
    if header.get("msg_type") != "comm_msg" or not isinstance(sent, datetime):
        return False
    return abs((datetime.now(timezone.utc) - sent.astimezone(timezone.utc)).total_seconds()) < _LATE
