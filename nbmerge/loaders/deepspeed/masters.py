"""The fp32 masters of one model-parallel rank: its optimizer files, put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from nbmerge.errors import Problem, listing
from nbmerge.layout import LazyTensor
from nbmerge.loaders.base import OpenOptions
from nbmerge.loaders.deepspeed.partitions import cut_groups, cut_parameters, tensor_of_runs
from nbmerge.loaders.deepspeed.refusals import check_ranks, world_size_of
from nbmerge.loaders.deepspeed.states import ModelStates, OptimizerStates
from nbmerge.loaders.reading import read_files


@dataclass(frozen=True)
class Masters:
    """The masters by name, over how many ranks they lie, the ZeRO stage where the files say it, and what is wrong.

    remarks: what looks odd and need not be wrong, in words.
    """

    tensors: Mapping[str, LazyTensor]
    ranks: int
    stage: int | None = None
    problems: list[Problem] = field(default_factory=list)
    remarks: tuple[str, ...] = ()


def read_masters(paths: Mapping[int, Path], states: ModelStates, options: OpenOptions) -> Masters:
    """The masters in the optimizer files of all ranks; the model states have their names and shapes.

    Raises IncompleteCheckpointError and InconsistentCheckpointError for missing ranks and for those of another run,
    UnsafePickleError, and CheckpointError for a file that is not as DeepSpeed writes it.
    """
    found = read_files(paths, options, partial(OptimizerStates.read, trust_pickle=options.trust_pickle))
    check_ranks(paths, world_size_of(found))
    optimizer = tuple(found.values())
    runs, problems = (cut_parameters if optimizer[0].is_parted else cut_groups)(optimizer, states.groups)
    shapes = {name: shape for group in states.groups for name, shape in group.items()}
    tensors = {name: tensor_of_runs(name, shapes[name], parts, len(optimizer)) for name, parts in runs.items()}
    return Masters(tensors, len(optimizer), optimizer[0].stage, problems, tuple(_odd_rates(optimizer)))


def _odd_rates(states: Sequence[OptimizerStates]) -> Iterator[str]:
    """Learning rates are the same on all ranks, unless each has a scheduler that follows its own loss."""
    by_rates = {state.rates: state.path.name for state in states if state.rates}
    if len(by_rates) > 1:
        rates = (f"{name} ({', '.join(map(str, rates))})" for rates, name in by_rates.items())
        yield f"the ranks' learning rates differ: {listing(rates, shown=4)}; a file may be of another step"
