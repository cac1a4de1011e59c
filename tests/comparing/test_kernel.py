"""The kernel against definitions, over dtypes, piece sizes, shares of change, and values that float32 does not hold."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nbmerge.comparing import kernel
from nbmerge.comparing.elements import common_dtype, converted, rounded
from nbmerge.comparing.kernel import compare
from nbmerge.comparing.statistics import FRACTION, Statistics, combined, fixed, quotient, ulp_bin
from nbmerge.comparing.tally import Tally, bit_lengths, counts
from nbmerge.dtypes import BY_NAME
from nbmerge.engine.read import from_torch
from tests.comparing.reference import FLOATS, INTEGERS, bits_of, reference


def measured(a: torch.Tensor, b: torch.Tensor) -> Statistics:
    dtype = BY_NAME[str(a.dtype).removeprefix("torch.")]
    tally = Tally()
    x, y = from_torch(a, dtype).reshape(-1).copy(), from_torch(b, dtype).reshape(-1).copy()
    kept = x.copy(), y.copy()
    compare(x, y, dtype, tally)
    assert np.array_equal(x, kept[0])
    assert np.array_equal(y, kept[1])
    return tally.statistics(floating=dtype.is_floating, has_narrower=False)


def assert_matches(found: Statistics, a: torch.Tensor, b: torch.Tensor) -> None:
    want = reference(a, b)
    for name in ("elements", "changed", "flips", "nonfinite_a", "nonfinite_b", "unmoved"):
        assert getattr(found, name) == getattr(want, name), name
    assert {k: n for k, n in enumerate(found.ulps) if n} == dict(want.ulps)
    assert dict(found.magnitudes) == dict(want.magnitudes)
    assert (None if found.largest is None else (found.largest.size, found.largest.place)) == want.largest
    if not a.dtype.is_floating_point:
        assert found.products is None
        return
    assert found.products is not None
    scale = math.sqrt(want.aa) * math.sqrt(want.bb)
    for name in ("aa", "bb", "dd"):
        got = quotient(getattr(found.products, name), 1 << FRACTION)
        assert got == pytest.approx(getattr(want, name), rel=4e-6), name
    assert quotient(found.products.ab, 1 << FRACTION) == pytest.approx(want.ab, abs=4e-6 * scale)


def any_bits(size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Elements of any bits: NaNs, infinities, subnormals and all."""
    rng = np.random.default_rng(seed)
    itemsize = torch.empty(0, dtype=dtype).element_size()
    raw = torch.from_numpy(rng.integers(0, 256, size * itemsize, dtype=np.uint8))
    return (raw % 2).bool() if dtype == torch.bool else raw.view(dtype)


