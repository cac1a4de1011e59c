"""What `LazyTensor.stats()` says, against torch on the same elements."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nbmerge
from nbmerge.errors import OptionError
from nbmerge.layout import LazyTensor
from tests.support.library import SAVED

Store = Callable[[torch.Tensor], LazyTensor]


@pytest.fixture
def stored(tmp_path: Path) -> Store:
    def make(tensor: torch.Tensor) -> LazyTensor:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        save_file({"w": tensor}, tmp_path / "model.safetensors")
        return nbmerge.open_checkpoint(tmp_path)["w"]

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_the_numbers_are_torchs(stored: Store, dtype: torch.dtype) -> None:
    made = (torch.randn(700, 900, generator=torch.Generator().manual_seed(1)) * 3 + 5).to(dtype)
    wide = made.double()
    stats = stored(made).stats()
    assert (stats.elements, stats.zero, stats.negative) == (630_000, int((wide == 0).sum()), int((wide < 0).sum()))
    assert (stats.least, stats.greatest) == (wide.min().item(), wide.max().item())
    # Sums of floats in another order: equal to some units in the last place of float64.
    assert stats.mean == pytest.approx(wide.mean().item(), rel=1e-12)
    assert stats.std == pytest.approx(wide.std(correction=0).item(), rel=1e-12)
    exponents = torch.frexp(wide[wide != 0])[1] - 1
    assert stats.magnitudes == {int(k): int((exponents == k).sum()) for k in exponents.unique()}


def test_workers_do_not_change_a_bit(stored: Store) -> None:
    tensor = stored(torch.randn(3000, 700, generator=torch.Generator().manual_seed(2)))
    assert vars(tensor.stats(workers=1)) == vars(tensor.stats(workers=7))


def test_nan_and_infinity_are_counted_and_left_out_of_the_sums(stored: Store) -> None:
    stats = stored(torch.tensor([1.0, 3.0, float("nan"), float("inf"), -float("inf"), 0.0])).stats()
    assert (stats.nan, stats.infinity, stats.zero) == (1, 2, 1)
    assert (stats.least, stats.greatest, stats.mean) == (0.0, 3.0, pytest.approx(4 / 3))
    assert "1 NaN" in repr(stats) and "2 infinite" in repr(stats)


@pytest.mark.parametrize(
    ("tensor", "mean"),
    [(torch.tensor([1, 2, 6]), 3.0), (torch.tensor(True), 1.0), (torch.tensor([7], dtype=torch.uint8), 7.0)],
)
def test_integers_are_whole_numbers(stored: Store, tensor: torch.Tensor, mean: float) -> None:
    assert stored(tensor).stats().mean == mean


def test_an_empty_tensor_has_no_mean(stored: Store) -> None:
    stats = stored(torch.zeros(0, 4)).stats()
    assert (stats.elements, stats.mean, stats.least, stats.magnitudes) == (0, None, None, {})


def test_it_is_one_line_with_a_sparkline(stored: Store) -> None:
    said = repr(stored(torch.tensor([0.0, 1.0, 1.5, -4.0])).stats())
    assert "4 elements of float32, mean -0.375" in said
    assert said.endswith("1 zero; |x| 2⁰ █·▅ 2³")


@pytest.mark.skipif("complex64" not in SAVED, reason="this safetensors saves no complex numbers")
def test_complex_numbers_are_not_measured(stored: Store) -> None:
    with pytest.raises(OptionError, match="complex numbers have no order"):
        stored(torch.zeros(2, dtype=torch.complex64)).stats()


def test_a_sample_of_nothing_is_refused(stored: Store) -> None:
    with pytest.raises(OptionError, match=r"sample=0\.0"):
        stored(torch.zeros(2)).stats(sample=0.0)
