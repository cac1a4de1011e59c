"""Drawings of where things lie: the boxes of a tensor with the ranks that hold each, and the ranks of a device mesh."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nbmerge.collapse import even_step
from nbmerge.display import words
from nbmerge.display.meshes import axis_label, ordered
from nbmerge.display.model import Grid, Patch
from nbmerge.display.shards import holders_of, is_stored_once
from nbmerge.geometry import unravel
from nbmerge.layout import Checkpoint, Chunk, LazyTensor

_MOST = 8  # rows and columns that are drawn
_LISTED = 4  # ranks of a patch that are listed one by one where they make no range
_FIRST, _LAST = _MOST // 2, _MOST // 2 - 1  # of more than that
WRITER = "the rank is the one that wrote it"
_ENDS = f"the first {_FIRST} and the last {_LAST} are drawn"
_GAP = Patch("⋯")

Interval = tuple[int, int]


def shard_map(tensor: LazyTensor, title: str = "") -> Grid | None:
    """The boxes of the tensor as they lie in it, each with its ranks.

    Along the two last dimensions that are cut; of further ones the first place is drawn, and the notes say so. None
    where the boxes make no grid, as with runs of a flattened tensor, or where nothing is stored.
    """
    cuts = _Cuts.of(tensor)
    if cuts is None:
        return None
    cut = [dim for dim, found in enumerate(cuts.intervals) if len(found) > 1]
    rows, columns = _drawn(cut, len(tensor.shape))
    fixed: dict[int | None, Interval] = {dim: cuts.intervals[dim][0] for dim in cut if dim not in (rows, columns)}
    downward = _shown([(0, 0)] if rows is None else cuts.intervals[rows])
    across = _shown([(0, 0)] if columns is None else cuts.intervals[columns])
    return Grid(
        title,
        down=f"dim {rows}" if rows is not None else "",
        across=f"dim {columns}" if columns is not None else "",
        row_heads=_heads(downward, drawn=rows is not None),
        column_heads=_heads(across, drawn=columns is not None),
        patches=_patches(
            downward,
            across,
            lambda down, right: _patch(cuts.at({**fixed, rows: down, columns: right}), tensor),
        ),
        sizes=_sizes(downward),
        notes=tuple(_notes(tensor, cuts, (rows, columns), fixed)),
    )


def mesh_map(checkpoint: Checkpoint) -> Grid | None:
    """The ranks of a mesh of two dimensions or more: rows over all but the last, columns over the last.

    None where the mesh is a line, or where its axes do not count the ranks.
    """
    mesh = checkpoint.mesh
    if len(mesh) < 2 or math.prod(axis.size for axis in mesh) != checkpoint.world_size:
        return None
    *outer, last = mesh
    sizes = tuple(axis.size for axis in outer)
    rows, columns = math.prod(sizes), last.size
    downward, across = _shown([(row, row) for row in range(rows)]), _shown([(one, one) for one in range(columns)])

    def patch(down: Interval, right: Interval) -> Patch:
        rank = down[0] * columns + right[0]
        return Patch(f"rank {rank:,}", rank)

    notes = [f"{count:,} {what}; {_ENDS}" for count, what in ((rows, "rows"), (columns, "columns")) if count > _MOST]
    return Grid(
        "Device mesh " + " × ".join(axis_label(axis) for axis in ordered(mesh)),
        down=" · ".join(words.elide(axis.name, 24) for axis in outer),
        across=words.elide(last.name, 24),
        row_heads=tuple("⋯" if one is None else _place(one[0], sizes) for one in downward),
        column_heads=tuple("⋯" if one is None else str(one[0]) for one in across),
        patches=_patches(downward, across, patch),
        notes=tuple(notes),
    )


def ranks_in_words(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0..7`, `ranks 0, 2`, `ranks 0..6 step 2`; of many without a rule the first ones and how many."""
    found = sorted(set(ranks))
    if len(found) == 1:
        return f"rank {found[0]:,}"
    step = even_step(found)
    if step is not None and len(found) > 2:
        return f"ranks {found[0]:,}..{found[-1]:,}" + (f" step {step}" if step > 1 else "")
    shown = ", ".join(f"{rank:,}" for rank in found[:_LISTED])
    return f"ranks {shown}" + (f" and {len(found) - _LISTED:,} more" if len(found) > _LISTED else "")


