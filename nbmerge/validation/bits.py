"""What the bits of floating elements say of them: NaN, infinity, zero, denormal. Counted a block at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbmerge.engine.read import Words
from nbmerge.geometry import Box, Shape

_PART = 2**17  # elements: what is made of them is not so large that the system would give new memory for each
_SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


@dataclass(frozen=True, slots=True)
class Format:
    """What the bits of a floating dtype mean. Without the sign, they are integers in the order of the values.

    mask: the bits of the magnitude; normal: the smallest normal one, 0 where the dtype has no smaller ones and no zero;
    largest: the largest finite one; infinity: None where the dtype has none; nan: the first that is NaN.
    """

    mask: int
    normal: int
    largest: int
    infinity: int | None
    nan: int


def _ieee(bits: int, mantissa: int) -> Format:
    mask = 2 ** (bits - 1) - 1
    infinity = mask >> mantissa << mantissa
    return Format(mask, 1 << mantissa, infinity - 1, infinity, infinity + 1)


FORMATS: Mapping[str, Format] = {
    "float64": _ieee(64, 52),
    "float32": _ieee(32, 23),
    "float16": _ieee(16, 10),
    "bfloat16": _ieee(16, 7),
    "float8_e5m2": _ieee(8, 2),
    # OCP 8-bit floating point: all ones is NaN, and there is no infinity.
    "float8_e4m3fn": Format(0x7F, 0x08, 0x7E, None, 0x7F),
    # OCP microscaling: powers of two without a sign, and without zero.
    "float8_e8m0fnu": Format(0xFF, 0x00, 0xFE, None, 0xFF),
}


@dataclass(slots=True)
class Counts:
    """What the elements of a tensor, or of a block of it, are. word: the one that all hold, None where they differ.

    first_nan, first_infinity: the index of the first one in row-major order.
    """

    elements: int = 0
    nan: int = 0
    infinity: int = 0
    zero: int = 0
    denormal: int = 0
    largest: int = 0
    word: int | None = None
    first_nan: Shape | None = None
    first_infinity: Shape | None = None

    def add(self, other: Counts) -> None:
        """Takes in those of another block of the same tensor. Blocks may come in any order."""
        self.word = other.word if not self.elements or self.word == other.word else None
        for name in ("elements", "nan", "infinity", "zero", "denormal", "largest"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.first_nan = _earlier(self.first_nan, other.first_nan)
        self.first_infinity = _earlier(self.first_infinity, other.first_infinity)


def _earlier(a: Shape | None, b: Shape | None) -> Shape | None:
    return min(a, b) if a is not None and b is not None else a if b is None else b


def count(words: Words, form: Format, region: Box) -> Counts:
    """What the elements of the block `region` are. words: its elements, not empty."""
    flat = words.reshape(-1)
    signed = flat.view(_SIGNED[flat.itemsize])
    # Smallest and largest of both signs, by four passes that neither write nor allocate. Most blocks need no more.
    lowest, highest = int(flat.min()), int(flat.max())
    smallest = min(lowest & form.mask, int(signed.min()) & form.mask)
    largest = max(highest & form.mask, int(signed.max()) & form.mask)
    found = Counts(flat.size, word=lowest if lowest == highest else None)
    if smallest >= form.normal and largest < form.largest:
        return found
    mask = flat.dtype.type(form.mask)
    if smallest < form.normal:
        found.zero, found.denormal = _small(flat, mask, form.normal)
    if largest >= form.largest:
        magnitudes = flat & mask
        found.largest = int(np.count_nonzero(magnitudes == form.largest))
        found.nan, found.first_nan = _where(magnitudes >= form.nan, region)
        if form.infinity is not None:
            found.infinity, found.first_infinity = _where(magnitudes == form.infinity, region)
    return found


def _small(flat: Words, mask: np.unsignedinteger[Any], normal: int) -> tuple[int, int]:
    """How many elements are zero, and how many denormal. Common in float16 and in 8 bits, so it is quick."""
    zero = below = 0
    for start in range(0, flat.size, _PART):
        magnitudes = flat[start : start + _PART] & mask
        zero += magnitudes.size - int(np.count_nonzero(magnitudes))
        below += int(np.count_nonzero(magnitudes < normal))
    return zero, below - zero


def _where(found: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], region: Box) -> tuple[int, Shape | None]:
    """How many there are in the block, and the index in the tensor of the first."""
    total = int(np.count_nonzero(found))
    if not total:
        return 0, None
    inside = np.unravel_index(int(found.argmax()), region.shape)
    return total, tuple(int(i) + start for i, start in zip(inside, region.offset, strict=True))
