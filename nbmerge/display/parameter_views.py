"""The parameters of a checkpoint as a tree of modules, in which repeated layers share a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nbmerge.display import words
from nbmerge.display.collapse import Group, collapse
from nbmerge.display.meshes import placement_in_words
from nbmerge.display.model import Cell, Column, Section, Table
from nbmerge.display.tree import Branch, tree
from nbmerge.errors import plural
from nbmerge.layout import Checkpoint, LazyTensor

_ROWS = 60
_OPENED = 24  # rows up to which the table starts unfolded


@dataclass(frozen=True, slots=True)
class Parameters:
    """Tensors of one name but for its numbers, and of one shape, dtype and mesh, so that one stands for all."""

    group: Group
    first: LazyTensor

    @property
    def count(self) -> int:
        return self.group.count

    @property
    def nbytes(self) -> int:
        return self.count * self.first.nbytes


def parameters_of(tensors: Mapping[str, LazyTensor]) -> list[Parameters]:
    """The tensors of a checkpoint, alike ones together."""
    named = ((name, (t.expr.shape, t.expr.dtype, t.mesh, len(t.chunks))) for name, t in tensors.items())
    return [Parameters(group, tensors[group.first]) for group in collapse(named)]


def parameters_section(checkpoint: Checkpoint, parameters: Sequence[Parameters], total: int) -> Section:
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
    branches = tree((one.group.name, one) for one in parameters)
    rows = tuple(_branch_row(branch, checkpoint, total) for branch in branches[:_ROWS])
    table = Table(columns, rows, hidden=max(len(branches) - _ROWS, 0), rows_are="rows", rest=".tensors")
    tensors = plural(sum(one.count for one in parameters), "tensor")
    summary = f"{tensors} of {plural(len(parameters), 'kind')}; repeated layers share a row"
    return Section("Parameters", summary, tables=(table,), opened=len(rows) <= _OPENED)


def _branch_row(branch: Branch[Parameters], checkpoint: Checkpoint, total: int) -> tuple[Cell, ...]:
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
