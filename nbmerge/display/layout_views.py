"""How a checkpoint is sharded: mesh axes × groups of parameters, counted and drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from nbmerge.display import words
from nbmerge.display.maps import WRITER, mesh_map, shard_map
from nbmerge.display.meshes import axis_label, mesh_in_words, on_axis, placement_in_words, table_axes
from nbmerge.display.model import Cell, Column, Grid, Section, Table
from nbmerge.display.shards import Cut, cut_of
from nbmerge.errors import plural
from nbmerge.layout import Checkpoint, Kind

_LAYOUTS = 16
_AXES = 6
_DRAWN = 4  # placements of which a tensor is drawn
_SEVERAL = 2


def layout_sections(checkpoint: Checkpoint) -> Iterator[Section]:
    """A table of the placements, and drawings of which rank holds which box."""
    axes = table_axes(checkpoint, [one.first.mesh for one in checkpoint.kinds])[:_AXES]
    groups: dict[tuple[str, ...], list[tuple[Kind, Cut]]] = {}
    for one in checkpoint.kinds:
        on = tuple(on_axis(one.first, axis, checkpoint) for axis in axes) or (
            placement_in_words(one.first, checkpoint),
        )
        groups.setdefault(on, []).append((one, cut_of(one.first)))
    order = sorted(groups.items(), key=lambda item: -sum(one.nbytes for one, _ in item[1]))
    once = all(cut.stored_once for members in groups.values() for _, cut in members) and bool(groups)
    kinds = [kind for kind in Cut.KINDS if kind != "empty" or not once]
    places = [Column(f"on {axis_label(axis)}") for axis in axes] or [Column("placement")]
    counts = ("tensors", *kinds, "pieces" if once else "copies", "bytes", "share")
    columns = (*places, *(Column(title, number=True) for title in counts))
    total = checkpoint.nbytes
    rows = tuple(_layout_row(on, members, kinds, total) for on, members in order[:_LAYOUTS])
    table = Table(columns, rows, hidden=max(len(order) - _LAYOUTS, 0), rows_are="placements")
    mesh = f"mesh {mesh_in_words(checkpoint)}" if checkpoint.mesh else "no device mesh"
    summary = f"{mesh}, {plural(checkpoint.world_size, 'rank')}, {plural(len(groups), 'placement')}"
    if checkpoint.whole:
        yield Section("Shard layout", "none: the files hold whole tensors")
        return
    notes = (_LEGEND_ONCE if once else _LEGEND,)
    yield Section("Shard layout", summary, tables=(table,), notes=notes, opened=True)
    drawn, said = _said_once([*_drawings(checkpoint, order)])
    if drawn:
        what = "which rank holds which box, of the largest tensors"
        yield Section("Shard map", what, grids=tuple(drawn), notes=said, opened=True)


def _said_once(grids: Sequence[Grid]) -> tuple[Sequence[Grid], tuple[str, ...]]:
    """The drawings without what each would say of its ranks, and that as a note on all of them."""
    if sum(WRITER in grid.notes for grid in grids) < _SEVERAL:
        return grids, ()
    return [replace(grid, notes=tuple(note for note in grid.notes if note != WRITER)) for grid in grids], (WRITER,)


def _drawings(
    checkpoint: Checkpoint, order: Sequence[tuple[tuple[str, ...], list[tuple[Kind, Cut]]]]
) -> Iterator[Grid]:
    """The mesh, and for each placement and way of being cut the boxes of its largest tensor."""
    mesh = mesh_map(checkpoint)
    if mesh:
        yield mesh
    kinds: dict[tuple[tuple[str, ...], str], list[Kind]] = {}
    for on, members in order:
        for one, cut in members:
            kinds.setdefault((on, cut.kind), []).append(one)
    by_bytes = sorted(kinds.items(), key=lambda item: -sum(one.nbytes for one in item[1]))
    yield from islice(filter(None, (_drawing(on, kind, alike) for (on, kind), alike in by_bytes)), _DRAWN)


def _drawing(on: tuple[str, ...], kind: str, alike: Sequence[Kind]) -> Grid | None:
    """The boxes of the largest of them."""
    largest = max(alike, key=lambda one: one.first.nbytes).first
    others = sum(one.count for one in alike) - 1
    title = f"{', '.join(on)} ({kind}): {words.elide(largest.name)} {words.shape_of(largest.shape)}"
    return shard_map(largest, title + (f", and {others:,} more" if others else ""))


_LEGEND = (
    "even: every rank holds as many elements; uneven: some hold fewer; empty: some rank holds nothing of it; "
    "whole: not cut; copies: ranks that hold the same piece"
)
_LEGEND_ONCE = (
    "even: all stored pieces have the same shape; uneven: some are smaller; whole: stored in one piece; pieces: of "
    "one tensor, where stacked layers and experts are a piece each; one copy is stored, and how many ranks held it "
    "is not in the files"
)


def _layout_row(
    on: tuple[str, ...], members: list[tuple[Kind, Cut]], kinds: Sequence[str], total: int
) -> tuple[Cell, ...]:
    cuts: Counter[str] = Counter()
    for one, cut in members:
        cuts[cut.kind] += one.count
    counted = {cut.pieces if cut.stored_once else cut.copies for _, cut in members}
    nbytes = sum(one.nbytes for one, _ in members)
    return (
        *(Cell(words.elide(text, 60)) for text in on),
        Cell(f"{cuts.total():,}"),
        *(Cell(f"{cuts[kind]:,}" if cuts[kind] else "·") for kind in kinds),
        Cell(f"{min(counted):,}" if len(counted) == 1 else f"{min(counted):,} to {max(counted):,}"),
        Cell(words.byte_size(nbytes)),
        Cell(words.percent(nbytes, total), bar=nbytes / total if total else 0.0),
    )
