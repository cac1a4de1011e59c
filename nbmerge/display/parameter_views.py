"""The parameters of a checkpoint as a tree of modules, in which repeated layers share a row."""

from __future__ import annotations

from nbmerge.display import words
from nbmerge.display.meshes import placement_in_words
from nbmerge.display.model import Cell, Column, Section, Table
from nbmerge.display.tree import Branch, kept, tree
from nbmerge.errors import plural
from nbmerge.layout import Checkpoint, Kind

_ROWS = 60
_OPENED = 24  # rows up to which the table starts unfolded


def parameters_section(checkpoint: Checkpoint) -> Section:
    """A row for each kind of parameter, and for each module with the sums of what is under it."""
    columns = (
        Column("parameter", code=True),
        Column("tensors", number=True),
        Column("shape"),
        Column("dtype"),
        Column("placement"),
        Column("bytes", number=True),
        Column("share", number=True),
    )
    branches = tree((one.group.name, one) for one in checkpoint.kinds)
    total = checkpoint.nbytes
    left = kept([(branch.depth, sum(one.nbytes for one in branch.leaves)) for branch in branches], _ROWS)
    rows = tuple(_branch_row(branches[at], checkpoint, total) for at in left)
    table = Table(columns, rows, hidden=len(branches) - len(rows), rows_are="rows", rest=".tensors")
    tensors = plural(len(checkpoint.tensors), "tensor")
    summary = f"{tensors} of {plural(len(checkpoint.kinds), 'kind')}; repeated layers share a row"
    return Section("Parameters", summary, tables=(table,), opened=len(rows) <= _OPENED)


def _branch_row(branch: Branch[Kind], checkpoint: Checkpoint, total: int) -> tuple[Cell, ...]:
    """A tensor's row, or a module's with the sums of what is under it."""
    nbytes = sum(one.nbytes for one in branch.leaves)
    one = branch.leaf
    details = ("", "", "")
    if one:
        placement = words.elide(placement_in_words(one.first, checkpoint), 120)
        details = (words.shape_of(one.first.shape), str(one.first.dtype), placement)
    return (
        Cell(words.elide(branch.name), indent=branch.depth),
        Cell(f"{sum(one.count for one in branch.leaves):,}"),
        *map(Cell, details),
        Cell(words.byte_size(nbytes)),
        Cell(words.percent(nbytes, total), bar=nbytes / (total or 1) if one else None),
    )
