"""Boxes, and where the placements of a device mesh put them. Pure integers: no files, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle inside a tensor: its first corner and its extent, both of the tensor's rank."""

    offset: Shape
    shape: Shape

    @staticmethod
    def whole(shape: Shape) -> Box:
        """The box that is all of a tensor of this shape."""
        return Box((0,) * len(shape), shape)

    @property
    def numel(self) -> int:
        """How many elements the box holds; 1 for a 0-d tensor."""
        return math.prod(self.shape)

    @property
    def stop(self) -> Shape:
        """The corner after the last one."""
        return tuple(start + length for start, length in zip(self.offset, self.shape, strict=True))

    def shift(self, by: Shape) -> Box:
        """The same box, moved."""
        return Box(tuple(a + b for a, b in zip(self.offset, by, strict=True)), self.shape)

    def relative_to(self, origin: Shape) -> Box:
        """The same box, in coordinates that begin at `origin`."""
        return Box(tuple(a - b for a, b in zip(self.offset, origin, strict=True)), self.shape)

    def intersect(self, other: Box) -> Box | None:
        """What both boxes hold, or None where that is nothing."""
        starts: list[int] = []
        lengths: list[int] = []
        for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True):
            start = a if a > b else b
            length = min(a + n, b + m) - start
            if length <= 0:
                return None
            starts.append(start)
            lengths.append(length)
        return Box(tuple(starts), tuple(lengths))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{a + n}" for a, n in zip(self.offset, self.shape, strict=True)) + "]"


