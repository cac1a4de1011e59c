"""The statistics of elements that float32 does not hold: float64, not finite, or so large or small that squares vanish.

The same numbers as the kernel's, in float64 and slowly. It says what they are.
"""

from __future__ import annotations

import numpy as np

from nbmerge.comparing.elements import Values, as_float64
from nbmerge.comparing.tally import Tally, distances
from nbmerge.dtypes import DType
from nbmerge.engine.read import Words

_INFINITE = 1023  # the exponent under which a difference beyond float64 is counted


def careful(a: Words, b: Words, dtype: DType, tally: Tally, start: int) -> None:
    """Adds all but the number of elements and of changes. start: the place of the first element."""
    before, after = as_float64(a, dtype), as_float64(b, dtype)
    finite_a, finite_b = np.isfinite(before), np.isfinite(after)
    tally.nonfinite_a += len(a) - int(np.count_nonzero(finite_a))
    tally.nonfinite_b += len(b) - int(np.count_nonzero(finite_b))
    finite = finite_a & finite_b
    _add_products(before[finite], after[finite], dtype, tally)
    moved = np.flatnonzero(finite & (a != b))
    if len(moved):
        _add_sizes(before[moved], after[moved], dtype, tally, moved + start)
        distances(a[moved], b[moved], dtype, tally, 0)


def _add_products(before: Values, after: Values, dtype: DType, tally: Tally) -> None:
    exponent = 0
    if dtype.name == "float64" and len(before):  # squares of all smaller types are float64s
        exponent = int(np.frexp(max(np.abs(before).max(), np.abs(after).max()))[1])
        before, after = np.ldexp(before, -exponent), np.ldexp(after, -exponent)
    delta = after - before
    pairs = ((before, before), (after, after), (before, after), (delta, delta), (before, delta))
    tally.add_products(*(float((x * y).sum()) for x, y in pairs), exponent=2 * exponent)


def _add_sizes(before: Values, after: Values, dtype: DType, tally: Tally, places: Values) -> None:
    sizes = np.abs(after - before)
    if dtype.name != "float64":
        narrow = sizes.astype(np.float32)  # as the kernel rounds
        sizes = np.where(np.isfinite(narrow), narrow, sizes)
    tally.unmoved += int(np.count_nonzero(sizes == 0))
    exponents = np.where(np.isinf(sizes), _INFINITE, np.frexp(sizes)[1] - 1)[sizes > 0]
    for exponent, count in zip(*np.unique(exponents, return_counts=True), strict=True):
        tally.magnitudes[int(exponent)] += int(count)
    at = int(sizes.argmax())
    if sizes[at]:
        tally.offer(float(sizes[at]), int(places[at]), float(before[at]), float(after[at]))
