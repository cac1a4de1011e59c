"""What is known of how a tensor changed: counts, histograms and sums that add up in any order to the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# Sums of squares are kept as whole multiples of 2**-FRACTION: the square of the least float64 is 2**-2148, and a sum of
# whole numbers does not depend on the order in which threads add to it.
FRACTION = 2300
_MANTISSA = 53
_NEARLY_PARALLEL = 0.9


def fixed(value: float, exponent: int = 0) -> int:
    """The float value * 2**exponent as a whole multiple of 2**-FRACTION, without rounding."""
    mantissa, power = math.frexp(value)
    return int(math.ldexp(mantissa, _MANTISSA)) << (power - _MANTISSA + exponent + FRACTION)


def quotient(numerator: int, denominator: int) -> float:
    """The quotient of two whole numbers as a float; infinite where no float is so great."""
    try:
        return numerator / denominator
    except OverflowError:
        return math.inf if (numerator > 0) == (denominator > 0) else -math.inf


@dataclass(frozen=True, slots=True)
class Products:
    """Scalar products of a tensor A, its counterpart B, and their difference D = B - A, in units of 2**-FRACTION.

    They run over the elements that are finite in both.
    """

    aa: int = 0
    bb: int = 0
    ab: int = 0
    dd: int = 0
    ad: int = 0

    def __add__(self, other: Products) -> Products:
        return Products(
            self.aa + other.aa, self.bb + other.bb, self.ab + other.ab, self.dd + other.dd, self.ad + other.ad
        )


@dataclass(frozen=True, slots=True)
class Largest:
    """The largest |Δ|: its size, the element's place in the flattened tensor, and the element in A and in B."""

    size: float
    place: int
    before: float
    after: float

    def beats(self, other: Largest | None) -> bool:
        """Whether it is larger than the other, or as large and earlier in row-major order."""
        return other is None or (self.size, -self.place) > (other.size, -other.place)


@dataclass(frozen=True, slots=True)
class Statistics:
    """How a tensor, or several together, changed from A to B.

    elements: that were looked at; changed: those whose bits differ in the dtype of the comparison;
    changed_rounded: those that still differ after rounding to the narrower of two dtypes; None where there is one;
    flips: elements of which the sign turned, neither being zero;
    nonfinite_a, nonfinite_b: elements that are NaN or infinite; those count in `changed` and in nothing below;
    ulps: how many changed elements lie 0, 1, 2, 3–4, 5–8, … units in the last place apart (0: between 0.0 and -0.0);
    magnitudes: exponent k → how many changed elements have 2**k <= |Δ| < 2**(k + 1);
    unmoved: changed elements with |Δ| = 0; products: None for integers, of which only counts and |Δ| are known.

    |Δ| is the difference rounded to float32; of float64 to float64; of integers exact.
    """

    elements: int = 0
    changed: int = 0
    changed_rounded: int | None = None
    flips: int = 0
    nonfinite_a: int = 0
    nonfinite_b: int = 0
    ulps: tuple[int, ...] = ()
    magnitudes: Mapping[int, int] = field(default_factory=dict)
    unmoved: int = 0
    largest: Largest | None = None
    products: Products | None = None

    @property
    def share(self) -> float:
        """Share of the elements that changed, from 0 to 1; 0 where there are none."""
        return self.changed / self.elements if self.elements else 0.0

    @property
    def share_rounded(self) -> float | None:
        """Share of the elements that still differ after rounding to the narrower dtype; None where there is one."""
        if self.changed_rounded is None:
            return None
        return self.changed_rounded / self.elements if self.elements else 0.0

    @property
    def relative_l2(self) -> float | None:
        """‖B - A‖ / ‖A‖. Infinite where A is zero and B is not; None where it is not known."""
        if self.products is None:
            return None
        if not self.products.aa:
            return math.inf if self.products.dd else 0.0
        return math.sqrt(quotient(self.products.dd, self.products.aa))

    @property
    def update_norm(self) -> float | None:
        """‖B - A‖."""
        return None if self.products is None else _root(self.products.dd)

    @property
    def cosine(self) -> float | None:
        """The cosine between A and B, flattened; None where it is not known or one of them is zero."""
        if self.products is None or not self.products.aa or not self.products.bb:
            return None
        found = _cosine(self.products.ab, self.products.aa, self.products.bb)
        return found if found < _NEARLY_PARALLEL else 1 - (self.one_minus_cosine or 0.0)

    @property
    def one_minus_cosine(self) -> float | None:
        """1 - cosine, with its leading digits also where the cosine rounds to 1."""
        if self.products is None or not self.products.aa or not self.products.bb:
            return None
        p = self.products
        cosine = _cosine(p.ab, p.aa, p.bb)
        if cosine < _NEARLY_PARALLEL:
            return 1 - cosine
        # sin² = (|A|²|D|² - (A·D)²) / (|A|²|B|²) takes no difference of numbers that are nearly equal.
        sine2 = quotient(max(p.aa * p.dd - p.ad * p.ad, 0), p.aa * p.bb)
        return sine2 / (1 + math.sqrt(max(1 - sine2, 0.0)))


def combined(parts: Iterable[Statistics]) -> Statistics:
    """The statistics of several tensors together, as if they were one. `largest` then is in one of them."""
    every = list(parts)
    magnitudes: Counter[int] = Counter()
    ulps = [0] * max((len(one.ulps) for one in every), default=0)
    products: Products | None = None
    largest: Largest | None = None
    for one in every:
        magnitudes.update(one.magnitudes)
        for number, count in enumerate(one.ulps):
            ulps[number] += count
        if one.products is not None:
            products = one.products if products is None else products + one.products
        if one.largest is not None and (largest is None or one.largest.size > largest.size):
            largest = one.largest
    rounded = [one.changed if one.changed_rounded is None else one.changed_rounded for one in every]
    return Statistics(
        elements=sum(one.elements for one in every),
        changed=sum(one.changed for one in every),
        changed_rounded=sum(rounded) if any(one.changed_rounded is not None for one in every) else None,
        flips=sum(one.flips for one in every),
        nonfinite_a=sum(one.nonfinite_a for one in every),
        nonfinite_b=sum(one.nonfinite_b for one in every),
        ulps=tuple(ulps),
        magnitudes=dict(sorted(magnitudes.items())),
        unmoved=sum(one.unmoved for one in every),
        largest=largest,
        products=products,
    )


def ulp_bin(number: int) -> str:
    """What bin `number` of `Statistics.ulps` holds: `0`, `1`, `2`, `3–4`, `5–8`, …"""
    if number <= 2:
        return str(number)
    return f"{greatest_ulps(number - 1) + 1:,}–{greatest_ulps(number):,}"


def greatest_ulps(number: int) -> int:
    """The greatest distance that bin `number` of `Statistics.ulps` holds."""
    return 2 ** (number - 1) if number else 0


def _cosine(ab: int, aa: int, bb: int) -> float:
    square = quotient(ab * ab, aa * bb)
    return math.sqrt(min(square, 1.0)) * (1 if ab >= 0 else -1)


def _root(value: int) -> float:
    """The square root of a sum in units of 2**-FRACTION; no overflow where only the square is too great."""
    return quotient(math.isqrt(value), 1 << (FRACTION // 2))
