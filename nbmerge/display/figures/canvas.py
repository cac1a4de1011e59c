"""What all figures share: a figure that a notebook shows without pyplot, its themes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nbmerge.display.figures.showing import was_shown
from nbmerge.display.words import elide
from nbmerge.errors import OptionError

_DOTS = 110  # dots an inch, on the page; the image has twice as many for sharp screens
_LIGHT: dict[Any, Any] = {"figure.facecolor": "#ffffff", "axes.facecolor": "#ffffff"}
_DARK: dict[Any, Any] = {"figure.facecolor": "#111111", "axes.facecolor": "#111111", "savefig.facecolor": "#111111"}
HUES = ("#4c8bf5", "#e69600", "#00a078", "#c850a0", "#786edc", "#be783c", "#28a0c8", "#96a028")
BAR = HUES[0]


class Picture(Figure):
    """A matplotlib figure that shows itself in a notebook, also where pyplot was never imported."""

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        """Nothing, but IPython asks for it first whenever it shows an object, whoever makes the image."""
        was_shown(self)
        return {}

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        target = io.BytesIO()
        self.savefig(target, format="png", dpi=2 * _DOTS, facecolor=self.get_facecolor())
        width, height = self.get_size_inches()
        return target.getvalue(), {"width": round(width * _DOTS), "height": round(height * _DOTS)}


@contextmanager
def themed(theme: str | None) -> Iterator[None]:
    """Draws on white or on nearly black; None leaves matplotlib's settings as the user has them. Raises OptionError."""
    if theme not in (None, "light", "dark"):
        raise OptionError(f"theme={theme!r}", fix="light, dark, or None for matplotlib's own settings")
    with matplotlib.rc_context({"text.parse_math": False}):  # a `$` in a name begins no formula
        if theme is not None:
            style, changes = ("default", _LIGHT) if theme == "light" else ("dark_background", _DARK)
            matplotlib.style.use(style)
            matplotlib.rcParams.update({**changes, "text.parse_math": False})
        yield


def picture(width: float, height: float, title: str, *, rows: int = 1, columns: int = 1) -> tuple[Picture, list[Axes]]:
    """A figure of so many inches, with a title and a grid of panels, which come in reading order."""
    made = Picture(figsize=(width, height), layout="constrained")
    panels = [made.add_subplot(rows, columns, number + 1) for number in range(rows * columns)]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    made.suptitle(plain(title, 120), fontsize="medium")
    return made, panels


def plain(text: str, limit: int = 96) -> str:
    """Text that a checkpoint may have chosen, so short that it fits."""
    return elide(text, limit)


def ticks(axis: Any, places: Sequence[float], labels: Sequence[str], **style: Any) -> None:
    """Labels at places of an axis."""
    axis.set_ticks(places, labels=[plain(label, 48) for label in labels], **style)
