"""`LazyTensor.stats()`: what the elements of one tensor are. Reads all of it, block by block."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from nbmerge.comparing.elements import Values, as_float64, as_integers, is_integer
from nbmerge.dtypes import DType
from nbmerge.engine.events import Listener, silent
from nbmerge.engine.read import Words
from nbmerge.engine.scan import Walk, scan
from nbmerge.errors import OptionError
from nbmerge.expressions import Expr
from nbmerge.geometry import Box, Shape
from nbmerge.shown import Displayed, Plotted


@dataclass(frozen=True, repr=False)
class TensorStats(Displayed, Plotted):
    """What the elements of a tensor are.

    elements: that were looked at; nan, infinity, zero, negative: how many of them are; least, greatest: None where no
    element is finite; mean, std (of the population): over the finite ones, in float64, None where there are none;
    magnitudes: exponent k → how many elements have 2**k <= |x| < 2**(k + 1); share: of all elements, as sampled.
    """

    name: str
    shape: Shape
    dtype: DType
    elements: int
    nan: int
    infinity: int
    zero: int
    negative: int
    least: float | None
    greatest: float | None
    mean: float | None
    std: float | None
    magnitudes: Mapping[int, int]
    share: float = 1.0


def stats_of(
    name: str, expr: Expr, *, sample: float = 1.0, workers: int | None = None, listener: Listener = silent
) -> TensorStats:
    """Looks at every element, or at a share of the blocks; memory does not grow with the tensor.

    The same numbers come out however many workers there are. Raises OptionError for a complex tensor and for a sample
    outside of (0, 1], and what reading raises.
    """
    if not expr.dtype.is_floating and not is_integer(expr.dtype):
        raise OptionError(f"{name} is {expr.dtype}: complex numbers have no order", fix="look at a real tensor")
    if not 0 < sample <= 1:
        raise OptionError(f"sample={sample}", fix="a share of the elements, above 0 and at most 1")
    found: dict[Shape, _Block] = {}
    lock = threading.Lock()

    def visit(_: str, region: Box, words: tuple[Words, ...]) -> None:
        block = _block(words[0], expr.dtype)
        with lock:
            found[region.offset] = block

    if expr.numel:
        scan([Walk(name, (expr,))], visit, phase="statistics", workers=workers, sample=sample, listener=listener)
    # Sums of floats depend on their order: that of the blocks in the tensor, not that in which threads finish.
    return _together(name, expr, [found[offset] for offset in sorted(found)])


@dataclass(slots=True)
class _Block:
    """What is known of a block. deviations: the sum of (x - mean)² over its finite elements."""

    elements: int
    nan: int = 0
    infinity: int = 0
    zero: int = 0
    negative: int = 0
    finite: int = 0
    least: float = math.inf
    greatest: float = -math.inf
    mean: float = 0.0
    deviations: float = 0.0
    magnitudes: Counter[int] = field(default_factory=Counter)


def _block(words: Words, dtype: DType) -> _Block:
    flat = words.reshape(-1)
    values: Values = as_integers(flat, dtype).astype(np.float64) if is_integer(dtype) else as_float64(flat, dtype)
    block = _Block(values.size)
    finite = values
    if not np.isfinite(values).all():
        block.nan = int(np.isnan(values).sum())
        block.infinity = int(np.isinf(values).sum())
        finite = values[np.isfinite(values)]
    block.finite = finite.size
    if not finite.size:
        return block
    block.least, block.greatest = float(finite.min()), float(finite.max())
    block.negative = int((finite < 0).sum())
    block.mean = float(finite.mean())
    block.deviations = float(((finite - block.mean) ** 2).sum())
    exponents = np.frexp(finite[finite != 0])[1] - 1  # frexp gives a mantissa from 0.5 to 1
    block.zero = finite.size - exponents.size
    if exponents.size:
        low = int(exponents.min())
        block.magnitudes = Counter({low + at: int(n) for at, n in enumerate(np.bincount(exponents - low)) if n})
    return block


def _together(name: str, expr: Expr, blocks: Iterable[_Block]) -> TensorStats:
    """All blocks as one, means and deviations by Chan, Golub and LeVeque's pairwise update."""
    total = _Block(0)
    for block in blocks:
        finite = total.finite + block.finite
        if block.finite:
            apart = block.mean - total.mean
            total.deviations += block.deviations + apart * apart * total.finite * block.finite / finite
            total.mean += apart * block.finite / finite
        total.finite = finite
        total.least, total.greatest = min(total.least, block.least), max(total.greatest, block.greatest)
        for count in ("elements", "nan", "infinity", "zero", "negative"):
            setattr(total, count, getattr(total, count) + getattr(block, count))
        total.magnitudes.update(block.magnitudes)
    known = total.finite > 0
    return TensorStats(
        name=name, shape=expr.shape, dtype=expr.dtype, elements=total.elements, nan=total.nan,
        infinity=total.infinity, zero=total.zero, negative=total.negative,
        least=total.least if known else None, greatest=total.greatest if known else None,
        mean=total.mean if known else None, std=math.sqrt(total.deviations / total.finite) if known else None,
        magnitudes=dict(sorted(total.magnitudes.items())), share=total.elements / (expr.numel or 1),
    )  # fmt: skip
