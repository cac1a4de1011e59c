"""Compares two tensors bit by bit, a block at a time, wherever their bytes are."""

from __future__ import annotations

import numpy as np

from nbmerge.engine.lower import regions
from nbmerge.engine.read import read
from nbmerge.engine.sources import Sources
from nbmerge.errors import Problem
from nbmerge.expressions import Expr
from nbmerge.geometry import Shape
from nbmerge.layout import Drift, Equality


def first_difference(a: Expr, b: Expr, block_bytes: int, sources: Sources) -> Shape | None:
    """The index of the first element found whose bits differ; None where the tensors are equal.

    Both have the same shape and dtype. Holds two blocks in memory, or two tiles where `a` lies turned in its source.
    """
    for region in regions(a, block_bytes):
        unequal = read(a, region, sources) != read(b, region, sources)
        if unequal.any():
            at = np.unravel_index(int(unequal.argmax()), region.shape)
            return tuple(int(i) + start for i, start in zip(at, region.offset, strict=True))
    return None


class Comparison:
    """Collects what differs: as drift where the merge goes on, as problems where it must not. Thread-safe."""

    def __init__(self) -> None:
        self.drift: list[Drift] = []
        self.problems: list[Problem] = []

    def compare(self, equality: Equality, block_bytes: int, sources: Sources) -> None:
        """Compares one pair."""
        index = first_difference(equality.a, equality.b, block_bytes, sources)
        if index is None:
            return
        if equality.ranks is not None and equality.box is not None:
            at = tuple(start + i for start, i in zip(equality.box.offset, index, strict=True))
            if equality.strict:
                self.problems.append(_unequal_copies(equality.name, equality.ranks, at))
            else:
                self.drift.append(Drift(equality.name, equality.ranks, equality.box, at))
            return
        if equality.master:
            self.problems.append(_not_rounded(equality, index))
            return
        self.problems.append(
            Problem(
                f"{equality.name} is tied to {equality.kept}, and holds other values, first at {list(index)}",
                why="config.json ties the two, but training moved them apart; writing one loses the other",
                fix="set tie_word_embeddings to false in the config, and merge again",
                kind="contradiction",
            )
        )


def _unequal_copies(name: str, ranks: tuple[int, int], at: Shape) -> Problem:
    return Problem(
        f"{name}: ranks {ranks[0]} and {ranks[1]} hold different copies of it, first at {list(at)}",
        why="the files are of two saves, or training let copies drift apart that should be equal",
        fix="copy the files of all ranks again from one save; or write the lowest rank's copies all the same, and "
        "list what differs: --allow_drift",
        kind="contradiction",
    )


def _not_rounded(equality: Equality, index: Shape) -> Problem:
    offset = equality.box.offset if equality.box is not None else (0,) * len(index)
    at = [start + i for start, i in zip(offset, index, strict=True)]
    return Problem(
        f"{equality.name}: the master weight does not round to the model's {equality.b.dtype} weight, first at {at}",
        where=equality.master,
        why="the file and the model states are of two saves, or a conversion to the universal form mixed them up",
        fix="copy the files of all ranks again from one save; or take the model's own weights: --weights model; or "
        "write the masters all the same: --allow_drift",
        kind="contradiction",
    )
