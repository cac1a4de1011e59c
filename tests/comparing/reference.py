"""The statistics of a comparison from their definitions, with torch and Python numbers: slow, not the kernel's way."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch

_FLOATS = ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
FLOATS = tuple(name for name in _FLOATS if hasattr(torch, name))  # torch 2.6 has no float8_e8m0fnu
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "bool")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Reference:
    """What `nbmerge.comparing.statistics.Statistics` should say."""

    elements: int
    changed: int
    flips: int
    nonfinite_a: int
    nonfinite_b: int
    ulps: dict[int, int]
    magnitudes: dict[int, int]
    unmoved: int
    largest: tuple[float, int] | None
    aa: float
    bb: float
    ab: float
    dd: float


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The elements' bits as signed integers of their size."""
    return tensor.contiguous().reshape(-1).view(_BITS[tensor.element_size()])


def reference(a: torch.Tensor, b: torch.Tensor) -> Reference:
    """Statistics of two tensors of one floating or integer dtype, element by element."""
    differ = (bits_of(a) != bits_of(b)).tolist()
    if a.dtype.is_floating_point:
        return _of_floats(a.reshape(-1), b.reshape(-1), differ)
    x, y = (tensor.reshape(-1).to(torch.int64).tolist() for tensor in (a, b))
    sizes = [(abs(q - p), i) for i, (p, q) in enumerate(zip(x, y, strict=True)) if p != q]
    magnitudes = Counter(size.bit_length() - 1 for size, _ in sizes)
    largest = max(sizes, key=lambda found: (found[0], -found[1]), default=None)
    return Reference(len(x), sum(differ), 0, 0, 0, {}, magnitudes, 0, largest, 0, 0, 0, 0)


def _of_floats(a: torch.Tensor, b: torch.Tensor, differ: list[bool]) -> Reference:
    x, y = a.to(torch.float64).tolist(), b.to(torch.float64).tolist()
    steps_a, steps_b = _steps(a), _steps(b)
    made = Reference(len(x), sum(differ), 0, 0, 0, Counter(), Counter(), 0, None, 0, 0, 0, 0)
    products: list[tuple[float, ...]] = []
    for place, (p, q) in enumerate(zip(x, y, strict=True)):
        made.nonfinite_a += not math.isfinite(p)
        made.nonfinite_b += not math.isfinite(q)
        if not (math.isfinite(p) and math.isfinite(q)):
            continue
        products.append((p * p, q * q, p * q, (q - p) ** 2))
        if not differ[place]:
            continue
        made.flips += p * q < 0 or (p < 0 < q) or (q < 0 < p)
        made.ulps[_bin(abs(steps_a[place] - steps_b[place]))] += 1
        size = _size(p, q, a.dtype)
        made.unmoved += size == 0
        if size:
            made.magnitudes[math.frexp(size)[1] - 1] += 1
            if made.largest is None or size > made.largest[0]:
                made.largest = (size, place)
    made.aa, made.bb, made.ab, made.dd = (
        (math.fsum(column) for column in zip(*products, strict=True)) if products else (0,) * 4
    )
    return made


def _size(p: float, q: float, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return abs(q - p)
    narrow = float(torch.tensor(q, dtype=torch.float32) - torch.tensor(p, dtype=torch.float32))
    return abs(narrow) if math.isfinite(narrow) else abs(q - p)


def _steps(tensor: torch.Tensor) -> list[int]:
    """The number of each value when all values of the dtype are counted up from 0."""
    width = 8 * tensor.element_size()
    found = []
    for bits in bits_of(tensor).tolist():
        word = bits % (1 << width)
        if tensor.dtype == getattr(torch, "float8_e8m0fnu", None):
            found.append(word)
            continue
        magnitude = word % (1 << (width - 1))
        found.append(-magnitude if word >> (width - 1) else magnitude)
    return found


def _bin(distance: int) -> int:
    """0, 1, 2, 3–4, 5–8, …"""
    bounds = [0, 1, 2]
    while bounds[-1] < distance:
        bounds.append(2 * bounds[-1])
    return next(number for number, bound in enumerate(bounds) if distance <= bound)
