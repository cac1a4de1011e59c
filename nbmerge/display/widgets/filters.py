"""Names that a user looks for: words, in any order, with stars for what may stand between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets

from nbmerge.display.widgets.explorer import labelled


def filter_input() -> Any:
    """The input for text, which is also where the focus goes after a click."""
    layout = widgets.Layout(width="280px")
    return labelled(widgets.Text, "Filter", placeholder="q_proj, layers.3.*weight", layout=layout)


def matcher(text: str) -> Callable[[str], bool]:
    """Whether a name, without upper case, has every word of the text."""
    patterns = [word.split("*") for word in text.casefold().split()]
    return lambda name: all(_in_order(name, parts) for parts in patterns)


def _in_order(name: str, parts: Sequence[str]) -> bool:
    """Whether the parts occur in the name, one after the other."""
    start = 0
    for part in parts:
        at = name.find(part, start)
        if at < 0:
            return False
        start = at + len(part)
    return True
