"""Histograms as tables with bars, over bins that stay where they are while another part is chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from nbmerge.comparing.statistics import Statistics, greatest_ulps, ulp_bin
from nbmerge.display import words
from nbmerge.display.model import Cell, Column, Section, Table
from nbmerge.display.sparklines import magnitude_line, power_of_two, ulp_line

_MOST = 24  # bins


def magnitude_section(unit: str, magnitudes: Mapping[int, int], within: Mapping[int, int]) -> Section:
    """How many elements lie between which powers of two.

    unit: `|x|`; magnitudes: exponent → elements; within: another histogram, between whose ends the bins lie.
    """
    stop = max(within, default=0) + 1
    low = max(min(within, default=0), stop - _MOST)
    bins = [(f"{power_of_two(k)} to {power_of_two(k + 1)}", magnitudes.get(k, 0)) for k in range(low, stop)]
    if any(exponent < low for exponent in within):
        bins.insert(0, (f"below {power_of_two(low)}", sum(n for k, n in magnitudes.items() if k < low)))
    return _section(unit, magnitude_line(magnitudes), unit, bins if within else [])


def update_sections(found: Statistics, within: Statistics) -> Iterator[Section]:
    """How far the changed elements moved, by powers of two and by units in the last place, over the bins of `within`"""
    yield magnitude_section("|Δ|", found.magnitudes, within.magnitudes)
    if any(within.ulps):
        yield _section("Units in the last place", ulp_line(found.ulps), "units", _ulp_bins(found.ulps, within.ulps))


def _ulp_bins(ulps: Sequence[int], within: Sequence[int]) -> list[tuple[str, int]]:
    """Elements by distance, from the least to the greatest one in `within`; of many bins the lower ones as one."""
    filled = [number for number, count in enumerate(within) if count]
    stop = filled[-1] + 1
    low = max(filled[0], stop - _MOST)
    bins = [(ulp_bin(number), ulps[number] if number < len(ulps) else 0) for number in range(low, stop)]
    if filled[0] < low:
        bins.insert(0, (f"at most {greatest_ulps(low - 1):,}", sum(ulps[:low])))
    return bins


def _section(title: str, line: str, unit: str, bins: Sequence[tuple[str, int]]) -> Section:
    total = sum(count for _, count in bins)
    top = max((count for _, count in bins), default=0) or 1
    rows = tuple(
        (Cell(name), Cell(f"{count:,}"), Cell(words.percent(count, total), bar=count / top)) for name, count in bins
    )
    columns = (Column(unit), Column("elements", number=True), Column("share", number=True))
    return Section(f"Histogram of {title}" if title.startswith("|") else title, line,
                   tables=(Table(columns, rows),), opened=True)  # fmt: skip
