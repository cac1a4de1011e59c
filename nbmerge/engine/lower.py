"""Lowers an expression to pieces: boxes of the output, each with the leaf that its elements come from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nbmerge import expressions as ex
from nbmerge.expressions import Cast, Expr, Fill, Paste, Permute, Reshape, Slice, Stored
from nbmerge.geometry import Box, Shape, reshape_box, viewed_strides

# A reshape is cut into pieces of this many bytes on average, or is read as a whole and put in order in memory.
_SMALL_PIECE = 64 * 1024
_FEW_PIECES = 64
# A tile of a tensor that lies turned in its source: 2,048 by 2,048 elements of 16 bits, 4 KiB a run on both sides.
TILE_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of the output and the leaf of the same shape that fills it.

    The leaf is Stored or Fill, or, where a dtype changes, something is computed, or no strides can say in which order
    the elements lie, any expression.
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
    """Pieces of the source where they are few and long; else the reshape as it is."""
    most = _FEW_PIECES + region.numel * expr.dtype.itemsize // _SMALL_PIECE
    found = list(itertools.islice(_cut(expr, region), most + 1))
    yield from found if len(found) <= most else [Piece(region, ex.slice_of(expr, region))]


def _cut(expr: Reshape, region: Box) -> Iterator[Piece]:
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


def regions(expr: Expr, limit: int) -> Iterator[Box]:
    """The boxes in which to make a tensor: `blocks` of at most `limit` bytes, or tiles where its source lies turned."""
    along = turned(expr)
    if along is None:
        yield from blocks(expr.shape, expr.dtype.itemsize, limit)
    else:
        yield from tiles(expr.shape, expr.dtype.itemsize, TILE_BYTES, along)


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


def tiles(shape: Shape, itemsize: int, limit: int, along: int) -> Iterator[Box]:
    """Boxes of at most `limit` bytes that tile a tensor, about as long in dimension `along` as in all others together.

    For a tensor that lies in its source with dimension `along` innermost: source and output are then both met in
    pieces of some kilobytes, where whole output rows would meet the source element by element.
    """
    if not math.prod(shape):
        return
    budget = max(limit // itemsize, 1)
    extent = [1] * len(shape)
    extent[along] = min(shape[along], max(math.isqrt(budget), 1))
    left = budget // extent[along]
    for dim in reversed(range(len(shape))):
        if dim != along:
            extent[dim] = min(shape[dim], max(left, 1))
            left //= extent[dim]
    extent[along] = min(shape[along], extent[along] * max(left, 1))
    steps = (range(0, size, step) for size, step in zip(shape, extent, strict=True))
    for start in itertools.product(*steps):
        yield Box(start, tuple(min(n, size - at) for n, size, at in zip(extent, shape, start, strict=True)))


def turned(expr: Expr) -> int | None:
    """The dimension that is innermost in the source, where that is not the last one; None where rows are rows."""
    innermost = _innermost(expr)
    long = [dim for dim, size in enumerate(expr.shape) if size > 1]
    return None if innermost is None or innermost == long[-1] else innermost


def _innermost(expr: Expr) -> int | None:
    """The dimension along which neighbours lie side by side in the source; of a paste, in that of its largest part."""
    if isinstance(expr, Stored):
        return next((dim for dim, size in enumerate(expr.shape) if size > 1 and expr.strides[dim] == 1), None)
    if isinstance(expr, Paste):
        return _innermost(max((part for _, part in expr.parts), key=lambda part: part.numel)) if expr.parts else None
    if not isinstance(expr, (Slice, Permute, Reshape, Cast)):
        return None
    inner = _innermost(expr.source)
    if inner is None:
        return None
    if isinstance(expr, Permute):
        inner = expr.dims.index(inner)
    elif isinstance(expr, Reshape):
        inner = _same_dim(expr.source.shape, expr.shape, inner)
    return None if inner is None or expr.shape[inner] < 2 else inner


def _same_dim(old: Shape, new: Shape, dim: int) -> int | None:
    """The dimension of the new shape whose rows are those of dimension `dim` of the old one."""
    before = math.prod(old[:dim])
    return next((d for d, size in enumerate(new) if size == old[dim] and math.prod(new[:d]) == before), None)
