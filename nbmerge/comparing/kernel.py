"""The statistics of one block of a tensor and of its counterpart: the loop that all of a comparison's time goes to.

A block is looked at in pieces that stay in a processor's cache with all that is made of them. Where few elements
changed, only those are taken out and looked at; all others cost one comparison and one scalar product.

Threads help only where numpy lets go of the interpreter's lock: `take(mode="clip")` does and `a[places]` does not,
`einsum` does and `matmul` of short rows does not, `count_nonzero` does for bytes and not for booleans.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nbmerge.comparing.careful import careful
from nbmerge.comparing.elements import is_integer, widened
from nbmerge.comparing.integers import integers
from nbmerge.comparing.scratch import scratch
from nbmerge.comparing.tally import Tally, count_true, counts, distances
from nbmerge.dtypes import DType
from nbmerge.engine.read import Words

PIECE = 2**18  # elements; of fewer, the calls to numpy take longer than what they do
_SPARSE = 0.5  # of the elements: where fewer changed, taking them out is faster than looking at all
_ROW = 256  # products that are added in float32
_NEAR = 1 / 16  # of ‖A‖²: where ‖Δ‖² is less, ‖B‖² and A·B follow from the rest without loss
_LEAST = 2.0**-90  # a sum of squares below which single squares may have been lost to underflow
_MANTISSA = np.uint32(23)  # bits of a float32, below exponent and sign

_Floats = npt.NDArray[np.float32]


class _Unsafe(Exception):
    """Squares overflow or vanish in float32, or something is not finite: the piece goes the careful way."""


def compare(a: Words, b: Words, dtype: DType, tally: Tally) -> None:
    """Adds to the tally what there is to know of a block and its counterpart, both flat and of one dtype.

    Places in the tally are those in the block. The arrays are left as they were.
    """
    few = _Few(dtype, tally)
    with np.errstate(all="ignore"):
        for start in range(0, len(a), PIECE):
            _piece(a[start : start + PIECE], b[start : start + PIECE], dtype, tally, start, few)
        few.finish()


def dot(x: _Floats, y: _Floats) -> float:
    """The scalar product: 256 products at a time in float32, and those sums in float64.

    Errs by at most 256 * 2**-24 of the sum of the products' sizes, in whichever order numpy adds them; in practice, as
    it adds in many lanes, by some 1e-7. The products of 16-bit floats themselves are exact in float32.
    """
    whole = len(x) // _ROW * _ROW
    total = 0.0
    if whole:
        rows = np.einsum("ij,ij->i", x[:whole].reshape(-1, _ROW), y[:whole].reshape(-1, _ROW))
        total = float(rows.sum(dtype=np.float64))
    if whole < len(x):
        total += float((x[whole:].astype(np.float64) * y[whole:]).sum())
    return total


def _piece(a: Words, b: Words, dtype: DType, tally: Tally, start: int, few: _Few) -> None:
    unequal = np.not_equal(a, b, out=scratch("unequal", np.bool_, len(a)))
    changed = count_true(unequal)
    tally.elements += len(a)
    tally.changed += changed
    if not dtype.is_floating:
        if changed and is_integer(dtype):
            places = np.flatnonzero(unequal)
            integers(a[places], b[places], dtype, tally, places + start)
        return
    if dtype.name == "float64":
        careful(a, b, dtype, tally, start)
        return
    try:
        if changed < _SPARSE * len(a):
            few.take(a, b, start, unequal if changed else None)
        else:
            _Moved(a, b, dtype, len(a) - changed).tell(tally, start)
    except _Unsafe:
        careful(a, b, dtype, tally, start)


class _Few:
    """The changed elements of pieces of which most did not change, until they are enough to be looked at together.

    Of short arrays, threads would spend more time on handing over the interpreter's lock than on the elements.
    """

    def __init__(self, dtype: DType, tally: Tally) -> None:
        self._dtype, self._tally = dtype, tally
        self._clear()

    def _clear(self) -> None:
        self._pieces: list[tuple[int, Words, Words, npt.NDArray[np.intp]]] = []
        self._taken: list[tuple[Words, Words]] = []
        self._square, self._count = 0.0, 0

    def take(self, a: Words, b: Words, start: int, unequal: npt.NDArray[np.bool_] | None) -> None:
        """Takes the changed elements of a piece, and the sum of all squares. Raises _Unsafe and takes nothing."""
        square = _norm2(_wide("before", a, self._dtype))
        if unequal is None:
            self._tally.add_products(square, square, square, 0.0, 0.0)
            return
        places = np.flatnonzero(unequal)
        self._square += square
        self._count += len(places)
        self._pieces.append((start, a, b, places))
        self._taken.append((a.take(places, mode="clip"), b.take(places, mode="clip")))
        if self._count >= PIECE:
            self.finish()

    def finish(self) -> None:
        """Looks at what was taken."""
        if not self._pieces:
            return
        a, b = (np.concatenate(parts) for parts in zip(*self._taken, strict=True))
        try:
            found = _Moved(a, b, self._dtype, 0)
            # What did not change may be far smaller than what did: only then is it summed by itself.
            same = self._square - found.aa if 2 * found.aa < self._square else self._unchanged_square()
        except _Unsafe:
            for start, piece_a, piece_b, _ in self._pieces:
                careful(piece_a, piece_b, self._dtype, self._tally, start)
        else:
            found.tell(self._tally, np.concatenate([start + places for start, _, _, places in self._pieces]))
            self._tally.add_products(same, same, same, 0.0, 0.0)
        self._clear()

    def _unchanged_square(self) -> float:
        total = 0.0
        for _, a, _, places in self._pieces:
            rest = _wide("rest", a, self._dtype).copy()
            rest[places] = 0
            total += _norm2(rest)
        return total


class _Moved:
    """Elements of which all, or a good part, changed. Raises _Unsafe before anything is told.

    unchanged: how many did not. All of it lies in this thread's scratch memory, so that there is one of them at a time.
    """

    def __init__(self, a: Words, b: Words, dtype: DType, unchanged: int) -> None:
        self._a, self._b, self._dtype, self._unchanged = a, b, dtype, unchanged
        self._before, self._after = _wide("before", a, dtype), _wide("after", b, dtype)
        self._delta = np.subtract(self._after, self._before, out=scratch("delta", np.float32, len(a)))
        self._products = _products(self._before, self._after, self._delta)
        self.aa = self._products[0]
        shifted = np.right_shift(self._delta.view(np.uint32), _MANTISSA, out=scratch("shifted", np.uint32, len(a)))
        exponents = scratch("exponents", np.uint8, len(a))
        np.copyto(exponents, shifted, casting="same_kind")  # the sign falls off
        self._exponents = counts(exponents)
        self._zeros = self._exponents.pop(0, 0)
        # Equal elements have no difference; where more have the exponent of 0, their other bits tell.
        if self._zeros != unchanged and np.count_nonzero(self._delta) != len(a) - self._zeros:
            raise _Unsafe("differences below the least normal float32")

    def tell(self, tally: Tally, places: Any) -> None:
        """Adds it to the tally. places: theirs, or the first's."""
        tally.add_products(*self._products)
        tally.unmoved += self._zeros - self._unchanged
        for exponent, count in self._exponents.items():
            tally.magnitudes[exponent - 127] += count
        ends = int(self._delta.argmax()), int(self._delta.argmin())
        at = min(ends, key=lambda at: (-abs(self._delta[at]), at))
        if self._delta[at]:
            place = int(places[at]) if isinstance(places, np.ndarray) else places + at
            tally.offer(float(abs(self._delta[at])), place, float(self._before[at]), float(self._after[at]))
        distances(self._a, self._b, self._dtype, tally, self._unchanged)


def _wide(name: str, words: Words, dtype: DType) -> _Floats:
    """The elements as float32, in scratch memory of this name where they are not float32 already."""
    out = None if dtype.name == "float32" else scratch(name, np.float32, len(words))
    return widened(words, dtype, out)


def _products(a: _Floats, b: _Floats, delta: _Floats) -> tuple[float, float, float, float, float]:
    aa, dd, ad = _norm2(a), _norm2(delta), dot(a, delta)
    if dd < _NEAR * aa:
        return aa, aa + 2 * ad + dd, aa + ad, dd, ad
    return aa, _norm2(b), dot(a, b), dd, ad


def _norm2(x: _Floats) -> float:
    """The sum of squares. Raises _Unsafe where float32 has not held it."""
    found = dot(x, x)
    if found < _LEAST and not x.any():
        return 0.0
    if not _LEAST <= found < np.inf:
        raise _Unsafe("squares that float32 does not hold")
    return found
