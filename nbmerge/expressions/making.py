"""Makes expressions over others, as simple as they can be: a slice of a paste is a paste of slices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from nbmerge.dtypes import DType
from nbmerge.expressions.nodes import Cast, Expr, Fill, Paste, Permute, Reshape, Slice, Stored
from nbmerge.geometry import Box, Shape, viewed_strides, with_dim


def slice_of(expr: Expr, box: Box) -> Expr:
    """A box of a tensor, of stored bytes and pastes only what it needs; the tensor itself where that is all of it."""
    if box == Box.whole(expr.shape):
        return expr
    if isinstance(expr, Stored):
        return expr.region(box)
    if isinstance(expr, Fill):
        return replace(expr, _shape=box.shape)
    if isinstance(expr, Slice):
        return slice_of(expr.source, box.shift(expr.box.offset))
    if isinstance(expr, Paste):
        return _slice_of_paste(expr, box)
    return Slice(expr, box)


def _slice_of_paste(paste: Paste, box: Box) -> Expr:
    parts: list[tuple[Shape, Expr]] = []
    for offset, part in paste.parts:
        common = box.intersect(Box(offset, part.shape))
        if common is not None:
            parts.append((common.relative_to(box.offset).offset, slice_of(part, common.relative_to(offset))))
    if len(parts) == 1 and parts[0][1].shape == box.shape:
        return parts[0][1]
    return Paste(box.shape, paste.dtype, tuple(parts))


def narrow(expr: Expr, dim: int, start: int, length: int) -> Expr:
    """Rows `start` to `start + length` of dimension `dim`."""
    whole = Box.whole(expr.shape)
    return slice_of(expr, Box(with_dim(whole.offset, dim, start), with_dim(whole.shape, dim, length)))


def reshape(expr: Expr, shape: Shape) -> Expr:
    """The same elements in another shape. Raises ValueError where the sizes differ."""
    if math.prod(shape) != expr.numel:
        raise ValueError(f"{list(expr.shape)} cannot be reshaped to {list(shape)}")
    if shape == expr.shape:
        return expr
    if isinstance(expr, Stored):
        strides = viewed_strides(expr.shape, expr.strides, shape)
        return Reshape(expr, shape) if strides is None else replace(expr, _shape=shape, strides=strides)
    if isinstance(expr, Fill):
        return replace(expr, _shape=shape)
    if isinstance(expr, Paste) and (1, *shape) == expr.shape:
        filled = [(at[1:], part) for at, part in expr.parts if part.numel]
        return Paste(shape, expr.dtype, tuple((at, reshape(part, part.shape[1:])) for at, part in filled))
    if isinstance(expr, Paste) and shape == (1, *expr.shape):
        return Paste(shape, expr.dtype, tuple(((0, *at), reshape(part, (1, *part.shape))) for at, part in expr.parts))
    return reshape(expr.source, shape) if isinstance(expr, Reshape) else Reshape(expr, shape)


def permute(expr: Expr, dims: Shape) -> Expr:
    """Dimensions in another order: dimension i of the result is dimension dims[i]."""
    if dims == tuple(range(len(dims))):
        return expr
    if isinstance(expr, Stored):
        strides = tuple(expr.strides[dim] for dim in dims)
        return replace(expr, _shape=tuple(expr.shape[dim] for dim in dims), strides=strides)
    return Permute(expr, dims)


def cast(expr: Expr, to: DType) -> Expr:
    """Another dtype; where a tensor was widened from that very one, the tensor that it was."""
    if expr.dtype == to:
        return expr
    if isinstance(expr, Cast) and expr.source.dtype == to and to.is_floating and to.itemsize < expr.to.itemsize:
        return expr.source
    return Cast(expr, to)


def select(expr: Expr, dim: int, index: int) -> Expr:
    """One row of dimension `dim`, without that dimension."""
    row = narrow(expr, dim, index, 1)
    return reshape(row, row.shape[:dim] + row.shape[dim + 1 :])


def cat(parts: Sequence[Expr], dim: int) -> Expr:
    """Tensors one after the other along `dim`. All other dimensions are the same."""
    first = parts[0]
    if len(parts) == 1:
        return first
    placed: list[tuple[Shape, Expr]] = []
    at = 0
    for part in parts:
        placed.append((tuple(at if d == dim else 0 for d in range(len(first.shape))), part))
        at += part.shape[dim]
    shape = tuple(at if d == dim else size for d, size in enumerate(first.shape))
    return Paste(shape, first.dtype, tuple(placed))


def stack(parts: Sequence[Expr]) -> Expr:
    """Tensors of one shape along a new first dimension."""
    return cat([reshape(part, (1, *part.shape)) for part in parts], 0)


def rows_of(expr: Expr) -> list[Expr]:
    """Every row of dimension 0, without that dimension; of a paste of single rows in one pass over its parts."""
    count = expr.shape[0]
    if not isinstance(expr, Paste) or any(part.shape[0] != 1 for _, part in expr.parts):
        return [select(expr, 0, index) for index in range(count)]
    parts: list[list[tuple[Shape, Expr]]] = [[] for _ in range(count)]
    for offset, part in expr.parts:
        parts[offset[0]].append((offset[1:], reshape(part, part.shape[1:])))
    shape = expr.shape[1:]
    return [
        row[0][1] if len(row) == 1 and row[0][1].shape == shape else Paste(shape, expr.dtype, tuple(row))
        for row in parts
    ]
