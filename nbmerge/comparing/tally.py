"""Counts and sums while they grow: a tally for each block, added to the tally of its tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from nbmerge.comparing.elements import sign_bit
from nbmerge.comparing.scratch import scratch
from nbmerge.comparing.statistics import Largest, Products, Statistics, fixed
from nbmerge.dtypes import DType
from nbmerge.engine.read import Words

_BYTE = 256


class Tally:
    """What `Statistics` says, not finished. Adding tallies gives the same in any order."""

    def __init__(self) -> None:
        self.elements = self.changed = self.rounded = self.flips = self.nonfinite_a = self.nonfinite_b = 0
        self.unmoved = 0
        self.ulps: Counter[int] = Counter()
        self.magnitudes: Counter[int] = Counter()
        self.largest: Largest | None = None
        self._products = [0, 0, 0, 0, 0]
        self._floating = False

    def add_products(self, aa: float, bb: float, ab: float, dd: float, ad: float, *, exponent: int = 0) -> None:
        """Adds scalar products, each times 2**exponent, in the order of `Products`."""
        self._floating = True
        for number, value in enumerate((aa, bb, ab, dd, ad)):
            if value:
                self._products[number] += fixed(value, exponent)

    def offer(self, size: float, place: int, before: float, after: float) -> None:
        """A candidate for the largest |Δ|."""
        if self.largest is None or (size, -place) > (self.largest.size, -self.largest.place):
            self.largest = Largest(size, place, before, after)

    def add(self, other: Tally) -> None:
        """Adds all of another tally, whose places are those of this one's tensor."""
        for name in ("elements", "changed", "rounded", "flips", "nonfinite_a", "nonfinite_b", "unmoved"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.ulps.update(other.ulps)
        self.magnitudes.update(other.magnitudes)
        if other.largest is not None and other.largest.beats(self.largest):
            self.largest = other.largest
        self._products = [a + b for a, b in zip(self._products, other._products, strict=True)]
        self._floating |= other._floating

    def statistics(self, *, floating: bool, has_narrower: bool) -> Statistics:
        """What it came to. floating: whether the dtype has scalar products; has_narrower: whether there are two."""
        last = max((number for number, count in self.ulps.items() if count), default=-1)
        return Statistics(
            elements=self.elements,
            changed=self.changed,
            changed_rounded=self.rounded if has_narrower else None,
            flips=self.flips,
            nonfinite_a=self.nonfinite_a,
            nonfinite_b=self.nonfinite_b,
            ulps=tuple(self.ulps[number] for number in range(last + 1)),
            magnitudes={number: count for number, count in sorted(self.magnitudes.items()) if count},
            unmoved=self.unmoved,
            largest=self.largest,
            products=Products(*self._products) if floating else None,
        )


def counts(values: npt.NDArray[np.uint8]) -> dict[int, int]:
    """Every value that occurs, and how often. torch counts without the interpreter's lock, and numpy with it."""
    import torch

    found = torch.bincount(torch.from_numpy(values)).tolist()
    return {value: count for value, count in enumerate(found) if count}


def count_true(flags: npt.NDArray[np.bool_]) -> int:
    """How many are true. As bytes, of which numpy counts those that are not 0 without the interpreter's lock."""
    return int(np.count_nonzero(flags.view(np.uint8)))


def distances(a: Words, b: Words, dtype: DType, tally: Tally, unchanged: int) -> None:
    """Adds sign flips and the histogram of distances in units in the last place. All elements are finite.

    Bit patterns of floats are sign and magnitude; neighbouring values of one sign have neighbouring magnitudes, so the
    distance is the difference of magnitudes, and across zero their sum. unchanged: how many elements are equal.
    """
    sign = a.dtype.type(sign_bit(dtype))
    apart = np.maximum(a, b, out=scratch(f"apart{a.itemsize}", a.dtype, len(a)))
    other = np.minimum(a, b, out=scratch(f"other{a.itemsize}", a.dtype, len(a)))
    apart -= other
    if sign:
        np.bitwise_xor(a, b, out=other)
        flips = np.greater_equal(other, sign, out=scratch("flips", np.bool_, len(a)))
        if count_true(flips):
            across = np.flatnonzero(flips)
            below = a.dtype.type(int(sign) - 1)
            of_a, of_b = a[across] & below, b[across] & below
            apart[across] = of_a + of_b
            tally.flips += int(np.count_nonzero((of_a != 0) & (of_b != 0)))
    for number, count in _bins(apart).items():
        tally.ulps[number] += count
    tally.ulps[0] -= unchanged


def _bins(apart: Words) -> Mapping[int, int]:
    """The bins 0, 1, 2, 3–4, 5–8, … with their counts: a distance over 0 is in bin 1 + (the bits of distance - 1)."""
    bins: Counter[int] = Counter()
    if not len(apart) or apart.max() < _BYTE:
        narrow = scratch("narrow", np.uint8, len(apart))
        np.copyto(narrow, apart, casting="same_kind")
        for distance, count in counts(narrow).items():
            bins[_bin(distance)] += count
        return bins
    one = apart.dtype.type(1)
    bins[0] = len(apart) - int(np.count_nonzero(apart))
    np.maximum(apart, one, out=apart)
    apart -= one
    bins.update({1 + bits: count for bits, count in counts(bit_lengths(apart)).items()})
    bins[1] -= bins[0]
    return bins


def _bin(distance: int) -> int:
    return 1 + (distance - 1).bit_length() if distance else 0


def bit_lengths(values: Words) -> npt.NDArray[np.uint8]:
    """The bits that each number takes, as `int.bit_length`: the exponent of the number as a float."""
    if values.itemsize >= 4:
        # Without the bit below the leading one, no rounding to a float reaches the next power of two.
        values = values & ~(values >> values.dtype.type(1))
    lengths: npt.NDArray[np.uint8] = scratch("lengths", np.uint8, len(values))
    if values.itemsize == 8:
        exponents = (values.astype(np.float64).view(np.uint64) >> np.uint64(52)).astype(np.int64)
        np.copyto(lengths, np.maximum(exponents, 1022) - 1022, casting="unsafe")
        return lengths
    floats = scratch("floats", np.float32, len(values))
    np.copyto(floats, values)
    bits = floats.view(np.uint32)
    np.right_shift(bits, np.uint32(23), out=bits)
    np.copyto(lengths, bits, casting="same_kind")
    np.maximum(lengths, np.uint8(126), out=lengths)
    np.subtract(lengths, np.uint8(126), out=lengths)
    return lengths
