"""Reads one region of any expression into memory. Used where bytes cannot go straight from file to file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nbmerge.dtypes import DType, torch_dtype
from nbmerge.engine.lower import Piece, pieces
from nbmerge.engine.sources import Sources
from nbmerge.expressions import Cast, Compute, Expr, Fill, Paste, Permute, Reshape, Slice, Stored
from nbmerge.geometry import Box, reshape_box, with_dim

# Elements are moved as unsigned integers of their size, whatever they mean.
Words = npt.NDArray[np.unsignedinteger[Any]]
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

# A strided region is read with the bytes between its elements as long as those are at most as many again.
_MOST_WASTE = 2
_SMALL_SPAN = 64 * 1024  # bytes below which waste does not matter


def words(shape: Sequence[int], dtype: DType) -> Words:
    """An array of the shape for elements of the dtype, uninitialised."""
    return np.empty(tuple(shape), dtype=_WORDS[dtype.itemsize])


def read(expr: Expr, region: Box, sources: Sources) -> Words:
    """The region of the tensor as an array of its shape, elements as unsigned integers of their size."""
    target = words(region.shape, expr.dtype)
    fill(target, region, pieces(expr, region), sources)
    return target


def fill(target: Words, region: Box, parts: Sequence[Piece], sources: Sources) -> None:
    """Fills `target`, which is the contiguous `region` of a tensor, from the tensor's pieces."""
    for piece in parts:
        common = region.intersect(piece.box)
        if common is None:
            continue
        at = common.relative_to(region.offset)
        window = _window(target, at)
        inside = common.relative_to(piece.box.offset)
        if isinstance(piece.leaf, Stored):
            _read_stored(piece.leaf.region(inside), window, sources)
        elif isinstance(piece.leaf, Fill):
            window[...] = fill_word(piece.leaf)
        else:
            window[...] = evaluate(piece.leaf, inside, sources)


def _window(array: Words, box: Box) -> Words:
    """The box of an array, as a view of it."""
    inside = (slice(start, stop) for start, stop in zip(box.offset, box.stop, strict=True))
    # The ellipsis keeps this a view where there are no dimensions; without it numpy gives a copy of the element.
    index: tuple[Any, ...] = (*inside, ...)
    view: Words = array[index]
    return view


def fill_word(leaf: Fill) -> Any:
    """The constant as an unsigned integer of its dtype's size."""
    if leaf.value == 0 and math.copysign(1, leaf.value) > 0:  # -0.0 has a bit set
        return 0
    import torch

    value = torch.tensor([leaf.value], dtype=torch_dtype(leaf.dtype.name))
    return value.view(torch.uint8).numpy().view(_WORDS[leaf.dtype.itemsize])[0]


def _read_stored(stored: Stored, window: Words, sources: Sources) -> None:
    """The stored elements into a window, which may be strided."""
    if stored.is_contiguous:
        if window.flags.c_contiguous:
            sources.read_into(stored.file, stored.offset, window.reshape(-1).view(np.uint8))
        else:
            buffer = words(stored.shape, stored.dtype)
            sources.read_into(stored.file, stored.offset, buffer.reshape(-1).view(np.uint8))
            window[...] = buffer
        return
    size = stored.dtype.itemsize
    span = sum((n - 1) * stride for n, stride in zip(stored.shape, stored.strides, strict=True)) + 1
    if span <= _MOST_WASTE * stored.numel or span * size <= _SMALL_SPAN:
        buffer = words((span,), stored.dtype)
        sources.read_into(stored.file, stored.offset, buffer.view(np.uint8))
        strides = tuple(stride * size for stride in stored.strides)
        window[...] = np.lib.stride_tricks.as_strided(buffer, stored.shape, strides)
        return
    axis = max((dim for dim, n in enumerate(stored.shape) if n > 1), key=lambda dim: stored.strides[dim], default=0)
    for row in range(stored.shape[axis]):
        offset = tuple(row if dim == axis else 0 for dim in range(len(stored.shape)))
        shape = tuple(1 if dim == axis else n for dim, n in enumerate(stored.shape))
        part = window[tuple(slice(row, row + 1) if dim == axis else slice(None) for dim in range(window.ndim))]
        _read_stored(stored.region(Box(offset, shape)), part, sources)


def evaluate(expr: Expr, region: Box, sources: Sources) -> Words:
    """The region of an expression, made from the same region of what it is made of."""
    if isinstance(expr, (Stored, Fill, Paste)):
        return read(expr, region, sources)
    if isinstance(expr, Cast):
        return _cast(evaluate(expr.source, region, sources), expr.source.dtype, expr.to)
    if isinstance(expr, Slice):
        return evaluate(expr.source, region.shift(expr.box.offset), sources)
    if isinstance(expr, Permute):
        back = [expr.dims.index(dim) for dim in range(len(expr.dims))]
        source = Box(tuple(region.offset[d] for d in back), tuple(region.shape[d] for d in back))
        permuted: Words = evaluate(expr.source, source, sources).transpose(expr.dims)
        return permuted
    if isinstance(expr, Reshape):
        target = words(region.shape, expr.dtype)
        for new, old in reshape_box(expr.shape, expr.source.shape, region):
            at = new.relative_to(region.offset)
            part = evaluate(expr.source, old, sources)
            _window(target, at)[...] = part.reshape(new.shape)
        return target
    if isinstance(expr, Compute):
        return _compute(expr, region, sources)
    raise TypeError(f"a {type(expr).__name__} cannot be read")


def _compute(expr: Compute, region: Box, sources: Sources) -> Words:
    """Runs the operation on whole inputs, or along its axis on as many rows as the region has."""
    axis = expr.axis
    inputs = []
    for number, source in enumerate(expr.inputs):
        box = Box.whole(source.shape)
        if axis is not None and number < len(expr.inputs) - expr.whole:
            box = Box(with_dim(box.offset, axis, region.offset[axis]), with_dim(box.shape, axis, region.shape[axis]))
        inputs.append(to_torch(evaluate(source, box, sources), source.dtype))
    made = expr.function(*inputs)
    if str(made.dtype) != f"torch.{expr.dtype}":
        raise TypeError(f"{expr.name} gave {made.dtype}, its plan says {expr.dtype}")
    result = from_torch(made, expr.dtype)
    start = region.offset if axis is None else with_dim(region.offset, axis, 0)
    return _window(result, Box(start, region.shape))


def _cast(values: Words, before: DType, after: DType) -> Words:

    return from_torch(to_torch(values, before).to(torch_dtype(after.name)), after)


def to_torch(values: Words, dtype: DType) -> Any:
    """The array as a torch tensor of the dtype; shares memory where it is contiguous."""
    import torch

    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return torch.from_numpy(flat).view(torch_dtype(dtype.name)).reshape(values.shape)


def from_torch(tensor: Any, dtype: DType) -> Words:
    """A torch tensor as an array of unsigned integers of its elements' size."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    array: Words = flat.view(_WORDS[dtype.itemsize]).reshape(tuple(tensor.shape))
    return array
