"""What is shown of one tensor of a checkpoint: which rank and file hold which box of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nbmerge import expressions as ex
from nbmerge.display import words
from nbmerge.display.maps import shard_map
from nbmerge.display.meshes import axis_label
from nbmerge.display.model import Cell, Column, Fact, Section, Table, View
from nbmerge.display.shards import along, cut_of, file_label, is_stored_once
from nbmerge.display.sparklines import magnitude_line, scientific
from nbmerge.errors import plural
from nbmerge.layout import Chunk, LazyTensor
from nbmerge.tensor_stats import TensorStats

_PIECES = 32
_ONCE = ", once; how many ranks held it is not in the files"


def tensor_view(tensor: LazyTensor) -> View:
    """Shape, dtype and placement, and which rank and file hold which box."""
    facts = [
        Fact("shape", words.shape_of(tensor.shape)),
        Fact("dtype", str(tensor.dtype)),
        Fact("bytes", words.exact_bytes(tensor.nbytes)),
        Fact("elements", f"{tensor.numel:,}"),
    ]
    for axis in tensor.mesh[:8]:
        pieces = along(tensor, axis)
        facts.append(Fact(f"on {axis_label(axis)}", words.elide(axis.placement) + (f": {pieces}" if pieces else "")))
    cut = cut_of(tensor) if tensor.chunks else None
    if not tensor.mesh:
        is_whole = tensor.placement == "whole"
        facts.append(Fact("placement", "not cut" if cut and cut.stored_once and is_whole else tensor.placement))
    if cut:
        facts.append(Fact("stored" if cut.stored_once else "cut", cut.in_words + (_ONCE if cut.stored_once else "")))
        section = _chunks_section(tensor)
    else:
        section = _made_of_section(tensor)
    stored = sum(1 for chunk in tensor.chunks if chunk.box.numel) or len(tensor.chunks) or len(_stored(tensor))
    sentence = (
        f"{words.elide(tensor.name)} is {words.shape_of(tensor.shape)} {tensor.dtype}, "
        f"{words.byte_size(tensor.nbytes)}, in {plural(stored, 'stored piece')}"
    )
    return View("Lazy tensor", sentence, facts=tuple(facts), sections=(section,))


def _chunks_section(tensor: LazyTensor) -> Section:
    """The map from boxes to ranks and files, with the columns that the checkpoint can fill."""
    ranks, copies = tensor.ranked, any(chunk.replicas for chunk in tensor.chunks)
    columns = [Column("box", code=True), Column("shape"), Column("bytes", number=True), Column("share", number=True)]
    if ranks:
        columns.append(Column("written by rank" if is_stored_once(tensor) else "rank", number=True))
    columns += [Column("copies on ranks")] if copies else []
    columns += [Column("file", code=True), Column("at byte", number=True)]
    rows = []
    for chunk in tensor.chunks[:_PIECES]:
        cells = [*_box_cells(chunk, tensor)]
        cells += [Cell(f"{chunk.rank:,}")] if ranks else []
        cells += [Cell(_copies_in_words([rank for rank, _ in chunk.replicas]))] if copies else []
        rows.append((*cells, Cell(words.elide(file_label(chunk.stored.file))), Cell(f"{chunk.stored.offset:,}")))
    hidden = max(len(tensor.chunks) - _PIECES, 0)
    table = Table(tuple(columns), tuple(rows), hidden=hidden, rows_are="boxes", rest=".chunks")
    summary = "1 box" if len(tensor.chunks) == 1 else f"{len(tensor.chunks):,} boxes"
    drawn = shard_map(tensor)
    return Section("Shard map", summary, grids=(drawn,) if drawn else (), tables=(table,), opened=True)


def _box_cells(chunk: Chunk, tensor: LazyTensor) -> tuple[Cell, ...]:
    nbytes = chunk.stored.nbytes
    return (
        Cell(str(chunk.box)),
        Cell(words.shape_of(chunk.box.shape)),
        Cell(words.byte_size(nbytes) if chunk.box.numel else "empty"),
        Cell(words.percent(chunk.box.numel, tensor.numel), bar=chunk.box.numel / (tensor.numel or 1)),
    )


def _copies_in_words(ranks: Sequence[int]) -> str:
    """`1, 3`; for many the first and how many; `·` for none."""
    if not ranks:
        return "·"
    shown = ", ".join(f"{rank:,}" for rank in ranks[:6])
    return shown if len(ranks) <= 6 else f"{shown} and {len(ranks) - 6:,} more"


def _stored(tensor: LazyTensor) -> list[ex.Stored]:
    return [node for node in ex.walk(tensor.expr) if isinstance(node, ex.Stored)]


def _made_of_section(tensor: LazyTensor) -> Section:
    """For a tensor that was cut out of others: the nodes of its expression, and the stored pieces below them."""
    kinds = Counter(type(node).__name__.lower() for node in ex.walk(tensor.expr))
    columns = (Column("stored piece", code=True), Column("shape"), Column("bytes", number=True))
    stored = _stored(tensor)
    rows = tuple(
        (
            Cell(words.elide(Path(node.file).name)),
            Cell(words.shape_of(node.shape)),
            Cell(words.byte_size(node.nbytes)),
        )
        for node in stored[:_PIECES]
    )
    table = Table(columns, rows, hidden=max(len(stored) - _PIECES, 0), rows_are="pieces", rest=".expr")
    summary = "an expression of " + ", ".join(f"{count:,} {name}" for name, count in kinds.items())
    return Section("Made of", summary, tables=(table,), opened=True)


def stats_view(stats: TensorStats) -> View:
    """One line: how many elements, how they are distributed, and a histogram of |x| by powers of two."""
    sampled = "" if stats.share >= 1 else f", a sample of {words.percent(stats.share, 1)}"
    said = [f"{words.elide(stats.name)}: {plural(stats.elements, 'element')} of {stats.dtype}{sampled}"]
    if stats.mean is not None and stats.std is not None:
        said.append(f"mean {scientific(stats.mean)}, std {scientific(stats.std)}")
    if stats.least is not None and stats.greatest is not None:
        said.append(f"from {scientific(stats.least)} to {scientific(stats.greatest)}")
    said.append(f"{stats.zero:,} zero")
    said += [f"{stats.nan:,} NaN"] * bool(stats.nan) + [f"{stats.infinity:,} infinite"] * bool(stats.infinity)
    return View("Statistics", ", ".join(said), drawing=f"|x| {magnitude_line(stats.magnitudes)}")
