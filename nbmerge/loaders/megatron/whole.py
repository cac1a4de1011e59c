"""Puts what the rank files hold of one tensor together: one lazy tensor, or the problem that prevents it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nbmerge.errors import Problem, listing, plural
from nbmerge.explaining.table import likely_cause_either_way
from nbmerge.expressions import Stored
from nbmerge.geometry import Box
from nbmerge.layout import LazyTensor, MeshAxis
from nbmerge.loaders.assemble import paste, two_opinions
from nbmerge.loaders.megatron.files import COPY_AGAIN
from nbmerge.loaders.megatron.grid import At, Grid
from nbmerge.loaders.megatron.names import Held
from nbmerge.loaders.megatron.parallel import TensorCut


def disagreement(name: str, held: Sequence[Held], grid: Grid, *, of_one_expert: bool) -> Problem | None:
    """What keeps the pieces from being of one tensor: a rank without it, another shape, another dtype.

    A tensor that a stage has is on all ranks of the stage, one expert's on those of its expert rank.
    """
    stages, experts = {one.at.pp for one in held}, {one.at.ep for one in held}
    have = {one.at for one in held}
    expected = (at for stage in stages for at in grid.stages[stage])
    absent = [at for at in expected if at not in have and (not of_one_expert or at.ep in experts)]
    if absent:
        return Problem(
            f"{name} is missing from {plural(len(absent), 'file')}", where=listing(grid.files[at] for at in absent),
            why="every rank of a pipeline stage stores the same names", fix=COPY_AGAIN, kind="missing",
        )  # fmt: skip
    for what in ("shape", "dtype"):
        said = ((str(list(one.stored.shape) if what == "shape" else one.stored.dtype), one) for one in held)
        if two := two_opinions(said):
            (a, first), (b, second) = two
            one, other = first[0].stored.shape, second[0].stored.shape
            return Problem(
                f"the ranks disagree on the {what} of {name}: {a} and {b}",
                where=f"{grid.files[first[0].at]}; {grid.files[second[0].at]}",
                why="the files of the ranks are not of one save" + likely_cause_either_way(name, one, other, grid.tp),
                fix=COPY_AGAIN,
                kind="contradiction",
            )
    return None


@dataclass(frozen=True)
class Sharding:
    """How files stand to each other for one tensor: `shard_of` says which of `shards` a file holds.

    axis: the name that displays give it.
    """

    axis: str
    shards: int
    shard_of: Callable[[At], int]

    def mesh(self, cut: TensorCut) -> tuple[MeshAxis, ...]:
        """The tensor's own mesh; none where there is one shard."""
        return (MeshAxis(self.axis, self.shards, str(cut)),) if self.shards > 1 else ()


def put_together(
    name: str, held: Sequence[Held], grid: Grid, cut: TensorCut, sharding: Sharding, *, stacked: bool = False
) -> LazyTensor | Problem:
    """One tensor from what each file holds. What a later file holds again becomes a replica.

    stacked: the first dimension counts experts, of which each expert rank has as many.
    """
    shape, shards = held[0].stored.shape, sharding.shards
    found: list[tuple[int, Box, Stored]] = []
    for one in held:
        shift = (one.at.ep * shape[0] if stacked else 0, *(0 for _ in shape[1:]))[: len(shape)]
        for box, inside in cut.boxes(shape, shards, sharding.shard_of(one.at)):
            found.append((grid.ranks[one.at], box.shift(shift), one.stored.region(inside)))
    whole, mesh = cut.whole(shape, shards), sharding.mesh(cut)
    if stacked and grid.ep > 1:
        whole = (whole[0] * grid.ep, *whole[1:])
        mesh = (MeshAxis("ep", grid.ep, "Shard(0)"), *mesh)
    return paste(name, whole, found, mesh)
