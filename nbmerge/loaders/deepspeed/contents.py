"""Which tensor of a checkpoint comes from where: fp32 masters, frozen weights, buffers, and names that share data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nbmerge.dtypes import DType
from nbmerge.errors import Problem, plural
from nbmerge.expressions import Cast, Stored
from nbmerge.geometry import Box, Shape
from nbmerge.layout import Chunk, LazyTensor
from nbmerge.loaders.deepspeed.partitions import tensor_of_runs, without_padding
from nbmerge.loaders.deepspeed.states import HALVES, ModelStates


@dataclass
class Contents:
    """The tensors that were found, and what a reader should know of them.

    dtype: of the masters, where there are any; widened: 16-bit tensors that have no master, by name, with their dtype;
    lost: parameters whose data is in no file; remarks: what looks odd, in words; problems: what does not fit.
    """

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    dtype: DType | None = None
    lost: list[str] = field(default_factory=list)
    widened: dict[str, DType] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    problems: list[Problem] = field(default_factory=list)

    def notes(self) -> Iterator[str]:
        """What looks odd and what was widened, in words."""
        yield from self.remarks
        if self.widened:
            dtypes = " and ".join(sorted({dtype.name for dtype in self.widened.values()}))
            yield (
                f"{plural(len(self.widened), 'tensor')} without an fp32 master (frozen weights, buffers) widened from "
                f"{dtypes} to float32"
            )


def module_contents(states: ModelStates) -> Contents:
    """The weights that the model itself has, 16-bit ones where it was trained so."""
    return Contents({name: _whole(name, stored) for name, stored in states.module.items()})


def master_contents(masters: Mapping[str, LazyTensor], states: Sequence[ModelStates], ranks: int) -> Contents:
    """The masters, and beside them what the optimizer does not have. states: of each rank at stage 3, else of one.

    A name without data of its own is given the tensor that it shares.
    """
    first = states[0]
    found = Contents(dtype=next((tensor.dtype for tensor in masters.values()), None))
    frozen = _frozen(states, ranks, found.problems)
    by_place = {_place(stored): name for name, stored in first.module.items() if name in masters and stored.numel}
    for name in dict.fromkeys([*first.module, *masters, *frozen, *first.shared]):
        stored = first.module.get(name)
        holder = name if name in masters or name in frozen else first.shared.get(name, name)
        if stored is not None and holder not in masters:
            holder = by_place.get(_place(stored), holder)  # versions before 0.8 don't say what is shared
        if holder in masters:
            found.tensors[name] = replace(masters[holder], name=name)
        elif holder in frozen:
            found.tensors[name] = _widened(replace(frozen[holder], name=name), found)
        elif stored is not None and not _is_placeholder(stored, name, states):
            found.tensors[name] = _widened(_whole(name, stored), found)
        elif stored is not None:
            found.lost.append(name)
    return found


def _place(stored: Stored) -> tuple[str, int, Shape, Shape]:
    return stored.file, stored.offset, stored.shape, stored.strides


def _is_placeholder(stored: Stored, name: str, states: Sequence[ModelStates]) -> bool:
    """Whether an entry of the module stands for a parameter whose data stage 3 has elsewhere."""
    return stored.numel == 0 and states[0].stage not in (0, 1, 2) and name not in states[0].buffers


def _whole(name: str, stored: Stored) -> LazyTensor:
    """A tensor of the model states, which its first rank saved."""
    return LazyTensor(name, stored, (Chunk(Box.whole(stored.shape), stored, 0),))


def _widened(tensor: LazyTensor, found: Contents) -> LazyTensor:
    """The tensor in the masters' dtype, where it has 16 bits, so that the result has one dtype."""
    to = found.dtype
    if to is None or tensor.dtype.name not in HALVES or to.name in HALVES:
        return tensor
    found.widened[tensor.name] = tensor.dtype
    return replace(tensor, expr=Cast(tensor.expr, to))


def _frozen(states: Sequence[ModelStates], ranks: int, problems: list[Problem]) -> dict[str, LazyTensor]:
    """The frozen parameters: whole in the fragments of stage 2, cut over the ranks in those of stage 3."""
    tensors: dict[str, LazyTensor] = {}
    for name, shape in (states[0].frozen_shapes or {}).items():
        found = [(state.frozen or {}).get(name) for state in states]
        parts = [part for part in found if part is not None]
        if parts and found[0] is not None and found[0].shape == shape:
            tensors[name] = _whole(name, found[0])
            continue
        count = math.prod(shape)
        size = -(-count // len(states))
        odd = [i for i, part in enumerate(found) if part is None or part.shape != (size,) or not part.is_contiguous]
        if odd:
            problems.append(
                Problem(
                    f"{plural(len(odd), 'rank')} {'has' if len(odd) == 1 else 'have'} no part of {size:,} elements of "
                    f"the frozen parameter {name}, of shape {list(shape)}",
                    where=str(states[odd[0]].path),
                    why="the files are of two checkpoints",
                    fix="copy the files of all ranks again from the machines that trained",
                    kind="contradiction",
                )
            )
        else:
            runs = without_padding(list(enumerate(parts)), count)
            tensors[name] = tensor_of_runs(name, shape, runs, ranks)
    return tensors
