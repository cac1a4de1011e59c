"""Forms of DeepSpeed checkpoints that cannot be put together here: each refused in words, before any file is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from nbmerge.errors import (
    IncompleteCheckpointError,
    InconsistentCheckpointError,
    UnsupportedCheckpointError,
    listing,
    plural,
)
from nbmerge.loaders.deepspeed.directories import TagFiles
from nbmerge.loaders.deepspeed.states import ModelStates, OptimizerStates

_RANK = re.compile(r"pp_rank_\d+_")


def refuse_forms(files: TagFiles) -> None:
    """Raises UnsupportedCheckpointError for experts and tensor parallelism, InconsistentCheckpointError for a mix."""
    if files.experts:
        raise UnsupportedCheckpointError(
            f"the checkpoint has {plural(len(files.experts), 'file')} of expert ranks: "
            f"{listing(path.name for path in files.experts)}",
            where=str(files.path),
            why="the experts of DeepSpeed's MoE layers lie in files of their own, which this version does not read",
            fix="save from the training job with engine.save_16bit_model, or gather the experts there",
        )
    if files.repeated:
        raise InconsistentCheckpointError(
            f"{plural(len(files.repeated), 'rank')} with two optimizer files, {files.repeated[0].name} for one",
            where=str(files.path),
            why="two runs, of other precisions, saved under one tag",
            fix="move the files of one run to a directory of their own",
        )
    if files.model and files.parted and not files.universal:
        raise InconsistentCheckpointError(
            "the model states of ZeRO stage 3 and of another stage lie under one tag",
            where=f"{files.path}: {listing(path.name for path in (files.model[0], *files.parted[0].values()))}",
            why="two runs saved under the same tag",
            fix="move the files of one run to a directory of their own",
        )
    ranks = files.model_parallel_ranks
    if len(ranks) > 1 and not files.layers and not files.universal:
        raise tensor_parallel(files, len(ranks))


def tensor_parallel(files: TagFiles, ranks: int) -> UnsupportedCheckpointError:
    """The error for a model that was cut over several tensor-parallel ranks."""
    names = [path.name for path in files.model.values()] or [
        next(iter(ranks.values())).name for ranks in files.parted.values()
    ]
    return UnsupportedCheckpointError(
        f"the model was cut over {ranks} tensor-parallel ranks: {listing(names, shown=4)}",
        where=str(files.path),
        why="DeepSpeed's files don't say along which dimension each tensor was cut (Megatron-DeepSpeed, AutoTP)",
        fix="convert it with deepspeed/checkpoint/ds_to_universal.py in the training environment, and pass the "
        "directory that it writes",
    )


def check_ranks(files: Mapping[int, Path], world_size: int) -> None:
    """Raises IncompleteCheckpointError for missing ranks, InconsistentCheckpointError for ranks too many."""
    first = next(iter(files.values()))
    absent = [rank for rank in range(world_size) if rank not in files]
    beyond = [path.name for rank, path in files.items() if rank >= world_size]
    if absent:
        raise IncompleteCheckpointError(
            f"{plural(len(absent), 'rank')} of {world_size} {'is' if len(absent) == 1 else 'are'} missing",
            where=f"{first.parent}: {listing(_RANK.sub(f'pp_rank_{rank}_', first.name) for rank in absent)}",
            why="each node saves to its own disk, or saving was stopped",
            fix="copy the missing files from the machines that trained; without them the weights are incomplete",
        )
    if beyond:
        raise InconsistentCheckpointError(
            f"files of ranks beyond the {world_size} that shared the optimizer: {listing(beyond)}",
            where=str(first.parent),
            why="a run with more ranks saved under the same tag",
            fix="move them away if they are older than the others",
        )


def check_one_step(states: Sequence[ModelStates], *, same_shapes: bool) -> None:
    """Raises InconsistentCheckpointError for model states of several steps, or with other shapes on another rank."""
    first = states[0]
    others = [state for state in states if state.step != first.step]
    if others:
        raise InconsistentCheckpointError(
            f"the model states are of several steps: {first.step} in {first.path.name}, "
            + listing((f"{state.step} in {state.path.name}" for state in others), shown=4),
            where=str(first.path.parent),
            why="files of two saves lie under one tag",
            fix="copy the files of all ranks again from the machines that trained",
        )
    others = [state for state in states if same_shapes and state.groups != first.groups]
    if others:
        raise InconsistentCheckpointError(
            f"{listing((state.path.name for state in others), shown=4)} and {first.path.name} name other parameters or "
            "shapes",
            where=str(first.path.parent),
            why="the files are of two checkpoints: every rank of ZeRO stage 3 has the same param_shapes",
            fix="copy the files of all ranks again from the machines that trained",
        )


def world_size_of(states: Mapping[int, OptimizerStates]) -> int:
    """How many ranks share the optimizer, as its files say; without that, how many files there are.

    Raises InconsistentCheckpointError where they contradict each other.
    """
    said = {rank: state.partitions for rank, state in states.items() if state.partitions}
    if len(set(said.values())) > 1:
        kinds = {count: states[rank].path.name for rank, count in said.items()}
        raise InconsistentCheckpointError(
            f"the files are of runs with {' and '.join(map(str, sorted(kinds)))} ranks: {listing(kinds.values())}",
            where=str(next(iter(states.values())).path.parent),
            why="a run with another number of ranks saved under the same tag",
            fix="move the files of one run to a directory of their own",
        )
    return max(said.values(), default=max(states) + 1)