def contiguous_strides(shape: Shape) -> Shape:
    """Strides, in elements, of a row-major tensor."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(shape[dim + 1], 1)
    return tuple(strides)


def ravel(index: Shape, shape: Shape) -> int:
    """The row-major position of an index."""
    return sum(i * s for i, s in zip(index, contiguous_strides(shape), strict=True))


def unravel(position: int, shape: Shape) -> Shape:
    """The index at a row-major position."""
    index: list[int] = []
    for stride in contiguous_strides(shape):
        index.append(position // stride)
        position %= stride
    return tuple(index)


def chunk_bounds(length: int, parts: int, index: int) -> tuple[int, int]:
    """Start and length of part `index` when `torch.chunk` cuts `length` rows into `parts`.

    Every part has ceil(length / parts) rows, but the last ones that may be shorter or empty.
    """
    size = -(-length // parts)
    start = min(index * size, length)
    return start, min(size, length - start)


@dataclass(frozen=True, slots=True)
class Placement:
    """How a tensor lies on one dimension of a device mesh, as in torch.distributed.tensor.

    kind: `shard`, `replicate` or `partial`. A strided shard has a `split_factor` over 1: so many shards of
    the same tensor dimension were cut by mesh dimensions further right before this one cut its own.
    """

    kind: str
    dim: int = -1
    split_factor: int = 1

    def __str__(self) -> str:
        if self.kind == "replicate":
            return "Replicate"
        if self.kind == "partial":
            return "Partial"
        if self.split_factor > 1:
            return f"StridedShard({self.dim}, sf={self.split_factor})"
        return f"Shard({self.dim})"


REPLICATE = Placement("replicate")


def shard_order(placements: Sequence[Placement], mesh_shape: Shape) -> dict[int, list[int]]:
    """For each sharded tensor dimension the mesh dimensions that cut it, in the order in which they cut.

    Mesh dimensions cut from left to right, except that a strided shard cuts after those to its right whose
    sizes multiply to its split factor (torch's `DTensorSpec._maybe_convert_StridedShard_to_shard_order`).
    Raises ValueError where no order gives the split factors.
    """
    if not any(placement.split_factor > 1 for placement in placements):
        plain: dict[int, list[int]] = {}
        for mesh_dim, placement in enumerate(placements):
            if placement.kind == "shard":
                plain.setdefault(placement.dim, []).append(mesh_dim)
        return plain
    orders: dict[int, list[int]] = {}
    for mesh_dim in range(len(placements) - 1, -1, -1):
        placement = placements[mesh_dim]
        if placement.kind != "shard":
            continue
        order = orders.setdefault(placement.dim, [])
        position, product = 0, 1
        while product != placement.split_factor and position < len(order):
            product *= mesh_shape[order[position]]
            position += 1
        if product != placement.split_factor:
            raise ValueError(
                f"{placement} on mesh dimension {mesh_dim} of a mesh of shape {mesh_shape} "
                "fits no order in which the mesh dimensions can have cut the tensor"
            )
        order.insert(position, mesh_dim)
    return orders


def local_box(
    shape: Shape,
    placements: Sequence[Placement],
    mesh_shape: Shape,
    coordinate: Shape,
    order: dict[int, list[int]] | None = None,
) -> Box:
    """The box of a tensor of global `shape` that the rank at `coordinate` of the mesh holds.

    `order` gives the mesh dimensions that cut each tensor dimension, first cut first; without it
    `shard_order` derives it. Raises ValueError for placements that no order explains.
    """
    offset, extent = [0] * len(shape), list(shape)
    for dim, mesh_dims in (shard_order(placements, mesh_shape) if order is None else order).items():
        if not 0 <= dim < len(shape):
            raise ValueError(f"Shard({dim}) of a tensor of shape {shape}")
        for mesh_dim in mesh_dims:
            start, length = chunk_bounds(extent[dim], mesh_shape[mesh_dim], coordinate[mesh_dim])
            offset[dim] += start
            extent[dim] = length
    return Box(tuple(offset), tuple(extent))


def with_dim(values: Shape, dim: int, value: int) -> Shape:
    """A shape or an offset with another value in one dimension."""
    return (*values[:dim], value, *values[dim + 1 :])


def tiling_faults(shape: Shape, boxes: Iterable[Box]) -> list[str]:
    """Why the boxes do not tile a tensor of `shape` exactly: boxes outside, overlaps, elements left out.

    Empty boxes do not count. An empty list means that every element lies in exactly one box.
    """
    filled = [box for box in boxes if box.numel]
    faults = [
        f"{box} lies outside {list(shape)}"
        for box in filled
        if any(stop > size for stop, size in zip(box.stop, shape, strict=True)) or min(box.offset, default=0) < 0
    ]
    if shape:
        # Sweep along the dimension that separates the boxes best, so that few are open at a time.
        axis = max(range(len(shape)), key=lambda dim: len({box.offset[dim] for box in filled}))
        open_boxes: list[Box] = []
        for box in sorted(filled, key=lambda box: box.offset[axis]):
            open_boxes = [other for other in open_boxes if other.stop[axis] > box.offset[axis]]
            common = [(other, box.intersect(other)) for other in open_boxes]
            faults += [f"{box} and {other} overlap in {both}" for other, both in common if both is not None]
            open_boxes.append(box)
    elif len(filled) > 1:
        faults.append(f"{len(filled)} pieces of a 0-d tensor")
    missing = math.prod(shape) - sum(box.numel for box in filled)
    if missing > 0:
        faults.append(f"{missing:,} of {math.prod(shape):,} elements lie in no piece")
    return faults


def runs_of_box(shape: Shape, box: Box) -> Iterator[tuple[int, int]]:
    """The box as (start, length) runs of the flattened tensor, in order."""
    if not box.numel:
        return
    inner = len(shape)  # dimensions from here on are whole, so that a run can span them
    while inner > 0 and box.shape[inner - 1] == shape[inner - 1]:
        inner -= 1
    outer = max(inner - 1, 0)
    strides = contiguous_strides(shape)
    length = math.prod(box.shape[outer:])
    start = sum(o * s for o, s in zip(box.offset, strides, strict=True))
    for position in range(math.prod(box.shape[:outer])):
        index = unravel(position, box.shape[:outer])
        yield start + sum(i * s for i, s in zip(index, strides[:outer], strict=True)), length


def boxes_of_run(shape: Shape, start: int, length: int) -> list[Box]:
    """A run of the flattened tensor as boxes, in order: at most two for each dimension but the first, and one."""
    if length <= 0:
        return []
    if not shape:
        return [Box((), ())]
    if len(shape) == 1:
        return [Box((start,), (length,))]
    row = math.prod(shape[1:])
    boxes: list[Box] = []
    first, inside = divmod(start, row)
    if inside:
        head = min(row - inside, length)
        boxes += [Box((first, *box.offset), (1, *box.shape)) for box in boxes_of_run(shape[1:], inside, head)]
        first, length = first + 1, length - head
    whole, tail = divmod(length, row)
    if whole:
        boxes.append(Box((first, *(0,) * (len(shape) - 1)), (whole, *shape[1:])))
    if tail:
        boxes += [Box((first + whole, *box.offset), (1, *box.shape)) for box in boxes_of_run(shape[1:], 0, tail)]
    return boxes


def _aligned_groups(old: Shape, new: Shape) -> Iterator[tuple[slice, slice]]:
    """The shortest runs of dimensions of both shapes whose sizes multiply to the same number."""
    i = j = 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        size_old = size_new = 1
        while True:
            if i < len(old) and (size_old <= size_new or j >= len(new)):
                size_old *= old[i]
                i += 1
            elif j < len(new):
                size_new *= new[j]
                j += 1
            if size_old == size_new and (i > start_i or start_i >= len(old)):
                break
            if i >= len(old) and j >= len(new):
                break
        yield slice(start_i, i), slice(start_j, j)


def reshape_box(old: Shape, new: Shape, box: Box) -> Iterator[tuple[Box, Box]]:
    """A box of a tensor of shape `old`, as pairs (box of `old`, box of `new`) of the same elements in order.

    Both shapes hold the same number of elements. Dimensions that both shapes share stay whole boxes.
    """
    pairs: list[tuple[Box, Box]] = [(Box((), ()), Box((), ()))]
    for olds, news in _aligned_groups(old, new):
        part = Box(box.offset[olds], box.shape[olds])
        found = list(_reshape_group(old[olds], new[news], part))
        pairs = [(_join(a, x), _join(b, y)) for a, b in pairs for x, y in found]
    yield from pairs


def _reshape_group(old: Shape, new: Shape, box: Box) -> Iterator[tuple[Box, Box]]:
    if old == new:
        yield box, box
        return
    for run in runs_of_box(old, box):
        yield from _common_boxes(old, new, *run)


def _common_boxes(old: Shape, new: Shape, start: int, length: int) -> Iterator[tuple[Box, Box]]:
    """A run, cut until each piece is one box in both shapes."""
    for target in boxes_of_run(new, start, length):
        at = ravel(target.offset, new)
        sources = boxes_of_run(old, at, target.numel)
        if len(sources) == 1:
            yield sources[0], target
            continue
        for source in sources:
            yield from _common_boxes(old, new, ravel(source.offset, old), source.numel)


def _join(a: Box, b: Box) -> Box:
    return Box(a.offset + b.offset, a.shape + b.shape)


def viewed_strides(shape: Shape, strides: Shape, new: Shape) -> Shape | None:
    """Strides with which memory of (`shape`, `strides`) can be seen as `new`, or None if it must be copied.

    The rule of torch's `Tensor.view`: a run of dimensions can be regrouped when each is contiguous in the next.
    """
    if math.prod(shape) == 0 or not new:
        return contiguous_strides(new)
    kept = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    blocks: list[list[int]] = []  # [size, stride of the innermost] of runs that are contiguous
    for size, stride in kept:
        if blocks and blocks[-1][1] == size * stride:
            blocks[-1] = [blocks[-1][0] * size, stride]
        else:
            blocks.append([size, stride])
    result = [0] * len(new)
    dim = len(new) - 1
    for size, stride in reversed(blocks):
        filled = 1
        while dim >= 0 and (filled < size or new[dim] == 1):
            result[dim] = filled * stride
            filled *= new[dim]
            dim -= 1
        if filled != size:
            return None
    while dim >= 0:
        if new[dim] != 1:
            return None
        result[dim] = 1
        dim -= 1
    return tuple(result)
