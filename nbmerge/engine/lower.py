"""Lowers an expression to pieces: boxes of the output, each with the leaf that its elements come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nbmerge import expressions as ex
from nbmerge.expressions import Expr, Fill, Paste, Permute, Reshape, Slice, Stored
from nbmerge.geometry import Box, Shape, reshape_box, viewed_strides


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of the output and the leaf of the same shape that fills it.

    The leaf is Stored or Fill, or, where a dtype changes or something is computed, any expression.
    """

    box: Box
    leaf: Expr


def pieces(expr: Expr, region: Box | None = None) -> list[Piece]:
    """The pieces that fill `region` of the tensor (all of it by default), in its coordinates."""
    return list(_pieces(expr, region or Box.whole(expr.shape)))


def _pieces(expr: Expr, region: Box) -> Iterator[Piece]:
    if not region.numel:
        return
    if isinstance(expr, Stored):
        yield Piece(region, expr.region(region))
    elif isinstance(expr, Fill):
        yield Piece(region, replace(expr, _shape=region.shape))
    elif isinstance(expr, Slice):
        for piece in _pieces(expr.source, region.shift(expr.box.offset)):
            yield Piece(piece.box.relative_to(expr.box.offset), piece.leaf)
    elif isinstance(expr, Permute):
        yield from _permuted(expr, region)
    elif isinstance(expr, Reshape):
        yield from _reshaped(expr, region)
    elif isinstance(expr, Paste):
        for offset, part in expr.parts:
            common = region.intersect(Box(offset, part.shape))
            if common is not None:
                for piece in _pieces(part, common.relative_to(offset)):
                    yield Piece(piece.box.shift(offset), piece.leaf)
    else:
        yield Piece(region, ex.slice_of(expr, region))


def _permuted(expr: Permute, region: Box) -> Iterator[Piece]:
    back = tuple(expr.dims.index(dim) for dim in range(len(expr.dims)))
    for piece in _pieces(expr.source, _reordered(region, back)):
        leaf = piece.leaf
        if isinstance(leaf, Stored):
            shape = tuple(leaf.shape[dim] for dim in expr.dims)
            leaf = replace(leaf, _shape=shape, strides=tuple(leaf.strides[dim] for dim in expr.dims))
        elif isinstance(leaf, Fill):
            leaf = replace(leaf, _shape=tuple(leaf.shape[dim] for dim in expr.dims))
        else:
            leaf = ex.permute(leaf, expr.dims)
        yield Piece(_reordered(piece.box, expr.dims), leaf)


def _reordered(box: Box, dims: Shape) -> Box:
    return Box(tuple(box.offset[dim] for dim in dims), tuple(box.shape[dim] for dim in dims))


def _reshaped(expr: Reshape, region: Box) -> Iterator[Piece]:
    """The pieces of the source that hold the region, each cut into boxes of the new shape."""
    old, new = expr.source.shape, expr.shape
    for _, wanted in reshape_box(new, old, region):
        for piece in _pieces(expr.source, wanted):
            for source_box, target_box in reshape_box(old, new, piece.box):
                yield from _viewed(piece.leaf, source_box.relative_to(piece.box.offset), target_box)


def _viewed(leaf: Expr, inside: Box, target: Box) -> Iterator[Piece]:
    """The part `inside` of a leaf as a leaf of the target's shape; cut by rows where memory can't be seen so."""
    if isinstance(leaf, Fill):
        yield Piece(target, replace(leaf, _shape=target.shape))
        return
    if not isinstance(leaf, Stored):
        yield Piece(target, ex.reshape(ex.slice_of(leaf, inside), target.shape))
        return
    part = leaf.region(inside)
    strides = viewed_strides(part.shape, part.strides, target.shape)
    if strides is not None:
        yield Piece(target, replace(part, _shape=target.shape, strides=strides))
        return
    axis = next(dim for dim, size in enumerate(part.shape) if size > 1)
    for row in range(part.shape[axis]):
        offset = tuple(row if dim == axis else 0 for dim in range(len(part.shape)))
        shape = tuple(1 if dim == axis else size for dim, size in enumerate(part.shape))
        row_box = Box(offset, shape)
        for source_box, target_box in reshape_box(part.shape, target.shape, row_box):
            yield from _viewed(part, source_box, target_box.shift(target.offset))


def blocks(shape: Shape, itemsize: int, limit: int) -> Iterator[Box]:
    """Boxes of at most `limit` bytes that are contiguous in a row-major tensor and tile it, in order."""
    whole = Box.whole(shape)
    if whole.numel * itemsize <= limit or not shape:
        if whole.numel:
            yield whole
        return
    row = itemsize
    for size in shape[1:]:
        row *= size
    if row > limit:
        for index in range(shape[0]):
            for box in blocks(shape[1:], itemsize, limit):
                yield Box((index, *box.offset), (1, *box.shape))
        return
    rows = max(limit // row, 1)
    for start in range(0, shape[0], rows):
        yield Box((start, *whole.offset[1:]), (min(rows, shape[0] - start), *shape[1:]))
