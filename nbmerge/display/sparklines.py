"""Histograms and series as a line of text: `2⁻²⁴ ▁▃█▅▁ 2⁻¹⁹`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_BARS = "▁▂▃▄▅▆▇█"
_NONE = "·"
_SHORT = 4  # exponents below which a power of two is written out
_PLAIN = 4  # the greatest exponent of ten of a number that is written out
_MOST_ULPS = 16  # bars of distances; of more, neighbours are put together
_WIDEST = 12  # powers of two that a histogram shows one by one
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def sparkline(values: Sequence[float]) -> str:
    """A bar for each value, as high as its share of the greatest; `·` for 0, at least the lowest bar for the rest."""
    top = max(values, default=0)
    steps = len(_BARS) - 1
    return "".join(_NONE if value <= 0 else _BARS[round(steps * value / top)] for value in values)


def scientific(value: float) -> str:
    """Three digits, those that are 0 as well: `0.0120`, `4.50×10⁻⁵`; `0` alone is written as one."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits, _, exponent = f"{value:.2e}".partition("e")
    if -_PLAIN < int(exponent) <= _PLAIN:
        return f"{float(f'{digits}e{exponent}'):.{max(2 - int(exponent), 0)}f}"
    return f"{digits}×10{str(int(exponent)).translate(_RAISED)}"


def power_of_two(exponent: int) -> str:
    """`2⁻²⁴`."""
    return "2" + str(exponent).translate(_RAISED)


def magnitude_line(magnitudes: Mapping[int, int]) -> str:
    """A histogram by powers of two, between its least and its greatest: `2⁻²⁴ ▁▃█▅▁ 2⁻¹⁹`; `·` where it is empty.

    A long tail below is put into the first bar: `<2⁻²⁰ ▂▁▃█▅▁ 2⁻¹⁹`.
    """
    if not magnitudes:
        return _NONE
    stop = max(magnitudes) + 1
    low = max(min(magnitudes), stop - _WIDEST)
    below = sum(count for exponent, count in magnitudes.items() if exponent < low)
    bins = [magnitudes.get(exponent, 0) for exponent in range(low, stop)]
    if below:
        return f"<{power_of_two(low)} {sparkline([below, *bins])} {power_of_two(stop)}"
    return f"{power_of_two(low)} {sparkline(bins)} {power_of_two(stop)}"


def ulp_line(ulps: Sequence[int]) -> str:
    """A histogram of distances in units in the last place, from 0 to at most so many: `0 ·█▂ 2`, `0 ·█▃▂▁▁▁ 2⁵`.

    `·` where it is empty. Bins end at 0, 1, 2, 4, 8, …
    """
    if not any(ulps):
        return _NONE
    exponent = len(ulps) - 2
    last = "0" if exponent < 0 else str(2**exponent) if exponent < _SHORT else power_of_two(exponent)
    width = -(-len(ulps) // _MOST_ULPS)
    return f"0 {sparkline([sum(ulps[start : start + width]) for start in range(0, len(ulps), width)])} {last}"
