"""Bars over powers of two, and over units in the last place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from nbmerge.display.figures.canvas import ticks
from nbmerge.display.sparklines import power_of_two

_LABELS = 12


def draw_magnitudes(axes: Axes, magnitudes: Mapping[int, int], unit: str, colour: str) -> None:
    """How many elements lie between which powers of two. magnitudes: exponent → elements."""
    _counted(axes)
    axes.set_xlabel(f"{unit}, by powers of two")
    if not magnitudes:
        _nothing(axes)
        return
    low, high = min(magnitudes), max(magnitudes)
    exponents = range(low, high + 1)
    axes.bar(
        [k + 0.5 for k in exponents], [magnitudes.get(k, 0) for k in exponents], width=0.92, color=colour, alpha=0.85
    )  # fmt: skip
    step = -(-(high + 2 - low) // _LABELS)
    places = list(range(low, high + 2, step))
    ticks(axes.xaxis, places, [power_of_two(k) for k in places])


def draw_ulps(axes: Axes, ulps: Sequence[int], colour: str) -> None:
    """How many elements moved by how many units in the last place."""
    _counted(axes)
    axes.set_xlabel("units in the last place, at most")
    if not any(ulps):
        _nothing(axes)
        return
    axes.bar(range(len(ulps)), ulps, width=0.92, color=colour, alpha=0.85)
    step = -(-len(ulps) // _LABELS)
    places = range(0, len(ulps), step)
    ticks(axes.xaxis, places, [_up_to(place) for place in places])


def _up_to(number: int) -> str:
    """The largest distance in bin `number`: 0, 1, 2, 4, 8, …"""
    return str(number) if number <= 2 else power_of_two(number - 1)


def _counted(axes: Axes) -> None:
    axes.set_ylabel("elements")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _nothing(axes: Axes) -> None:
    axes.text(0.5, 0.5, "nothing to count", ha="center", va="center", transform=axes.transAxes)
