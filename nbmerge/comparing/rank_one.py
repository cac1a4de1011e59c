"""How much of a matrix's update is one outer product: σ₁² / ‖Δ‖², with Δ only ever read in blocks."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt

from nbmerge.comparing.elements import Values, as_float64
from nbmerge.comparing.statistics import FRACTION, quotient
from nbmerge.dtypes import DType
from nbmerge.engine.read import Words, read
from nbmerge.engine.scan import BLOCK_BYTES, Walk
from nbmerge.engine.sources import Sources
from nbmerge.geometry import Box

MOST_PASSES = 16
_ENOUGH = 1e-3  # the part by which σ₁² must still grow in a pass for another one to be made

_Vector = npt.NDArray[np.float64]


def rank_one_share(walk: Walk, square: int, largest: float, sources: Sources) -> float:
    """The share of ‖Δ‖² that the best outer product holds, from 0 to 1, for the matrices [rows, columns] of a walk.

    square: ‖Δ‖² in units of 2**-FRACTION; largest: the largest |Δ|, by which Δ is scaled. Lanczos' iteration on ΔᵀΔ
    from a fixed start: two readings of both matrices a pass, at most 16 passes, until a pass adds less than 0.1%. What
    it finds is never above the true share (a Ritz value is a lower bound), and for an update that is nearly of rank
    one exact to float64 after two or three passes. Holds up to 17 vectors as long as a row, and a block.
    """
    total = quotient(square, 1 << FRACTION) / largest / largest
    rows, columns = walk.exprs[0].shape
    basis: list[_Vector] = [_start(walk.name, columns)]
    diagonal: list[float] = []
    beside: list[float] = []
    found = 0.0
    for _ in range(min(MOST_PASSES, rows, columns)):
        image = _gram(walk, basis[-1], largest, sources)
        diagonal.append(float(image @ basis[-1]))
        before, found = found, _greatest(diagonal, beside)
        for vector in (*basis, *basis):  # twice, as rounding leaves a rest after once
            image -= (image @ vector) * vector
        length = float(np.linalg.norm(image))
        if found - before <= _ENOUGH * found or length <= np.finfo(np.float64).eps * found:
            break
        beside.append(length)
        basis.append(image / length)
    return min(found / total, 1.0)


def _greatest(diagonal: list[float], beside: list[float]) -> float:
    """The greatest eigenvalue of the tridiagonal matrix that Lanczos has so far."""
    matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    return float(np.linalg.eigvalsh(matrix)[-1])


def _start(name: str, size: int) -> _Vector:
    """A vector of length 1 that is the same every time and lies along no axis."""
    chance = np.random.default_rng(random.Random(name).getrandbits(64))
    vector = chance.standard_normal(size)
    unit: _Vector = vector / np.linalg.norm(vector)
    return unit


def _gram(walk: Walk, vector: _Vector, largest: float, sources: Sources) -> _Vector:
    """ΔᵀΔ·vector. Blocks of whole rows are read once; others once for Δ·vector and once for its image."""
    rows, columns = walk.exprs[0].shape
    image = np.zeros(columns)
    middle = np.zeros(rows)
    split: list[Box] = []
    for box in walk.regions(BLOCK_BYTES):
        delta = _delta(walk, box, largest, sources)
        at, across = box.offset[0], slice(box.offset[1], box.stop[1])
        part = np.einsum("ij,j->i", delta, vector[across])
        if box.shape[1] == columns:
            image += np.einsum("ij,i->j", delta, part)
        else:
            middle[at : at + box.shape[0]] += part
            split.append(box)
    for box in split:
        part = middle[box.offset[0] : box.stop[0]]
        image[box.offset[1] : box.stop[1]] += np.einsum("ij,i->j", _delta(walk, box, largest, sources), part)
    return image


def _delta(walk: Walk, box: Box, largest: float, sources: Sources) -> Values:
    """Δ of a block in float64, scaled; 0 where it is not finite."""
    a, b = (_floats(expr.dtype, read(expr, box, sources)) for expr in walk.exprs)
    with np.errstate(all="ignore"):
        delta = (b - a) / largest
    return np.where(np.isfinite(delta), delta, 0.0)


def _floats(dtype: DType, words: Words) -> Values:
    values: Values = as_float64(words.reshape(-1), dtype).reshape(words.shape)
    return values