def weights_like(size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Elements as a trained model has them."""
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal(size) / 32)
    return values.to(dtype)


def changed(a: torch.Tensor, share: float, most: int, seed: int) -> torch.Tensor:
    """A copy in which a share of the elements have up to `most` added to their bits."""
    if a.dtype == torch.bool:
        return a ^ torch.from_numpy(np.random.default_rng(seed).random(a.numel()) < share)
    rng = np.random.default_rng(seed)
    bits = bits_of(a).clone()
    where = torch.from_numpy(rng.random(len(bits)) < share)
    bits[where] += torch.from_numpy(rng.integers(1, most + 1, int(where.sum()))).to(bits.dtype)
    return bits.view(a.dtype)


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(FLOATS + INTEGERS), size=st.integers(1, 700), share=st.sampled_from([0, 0.01, 0.2, 0.6, 1]),
    most=st.sampled_from([1, 2, 100]), seed=st.integers(0, 2**20), wild=st.booleans(),
    piece=st.sampled_from([7, 256, 600]),
)  # fmt: skip
def test_every_statistic_is_what_its_definition_says(
    name: str, size: int, share: float, most: int, seed: int, wild: bool, piece: int
) -> None:
    dtype = getattr(torch, name)
    a = (
        any_bits(size, dtype, seed)
        if (wild and name != "float64") or name in INTEGERS
        else weights_like(size, dtype, seed)
    )
    b = changed(a, share, most, seed + 1)
    before, kernel.PIECE = kernel.PIECE, piece
    try:
        assert_matches(measured(a, b), a, b)
    finally:
        kernel.PIECE = before


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from([n for n in FLOATS if n != "float64"]), seed=st.integers(0, 2**20))
def test_two_tensors_of_any_bits_compare(name: str, seed: int) -> None:
    a, b = any_bits(400, getattr(torch, name), seed), any_bits(400, getattr(torch, name), seed + 1)
    assert_matches(measured(a, b), a, b)


@pytest.mark.parametrize("scale", [2.0**-140, 2.0**-75, 2.0**-46, 1.0, 2.0**63, 2.0**120])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_squares_that_float32_does_not_hold(name: str, share: float, scale: float) -> None:
    a = (torch.randn(600, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * scale).to(
        getattr(torch, name)
    )
    b = changed(a, share, 3, 5)
    assert_matches(measured(a, b), a, b)


def test_float64_squares_beyond_float64() -> None:
    a = torch.tensor([1e300, -2e200, 3e-300], dtype=torch.float64)
    found = measured(a, a * (1 + 2.0**-20))
    assert found.relative_l2 == pytest.approx(2.0**-20)
    assert found.one_minus_cosine == pytest.approx(0, abs=1e-15)


def test_signed_zeros_change_bits_and_move_nothing() -> None:
    found = measured(torch.tensor([0.0, -0.0, 1.0]), torch.tensor([-0.0, 0.0, 1.0]))
    assert (found.changed, found.unmoved, found.flips, found.ulps, found.largest) == (2, 2, 0, (2,), None)
    assert (found.relative_l2, found.cosine) == (0.0, 1.0)


def test_a_nan_that_stays_is_unchanged_and_spoils_nothing() -> None:
    a = torch.tensor([math.nan, 1.0, math.inf, 3.0])
    b = torch.tensor([math.nan, 2.0, math.inf, math.nan])
    found = measured(a, b)
    assert (found.changed, found.nonfinite_a, found.nonfinite_b, found.ulps) == (2, 2, 3, measured(a[1:2], b[1:2]).ulps)
    assert found.relative_l2 == 1.0


def test_the_first_of_equal_largest_changes_is_named() -> None:
    a = torch.zeros(10_000)
    b = a.clone()
    b[[4000, 7000, 9999]] = -0.5
    found = measured(a, b)
    assert found.largest is not None
    assert (found.largest.place, found.largest.before, found.largest.after) == (4000, 0.0, -0.5)


def test_an_outlier_taken_away_leaves_an_exact_rest() -> None:
    a = torch.full((1000,), 2.0**-12)
    b = a.clone()
    a[17] = 2.0**30
    b[17] = 0
    found = measured(a, b)
    assert found.products is not None
    assert quotient(found.products.bb, 1 << FRACTION) == pytest.approx(999 * 2.0**-24, rel=1e-6)


def test_a_tiny_angle_keeps_its_digits() -> None:
    rng = np.random.default_rng(0)
    a = torch.from_numpy(rng.standard_normal(4096))
    step = torch.from_numpy(rng.standard_normal(4096)) * 1e-9
    found = measured(a, a + step)
    along = (a @ step) ** 2 / (a @ a)
    assert found.one_minus_cosine == pytest.approx(float((step @ step - along) / (a @ a) / 2), rel=1e-4)
    assert found.cosine == 1.0


def test_opposite_tensors_have_cosine_minus_one() -> None:
    a = weights_like(500, torch.float32, 1)
    found = measured(a, -a)
    assert (found.flips, found.relative_l2) == (500, pytest.approx(2.0))
    assert found.cosine == pytest.approx(-1.0)
    assert found.update_norm == pytest.approx(2 * float(a.double().norm()), rel=1e-6)


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 1000), max_size=5), seed=st.integers(0, 1000), order=st.randoms())
def test_tallies_add_up_to_the_same_in_any_order(cuts: list[int], seed: int, order: Any) -> None:
    a = weights_like(1000, torch.float32, seed)
    b = changed(a, 0.3, 1000, seed)
    bounds = [0, *sorted(cuts), 1000]
    results = []
    for _ in range(2):
        tallies = []
        for start, stop in pairwise(bounds):
            tally = Tally()
            compare(from_torch(a[start:stop], BY_NAME["float32"]), from_torch(b[start:stop], BY_NAME["float32"]),
                    BY_NAME["float32"], tally)  # fmt: skip
            if tally.largest is not None:
                tally.offer(tally.largest.size, tally.largest.place, tally.largest.before, tally.largest.after)
            tallies.append(tally)
        order.shuffle(tallies)
        total = Tally()
        for tally in tallies:
            total.add(tally)
        results.append(total.statistics(floating=True, has_narrower=False))
    assert results[0].products == results[1].products
    assert results[0].ulps == results[1].ulps
    assert results[0].magnitudes == results[1].magnitudes


@given(value=st.floats(allow_nan=False, allow_infinity=False), exponent=st.integers(-500, 500))
def test_fixed_sums_do_not_round(value: float, exponent: int) -> None:
    from fractions import Fraction

    assert Fraction(fixed(value, exponent), 1 << FRACTION) == Fraction(value) * Fraction(2) ** exponent


@given(st.lists(st.integers(0, 2**64 - 1)), st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64]))
def test_bit_lengths_are_pythons(values: list[int], kind: Any) -> None:
    kept = [value % (1 << (8 * np.dtype(kind).itemsize)) for value in values]
    assert bit_lengths(np.array(kept, dtype=kind)).tolist() == [value.bit_length() for value in kept]


@given(st.lists(st.integers(0, 255)))
def test_counts_are_a_bincount(values: list[int]) -> None:
    found = np.bincount(np.array(values, dtype=np.int64))
    assert dict(counts(np.array(values, dtype=np.uint8))) == {i: int(n) for i, n in enumerate(found) if n}


def test_bins_are_named_by_their_distances() -> None:
    assert [ulp_bin(number) for number in range(6)] == ["0", "1", "2", "3–4", "5–8", "9–16"]
    assert ulp_bin(12) == "1,025–2,048"


def test_statistics_of_two_halves_are_those_of_the_whole() -> None:
    a = weights_like(2000, torch.bfloat16, 3)
    b = changed(a, 0.4, 5, 4)
    halves = combined([measured(a[:1000], b[:1000]), measured(a[1000:], b[1000:])])
    whole = measured(a, b)
    assert (halves.ulps, halves.magnitudes, halves.changed) == (whole.ulps, whole.magnitudes, whole.changed)
    assert halves.relative_l2 == pytest.approx(whole.relative_l2, rel=1e-6)


_WIDER = [("bfloat16", "float32"), ("float16", "float32"), ("float8_e4m3fn", "bfloat16"), ("float8_e5m2", "float16"),
          ("float32", "float64"), ("float8_e8m0fnu", "bfloat16")]  # fmt: skip
_WIDER = [(narrow, wide) for narrow, wide in _WIDER if hasattr(torch, narrow)]


@pytest.mark.parametrize(("narrow", "wide"), _WIDER)
def test_widening_is_exact(narrow: str, wide: str) -> None:
    a = any_bits(3000, getattr(torch, narrow), 1)
    words = a.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.itemsize])
    a = words[torch.isfinite(a.to(torch.float64))].view(a.dtype)  # torch 2.6 picks no elements of 8-bit floats
    assert common_dtype(BY_NAME[narrow], BY_NAME[wide]) is common_dtype(BY_NAME[wide], BY_NAME[narrow])
    assert common_dtype(BY_NAME[narrow], BY_NAME[wide]) is BY_NAME[wide]
    found = converted(from_torch(a, BY_NAME[narrow]), BY_NAME[narrow], BY_NAME[wide])
    want = from_torch(a.to(torch.float64).to(getattr(torch, wide)), BY_NAME[wide])
    assert np.array_equal(found, want)


def test_rounding_is_torchs() -> None:
    a = torch.randn(70_000)
    found = rounded(from_torch(a, BY_NAME["float32"]), BY_NAME["float32"], BY_NAME["bfloat16"])
    assert np.array_equal(found, from_torch(a.bfloat16(), BY_NAME["bfloat16"]))


def test_what_cannot_be_compared() -> None:
    assert common_dtype(BY_NAME["float16"], BY_NAME["bfloat16"]) is BY_NAME["float32"]
    assert common_dtype(BY_NAME["int32"], BY_NAME["uint8"]) is BY_NAME["int64"]
    assert common_dtype(BY_NAME["int32"], BY_NAME["float32"]) is None
    assert common_dtype(BY_NAME["int64"], BY_NAME["uint64"]) is None
    assert common_dtype(BY_NAME["complex64"], BY_NAME["float32"]) is None
