"""Names as a tree of modules: `model` → `layers.{0..35}` → `self_attn` → `q_proj.weight`, with what each holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

_DOT = re.compile(r"\.(?![^{}]*\})")  # the dots of {0..35} separate nothing
_DEEPEST = 24  # levels; what is nested deeper stands under the last as it is


@dataclass(slots=True)
class Branch(Generic[T]):
    """A module or a tensor: its name below its parent's, and what is under it. depth: 0 at the top.

    leaf: what a tensor's row stands for; None for a module. leaves: all that are under it, itself included.
    """

    name: str
    depth: int = 0
    leaf: T | None = None
    leaves: list[T] = field(default_factory=list)
    _below: dict[str, Branch[T]] = field(default_factory=dict)

    def rows(self) -> Iterator[Branch[T]]:
        """This one, and all under it, in reading order."""
        yield self
        for branch in self._below.values():
            yield from branch.rows()


def tree(named: Iterable[tuple[str, T]]) -> list[Branch[T]]:
    """The rows of the tree of (name, value) pairs, in order. A module with one part shares its row: `norm.weight`."""
    root: Branch[T] = Branch("")
    for number, (name, value) in enumerate(named):
        at = root
        *modules, last = _DOT.split(name, maxsplit=_DEEPEST)
        for part in modules:
            at = at._below.setdefault(part, Branch(part))
            at.leaves.append(value)
        # Two tensors of one name (the same layers in two shapes) are two rows; so is a module named as a tensor.
        at._below[f"{last}\0{number}"] = Branch(last, leaf=value, leaves=[value])
    return [row for branch in root._below.values() for row in _settled(branch, 0).rows()]


def kept(rows: Sequence[tuple[int, float]], room: int) -> list[int]:
    """The numbers of the rows that stay where there is room for so many, in order.

    rows: depth and size of each. What is deepest goes first, as the sums above it tell of it; of that the smallest;
    of equals the last.
    """
    goes = sorted(range(len(rows)), key=lambda at: (-rows[at][0], rows[at][1], -at))[: max(len(rows) - room, 0)]
    return sorted(set(range(len(rows))).difference(goes))


def _settled(branch: Branch[T], depth: int) -> Branch[T]:
    """The branch with chains of single parts joined, and its depth said."""
    name = branch.name
    while branch.leaf is None and len(branch._below) == 1:
        (branch,) = branch._below.values()
        name = f"{name}.{branch.name}"
    below = {key: _settled(one, depth + 1) for key, one in branch._below.items()}
    return Branch(name, depth, branch.leaf, branch.leaves, below)
