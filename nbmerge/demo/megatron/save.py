"""Writes the containers in the ranks of a process group, with torch.distributed.checkpoint as megatron-core uses it.

From megatron-core dist_checkpointing/strategies/torch.py: a ShardedTensor of each key, whose shards are the rank's
pieces, and an object of each `_extra_state` and `rng_state`; metadata that keeps the plans of all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_saver import save

from nbmerge.demo.megatron.files import CONTAINERS, write_around, write_beside
from nbmerge.demo.megatron.names import Tensors, megatron_tensors, optimizer_tensors
from nbmerge.demo.megatron.pieces import Coordinates, ParallelSizes, extra_state_keys, local_pieces
from nbmerge.geometry import Box

_THREADS = 2  # writers of each rank, as megatron-core 0.11 to 0.16 has by default
# Megatron's make_vocab_size_divisible_by: 128 in real runs; a small one for small vocabularies.
_VOCABULARY_MULTIPLE = 8


class _Planner(DefaultSavePlanner):
    """torch's planner, with metadata as Megatron leaves it: unnumbered chunks, and every rank's plan."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The plans of all ranks as they are, and what they write together."""
        plans, metadata = create_default_global_save_plan(all_plans, rewrite_index_hints=False)
        metadata.all_local_plans = all_plans  # type: ignore[attr-defined]
        self.global_plan, self.metadata = plans, metadata
        return plans, metadata


def save_checkpoint(
    checkpoint: Path,
    layout: str,
    published: Mapping[str, torch.Tensor],
    config: Any,
    sizes: ParallelSizes,
    *,
    optimizer: bool = False,
) -> None:
    """Writes this rank's share of a checkpoint. Every rank of the process group has to call it.

    layout: one of `CONTAINERS`; published: all tensors of the model, as `save_pretrained` writes them.
    """
    rank = dist.get_rank()
    tensors = megatron_tensors(published, config, divisible_by=_VOCABULARY_MULTIPLE * sizes.tp)
    rows = tensors["embedding.word_embeddings.weight"].shape[0]
    for container, state in _states(layout, tensors, rank, sizes, optimizer=optimizer).items():
        save_container(checkpoint / container, state)
        if rank == 0:
            write_beside(checkpoint / container, layout, config, sizes, rows=rows)
    if rank == 0:
        write_around(checkpoint, layout, config, sizes, optimizer=optimizer)


def save_container(directory: Path, state: Mapping[str, Any]) -> None:
    """A torch_dist container of what all ranks have. Every rank of the process group has to call it."""
    writer = FileSystemWriter(directory, thread_count=_THREADS)
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    save(dict(state), storage_writer=writer, planner=planner)
    for path in directory.glob(f"__{dist.get_rank()}_*.distcp"):
        if path.stat().st_size == 0:  # of a writer without work; Megatron has none
            path.unlink()


def _states(
    layout: str, tensors: Tensors, rank: int, sizes: ParallelSizes, *, optimizer: bool
) -> dict[str, dict[str, Any]]:
    """What a rank saves in each container."""
    weights, extra, optimized = CONTAINERS[layout]
    at = Coordinates.of(rank, sizes)
    states: dict[str, dict[str, Any]] = {weights: sharded(tensors, rank, sizes)}
    for name, tensor in tensors.items():
        for key in extra_state_keys(name, tensor.shape, at, sizes):
            states[weights][key] = [torch.empty(0, dtype=torch.uint8)]  # as of transformer_engine 2 without fp8
    if optimizer:
        states.setdefault(optimized, {}).update(sharded(optimizer_tensors(tensors), rank, sizes))
    states.setdefault(extra, {})
    if at.dp == 0:
        states[extra][f"rng_state/shard_{at.pp}.{at.tp}_{sizes.pp}.{sizes.tp}"] = [[_random_state()]]
    return states


def _random_state() -> dict[str, Any]:
    """The states of the random number generators, among them numpy arrays, which no safe load reads."""
    import random

    import numpy

    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }


def sharded(tensors: Tensors, rank: int, sizes: ParallelSizes) -> dict[str, ShardedTensor]:
    """The tensors of which a rank saves anything, each as a ShardedTensor of its pieces."""
    found: dict[str, ShardedTensor] = {}
    for name, tensor in tensors.items():
        every = [
            (owner, box)
            for owner, at in enumerate(sizes.coordinates)
            for box in local_pieces(name, tensor.shape, at, sizes)
        ]
        if any(owner == rank for owner, _ in every):
            found[name] = _sharded_tensor(tensor, every, rank)
    return found


def _sharded_tensor(tensor: torch.Tensor, pieces: list[tuple[int, Box]], rank: int) -> ShardedTensor:
    about = [
        (owner, box, ShardMetadata(list(box.offset), list(box.shape), f"rank:{owner}/cpu")) for owner, box in pieces
    ]
    held = [
        Shard(tensor[tuple(slice(a, b) for a, b in zip(box.offset, box.stop, strict=True))].clone(), metadata)
        for owner, box, metadata in about
        if owner == rank
    ]
    whole = ShardedTensorMetadata([metadata for *_, metadata in about], tensor.shape, TensorProperties(tensor.dtype))
    return ShardedTensor._init_from_local_shards_and_global_metadata(held, whole)
