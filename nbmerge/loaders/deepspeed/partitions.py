"""Cuts the optimizer's flat vectors into parameters, by the rules of DeepSpeed's ZeRO stages.

Stages 1 and 2 flatten each group of parameters and cut the vector over the ranks, so that a parameter may straddle
two of them. Stage 3 cuts each parameter of n elements over N ranks into ceil(n / N) elements each, the last padded.
Sources: deepspeed/runtime/zero/stage_1_and_2.py, stage3.py, bf16_optimizer.py; utils/zero_to_fp32.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nbmerge.dtypes import BY_NAME
from nbmerge.errors import Problem, listing, plural
from nbmerge.expressions import Paste, Stored
from nbmerge.geometry import Box, Shape, boxes_of_run, contiguous_strides
from nbmerge.layout import Chunk, LazyTensor, MeshAxis
from nbmerge.loaders.deepspeed.states import OptimizerStates, Shapes

_COPY = "copy the files of all ranks again from the machines that trained"


@dataclass(frozen=True, slots=True)
class Run:
    """Elements that one rank has of a flattened tensor, in the order of the tensor."""

    rank: int
    stored: Stored


Runs = dict[str, list[Run]]


def tensor_of_runs(name: str, shape: Shape, runs: Sequence[Run], ranks: int) -> LazyTensor:
    """The tensor whose flattened elements the runs are: as boxes of it, at most two for a row that a rank breaks off.

    ranks: how many share the tensor.
    """
    chunks: list[Chunk] = []
    at = 0
    for run in runs:
        start = 0
        for box in boxes_of_run(shape, at, run.stored.numel):
            chunks.append(Chunk(box, _part(run.stored, start, box.shape), run.rank))
            start += box.numel
        at += run.stored.numel
    mesh = (MeshAxis("dp", ranks, "Flat"),) if ranks > 1 else ()
    dtype = runs[0].stored.dtype if runs else BY_NAME["float32"]
    if len(chunks) == 1 and chunks[0].box == Box.whole(shape):
        return LazyTensor(name, chunks[0].stored, tuple(chunks), mesh)
    return LazyTensor(name, Paste(shape, dtype, tuple((c.box.offset, c.stored) for c in chunks)), tuple(chunks), mesh)


def _part(vector: Stored, start: int, shape: Shape) -> Stored:
    """Elements of a flat vector from `start` on, in a shape."""
    offset = vector.offset + start * vector.dtype.itemsize
    return Stored(vector.file, offset, shape, contiguous_strides(shape), vector.dtype)


def cut_groups(states: Sequence[OptimizerStates], groups: Sequence[Shapes]) -> tuple[Runs, list[Problem]]:
    """Stages 1 and 2: the runs of each parameter, and what does not fit. states: of the ranks in order."""
    if problem := _other_count(states, groups):
        return {}, [problem]
    runs: Runs = {}
    problems: list[Problem] = []
    for number, shapes in enumerate(groups):
        alignment = states[0].alignment[number] if number < len(states[0].alignment) else ()
        vectors = [state.vectors[number] for state in states]
        if alignment and len(alignment) != len(shapes):
            problems.append(
                Problem(
                    f"group {number} has {plural(len(shapes), 'parameter')} and {len(alignment)} alignment paddings",
                    where=str(states[0].path),
                    why="param_alignment_paddings has one number for each parameter",
                    fix=_COPY,
                    kind="contradiction",
                )
            )
        elif problem := _other_length(states, number, shapes, alignment):
            problems.append(problem)
        else:
            runs |= _cut(vectors, shapes, alignment)
    return runs, problems


def _cut(vectors: Sequence[Stored], shapes: Shapes, alignment: Sequence[int]) -> Runs:
    """The runs of the parameters of a group, whose vector is cut over the ranks."""
    ends = list(itertools.accumulate(vector.numel for vector in vectors))
    runs: Runs = {}
    at = rank = 0
    for (name, shape), skipped in zip(shapes.items(), alignment or (0,) * len(shapes), strict=True):
        stop = at + math.prod(shape)
        found: list[Run] = []
        while at < stop:
            if at >= ends[rank]:
                rank += 1
                continue
            length = min(stop, ends[rank]) - at
            inside = at - (ends[rank] - vectors[rank].numel)
            found.append(Run(rank, _part(vectors[rank], inside, (length,))))
            at += length
        runs[name] = found
        at = stop + skipped
    return runs


def _other_count(states: Sequence[OptimizerStates], groups: Sequence[Shapes]) -> Problem | None:
    counts = {len(state.vectors) for state in states}
    if counts == {len(groups)}:
        return None
    return Problem(
        f"the optimizer has {' or '.join(map(str, sorted(counts)))} groups, param_shapes {len(groups)}",
        where=str(states[0].path), why="the files are of two checkpoints", fix=_COPY, kind="contradiction",
    )  # fmt: skip


def _other_length(
    states: Sequence[OptimizerStates], number: int, shapes: Shapes, alignment: Sequence[int]
) -> Problem | None:
    """The problem of a group whose vectors hold another number of elements than its parameters have."""
    lengths = [state.vectors[number].numel for state in states]
    wanted = sum(math.prod(shape) for shape in shapes.values()) + sum(alignment)
    beyond = sum(lengths) - wanted
    if 0 <= beyond <= _padding(states, number, lengths[0]):
        return None
    return Problem(
        f"group {number} has {sum(lengths):,} elements on all ranks; its {plural(len(shapes), 'parameter')} and "
        f"their padding have {wanted:,}",
        where=f"{states[0].path} and the other ranks', with {listing(map(str, lengths), shown=8)} elements",
        why="a file is cut short, or of another checkpoint" if beyond < 0 else "the files are of two checkpoints",
        fix=_COPY,
        kind="contradiction",
    )


def _padding(states: Sequence[OptimizerStates], number: int, longest: int) -> int:
    """The most elements that may follow the last parameter of a group."""
    padded = sum(state.paddings[number] for state in states if number < len(state.paddings))
    if states[0].keeps_padding or padded > longest:  # older versions strip it from the last rank only
        return padded
    has_said = any(state.paddings for state in states)
    return 0 if has_said else 2 * len(states) - 1  # the vector's length is a multiple of 2 N


def cut_parameters(states: Sequence[OptimizerStates], groups: Sequence[Shapes]) -> tuple[Runs, list[Problem]]:
    """Stage 3: the runs of each parameter, and what does not fit. states: of the ranks in order."""
    shapes = {name: shape for group in groups for name, shape in group.items()}
    sizes = {name: -(-math.prod(shape) // len(states)) for name, shape in shapes.items()}
    wanted = sum(sizes.values())
    problems = [
        Problem(
            f"rank {rank} has {held:,} elements; its parts of {plural(len(shapes), 'parameter')} have {wanted:,}",
            where=str(state.path),
            why=_why_other(held, wanted),
            fix=_COPY,
            kind="contradiction",
        )
        for rank, state in enumerate(states)
        if (held := sum(vector.numel for vector in state.vectors)) != wanted
    ]
    if problems:
        return {}, problems
    taken = [_parts(state.vectors, sizes.values()) for state in states]
    runs: Runs = {}
    for name, shape in shapes.items():
        parts = [(rank, part) for rank, each in enumerate(taken) for part in next(each)]
        runs[name] = without_padding(parts, math.prod(shape))
    return runs, []


def _why_other(held: int, wanted: int) -> str:
    if not held:
        return "the masters were offloaded, to NVMe say, and not saved with it"
    if held < wanted:
        return "the file is of another checkpoint, or of a run with more ranks"
    return "the file is of another checkpoint, or of a run with fewer ranks"


def without_padding(parts: Sequence[tuple[int, Stored]], count: int) -> list[Run]:
    """The first `count` elements of the ranks' parts, put one after the other."""
    runs: list[Run] = []
    for rank, part in parts:
        length = min(part.numel, count)
        if length:
            runs.append(Run(rank, part if length == part.numel else _part(part, 0, (length,))))
            count -= length
    return runs


def _parts(vectors: Sequence[Stored], sizes: Iterable[int]) -> Iterator[list[Stored]]:
    """So many elements of a rank's vectors at a time, from one or from several of them."""
    number = at = 0
    for size in sizes:
        found: list[Stored] = []
        while size:
            length = min(size, vectors[number].numel - at)
            if length:
                found.append(_part(vectors[number], at, (length,)))
            size, at = size - length, at + length
            if size:
                number, at = number + 1, 0
        yield found
