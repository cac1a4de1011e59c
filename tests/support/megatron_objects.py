"""What Megatron saves beside the tensors: states of modules and of random number generators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nbmerge.demo.megatron.pieces import ParallelSizes, extra_state_keys
from tests.support.megatron import Objects, saved


def extra_states(
    tensors: Mapping[str, torch.Tensor], sizes: ParallelSizes, value: Any = None, *, norms: bool = True
) -> dict[str, tuple[int, bytes]]:
    """`_extra_state` objects of the modules of these tensors, one for each layer and expert.

    value: None (local spec), an empty uint8 tensor (transformer_engine 2), an io.BytesIO (1.x). norms: whether norms
    that are modules have one, as transformer_engine's do.
    """
    data = saved([value])
    found: dict[str, tuple[int, bytes]] = {}
    for name, tensor in tensors.items():
        if not norms and name.endswith("norm.weight"):
            continue
        for rank, at in enumerate(sizes.coordinates):
            for key in extra_state_keys(name, tensor.shape, at, sizes):
                found.setdefault(key, (rank, data))
    return found


def rng_states(sizes: ParallelSizes) -> dict[str, tuple[int, bytes]]:
    """`rng_state` of every pipeline and tensor parallel rank: numpy arrays in them, so no safe load reads them."""
    import numpy as np

    state = [{"random_rng_state": (3, (1, 2), None), "np_rng_state": ("MT19937", np.arange(4, dtype=np.uint32), 4)}]
    return {
        f"rng_state/shard_{at.pp}.{at.tp}_{sizes.pp}.{sizes.tp}": (rank, saved([state]))
        for rank, at in enumerate(sizes.coordinates)
        if at.dp == 0
    }


def saved_object(key: str, value: Any, rank: int = 0) -> dict[str, tuple[int, bytes]]:
    """One object under a key that is given whole, such as `common_state/shard_0_1`."""
    return {key: (rank, saved([value]))}


def with_prefix(objects: Objects, prefix: str) -> dict[str, tuple[int, bytes]]:
    """The same objects under keys with a prefix."""
    return {prefix + key: value for key, value in objects.items()}
