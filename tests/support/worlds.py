"""Per-rank FSDP checkpoints as verl lays them out, written with torch.save and without processes.

DTensors are real ones: torch's own fake process group says which rank this is, and nothing is sent.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

State = Mapping[str, Any]
IS_TORCH_2_7 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)
"""Whether torch is 2.7 or newer. 2.6 shards nothing by FSDP that tensor parallelism has cut unevenly, and its FSDP2
does not train on the CPU."""


def rank_file(directory: Path, world_size: int, rank: int) -> Path:
    """The weights of a rank."""
    return directory / f"model_world_size_{world_size}_rank_{rank}.pt"


def write_ranks(
    directory: Path, states: Iterable[State], *, world_size: int | None = None, version: int | None = 2
) -> Path:
    """A checkpoint of these state dicts, one for each rank; fsdp_config.json unless `version` is None.

    Each is saved before the next is asked for, so that an iterator can save each as its own rank.
    """
    if world_size is None:
        states = list(states)
        world_size = len(states)
    directory.mkdir(parents=True, exist_ok=True)
    for rank, state in enumerate(states):
        torch.save(dict(state), rank_file(directory, world_size, rank))
    if version is not None:
        (directory / "fsdp_config.json").write_text(json.dumps({"FSDP_version": version, "world_size": world_size}))
    return directory


def row_shards(tensors: Mapping[str, torch.Tensor], world_size: int) -> list[dict[str, torch.Tensor]]:
    """Plain tensors cut by rows as torch.chunk cuts them, with an empty piece where it gives fewer."""
    states: list[dict[str, torch.Tensor]] = [{} for _ in range(world_size)]
    for name, tensor in tensors.items():
        parts = list(tensor.chunk(world_size)) if tensor.dim() else [tensor] * world_size
        parts += [tensor[:0]] * (world_size - len(parts))
        for state, part in zip(states, parts, strict=True):
            state[name] = part.clone()
    return states


@contextmanager
def rank_of(rank: int, world_size: int) -> Iterator[None]:
    """While open, this process is `rank` of a process group that sends nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hook = sys.excepthook  # init_process_group puts the rank before every line of a traceback
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


Place = Callable[[str, torch.Tensor], Sequence[Any] | None]


def by_rows(name: str, tensor: torch.Tensor) -> Sequence[Any] | None:
    """Shard(0) on a 1-D mesh for every tensor that has a dimension; the others stay plain."""
    from torch.distributed.tensor import Shard

    return [Shard(0)] if tensor.dim() else None


def mesh_states(
    tensors: Mapping[str, torch.Tensor], mesh_shape: tuple[int, ...], names: tuple[str, ...], place: Place
) -> Iterator[dict[str, Any]]:
    """The state dict of every rank of a mesh, each tensor a DTensor where `place` gives placements.

    The local pieces are torch.distributed.tensor's own.
    """
    from torch.distributed.device_mesh import init_device_mesh

    world_size = math.prod(mesh_shape)
    for rank in range(world_size):
        with rank_of(rank, world_size):
            mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
            placed = {name: place(name, tensor) for name, tensor in tensors.items()}
            yield {
                name: tensor.clone() if placed[name] is None else _distributed(tensor, mesh, placed[name])
                for name, tensor in tensors.items()
            }


def _distributed(tensor: torch.Tensor, mesh: Any, placements: Sequence[Any] | None) -> Any:
    """The piece of this rank, cut without asking another: torch before 2.7 would have rank 0 send it."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    if "src_data_rank" in inspect.signature(distribute_tensor).parameters:
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    whole = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=placements)


def write_mesh_world(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    mesh_shape: tuple[int, ...],
    names: tuple[str, ...] = ("fsdp",),
    place: Place = by_rows,
) -> Path:
    """A checkpoint of real DTensors; by default each with a dimension is Shard(0) on a 1-D mesh."""
    states = mesh_states(tensors, mesh_shape, names, place)
    return write_ranks(directory, states, world_size=math.prod(mesh_shape))


def sharded_tensor_states(tensors: Mapping[str, torch.Tensor], world_size: int) -> Iterator[dict[str, Any]]:
    """The state dict of every rank as FSDP1 without a mesh has it: ShardedTensors cut by rows."""
    from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
    from torch.distributed._shard.sharding_spec import ShardMetadata

    def on_rank(tensor: torch.Tensor, rank: int) -> ShardedTensor:
        parts = [part for part in tensor.chunk(world_size) if part.numel()]
        size = parts[0].shape[0] if parts else 0
        zeros = [0] * (tensor.dim() - 1)
        metadata = [
            ShardMetadata([owner * size, *zeros], list(part.shape), f"rank:{owner}/cpu")
            for owner, part in enumerate(parts)
        ]
        held = [Shard(parts[rank].clone(), metadata[rank])] if rank < len(parts) else []
        whole = ShardedTensorMetadata(metadata, tensor.shape, TensorProperties(tensor.dtype))
        return ShardedTensor._init_from_local_shards_and_global_metadata(held, whole)

    for rank in range(world_size):
        with rank_of(rank, world_size):
            yield {name: on_rank(tensor, rank) for name, tensor in tensors.items()}


def write_sharded_tensor_world(directory: Path, tensors: Mapping[str, torch.Tensor], world_size: int) -> Path:
    """A checkpoint of ShardedTensors, each file saved under its own rank's process group, as torch demands."""
    return write_ranks(directory, sharded_tensor_states(tensors, world_size), world_size=world_size, version=1)