@dataclass(frozen=True)
class _Cuts:
    """The intervals into which the boxes cut each dimension, and the box at each place of the grid they make."""

    intervals: tuple[tuple[Interval, ...], ...]
    chunks: dict[tuple[Interval, ...], Chunk]

    @staticmethod
    def of(tensor: LazyTensor) -> _Cuts | None:
        """None where the boxes make no grid, or there is none that holds anything."""
        filled = [chunk for chunk in tensor.chunks if chunk.box.numel]
        if not filled or any(len(chunk.box.shape) != len(tensor.shape) for chunk in filled):
            return None
        chunks = {tuple(zip(chunk.box.offset, chunk.box.stop, strict=True)): chunk for chunk in filled}
        intervals = tuple(tuple(sorted(set(dim))) for dim in zip(*chunks, strict=True))
        # A grid has a box at each place, and the intervals of a dimension lie one after the other.
        whole = len(chunks) == math.prod(map(len, intervals))
        apart = all(a[1] <= b[0] for dim in intervals for a, b in itertools.pairwise(dim))
        return _Cuts(intervals, chunks) if whole and apart else None

    def at(self, place: dict[int | None, Interval]) -> Chunk:
        """The box at a place that is given by the dimensions that are cut."""
        return self.chunks[tuple(place.get(dim, found[0]) for dim, found in enumerate(self.intervals))]


def _drawn(cut: Sequence[int], dims: int) -> tuple[int | None, int | None]:
    """The dimension drawn downward and the one drawn across."""
    if len(cut) > 1:
        return cut[-2], cut[-1]
    if not cut:
        return None, None
    return (None, cut[0]) if dims > 1 and cut[0] == dims - 1 else (cut[0], None)


def _shown(intervals: Sequence[Interval]) -> list[Interval | None]:
    """All of them, or the first and the last with None between."""
    if len(intervals) <= _MOST:
        return list(intervals)
    return [*intervals[:_FIRST], None, *intervals[-_LAST:]]


def _patches(
    downward: Sequence[Interval | None], across: Sequence[Interval | None], make: Callable[[Interval, Interval], Patch]
) -> tuple[tuple[Patch, ...], ...]:
    """The rows of a grid, with a gap for what is not drawn."""
    return tuple(
        tuple(_GAP if down is None or right is None else make(down, right) for right in across) for down in downward
    )


def _heads(intervals: Sequence[Interval | None], *, drawn: bool) -> tuple[str, ...]:
    if not drawn:
        return ("",)
    return tuple("⋯" if one is None else f"{one[0]}:{one[1]}" for one in intervals)


def _sizes(intervals: Sequence[Interval | None]) -> tuple[float, ...]:
    lengths = [0 if one is None else one[1] - one[0] for one in intervals]
    return tuple(length / (max(lengths) or 1) for length in lengths)


def _patch(chunk: Chunk, tensor: LazyTensor) -> Patch:
    if not tensor.ranked:
        return Patch(words.shape_of(chunk.box.shape), 0)
    return Patch(ranks_in_words(list(holders_of(chunk))), chunk.rank)


def _notes(
    tensor: LazyTensor, cuts: _Cuts, drawn: tuple[int | None, int | None], fixed: dict[int | None, Interval]
) -> list[str]:
    of = {dim: f"dim {dim} is in {len(found):,} pieces" for dim, found in enumerate(cuts.intervals)}
    notes = [f"{of[dim]}; {_ENDS}" for dim in drawn if dim is not None and len(cuts.intervals[dim]) > _MOST]
    notes += [f"{of[dim]}; {start}:{stop} is drawn" for dim, (start, stop) in fixed.items() if dim is not None]
    empty = sorted({rank for chunk in tensor.chunks if not chunk.box.numel for rank in holders_of(chunk)})
    if empty:
        notes.append(f"{ranks_in_words(empty)}: empty, nothing of it")
    if is_stored_once(tensor) and tensor.ranked:
        notes.append(WRITER)
    return notes


def _place(row: int, sizes: Sequence[int]) -> str:
    return " · ".join(map(str, unravel(row, tuple(sizes))))
