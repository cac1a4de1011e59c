"""Megatron's distributed checkpoints: `torch_dist`, and Megatron-FSDP's `fsdp_dtensor`, one index and `.distcp` files.

Tensors lie in them under global names and shapes, so that how many ranks wrote them does not matter.
Source: megatron/core/dist_checkpointing/strategies/torch.py (core 0.11 to 0.20).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from nbmerge.errors import IncompleteCheckpointError, Problem, plural
from nbmerge.layout import LazyTensor, SourceFile
from nbmerge.loaders.assemble import paste
from nbmerge.loaders.base import OpenOptions
from nbmerge.loaders.dcp.metadata import METADATA, read_index
from nbmerge.loaders.dcp.storage import locate, rank_of
from nbmerge.loaders.megatron.adapter_forms import in_order
from nbmerge.loaders.megatron.contents import Contents
from nbmerge.loaders.megatron.recorded import NOTHING, Recorded, in_index
from nbmerge.loaders.megatron.sizes import ParallelSizes

# What lies beside the weights under a first word of its own: optimizer, its scheduler, random number generators.
_BESIDE = re.compile(
    r"^(?:optimizer|chained_\d+|opt_param_scheduler|lr_scheduler|rng_state|rerun_state_machine_state|common_state"
    r"|iteration|args|content_metadata|num_floating_point_operations_so_far)\b"
)
_EXTRA = "_extra_state"


def is_weight(name: str) -> bool:
    """Whether an entry of the index is a tensor of the model, by its name."""
    return not _BESIDE.match(name) and _EXTRA not in name


def open_torch_dist(directory: Path, options: OpenOptions, recorded: Recorded = NOTHING) -> Contents:
    """The weights of a distributed checkpoint. Without tensors where it holds only optimizer state.

    recorded: what a file beside the index says of the run; where none does, an object of the index may.
    Raises what reading the index and the files raises, and IncompleteCheckpointError for chunks that leave gaps.
    """
    index = read_index(directory, trust_pickle=options.trust_pickle)
    stated, unread = recorded if recorded != NOTHING else in_index(directory, index, options)
    sizes = ParallelSizes.of(stated.values)
    entries = {name: entry for name, entry in index.tensors.items() if is_weight(name)}
    located = locate(directory, entries, options)
    tensors: dict[str, LazyTensor] = {}
    problems: list[Problem] = []
    for name, entry in entries.items():
        axes = sizes.axes_of(name, (chunk.box for chunk in entry.chunks))
        held = in_order(name, located.pop(name), entry.shape)
        made = held if isinstance(held, Problem) else paste(name, entry.shape, held, axes)
        if isinstance(made, Problem):
            problems.append(made)
        else:
            tensors[name] = made
    if problems:
        raise IncompleteCheckpointError(
            f"{plural(len(problems), 'tensor')} not whole in {directory}", problems=problems
        )
    beside = len(index.tensors) - len(entries)
    fsdp = any(name.startswith("model.module.") for name in tensors)
    return Contents(
        layout="Megatron-FSDP (fsdp_dtensor)" if fsdp else "Megatron torch_dist",
        tensors=tensors,
        files=tuple(_files(directory, {chunk.file for entry in entries.values() for chunk in entry.chunks})),
        world_size=_world_size(directory),
        mesh=sizes.mesh,
        notes=(*unread, *_notes(beside, len(index.objects))),
        stated=stated,
    )


def _files(directory: Path, read: Iterable[str]) -> Iterable[SourceFile]:
    """The index and every `.distcp` file; those that hold none of the weights belong to the optimizer."""
    weights = {directory / file for file in read}
    yield SourceFile.of(directory / METADATA, "weights")
    for path in sorted({*weights, *directory.glob("*.distcp")}):
        yield SourceFile.of(path, "weights" if path in weights else "optimizer")


def _world_size(directory: Path) -> int:
    """Ranks that wrote, by the highest number in a file name."""
    return max((rank_of(path.name) for path in directory.glob("*.distcp")), default=0) + 1


def _notes(beside: int, objects: int) -> tuple[str, ...]:
    notes = []
    if beside:
        notes.append(f"{plural(beside, 'tensor')} of optimizer and random number generators left alone")
    if objects:
        notes.append(f"{plural(objects, 'pickled object')} (extra states and the like) left alone")
    return tuple(notes)
