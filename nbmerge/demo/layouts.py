"""Shards a model as each layout does, with the frameworks' own code, and gives the state dict that a rank saves."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nbmerge.demo.recipes import Recipe

_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_ROWS = ("o_proj", "down_proj")


def shard(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The model as this rank holds it. Needs an initialised process group, except for the plain layout."""
    if recipe.layout == "plain":
        return model
    mesh = init_device_mesh("cpu", recipe.mesh, mesh_dim_names=recipe.mesh_names) if recipe.mesh else None
    if recipe.fsdp_version == 1:
        return _wrap_fsdp1(model, mesh, recipe)
    if mesh is None:
        raise ValueError(f"{recipe.layout} has no mesh")
    if recipe.has_tp:
        _parallelize(model, mesh[recipe.mesh_names[-1]])
        mesh = mesh[recipe.mesh_names[:-1]]
    _fully_shard(model, mesh)
    return model


def state_dict(model: nn.Module, recipe: Recipe) -> dict[str, Any]:
    """What this rank saves: local pieces, as DTensors, ShardedTensors or plain tensors."""
    if recipe.fsdp_version == 2 or recipe.layout == "plain":
        return model.state_dict()
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    flat = recipe.layout == "fsdp1_flat"
    kind = StateDictType.LOCAL_STATE_DICT if flat else StateDictType.SHARDED_STATE_DICT
    with FullyShardedDataParallel.state_dict_type(model, kind):
        return model.state_dict()


def adamw_state(model: nn.Module) -> dict[str, Any]:
    """The state of AdamW after one step of zero length: full-sized moments, and no weight changed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated layers, which trainers shard one by one: those that transformers names, as verl takes them."""
    names = _block_names(model)
    for module in model.modules():
        if type(module).__name__ in names:
            yield module


def _block_names(model: nn.Module) -> set[str]:
    return set(getattr(model, "_no_split_modules", None) or ())


def _fully_shard(model: nn.Module, mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in list(_blocks(model)):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _parallelize(model: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallelism as Megatron cuts a decoder: columns, then rows; the vocabulary over the ranks."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    styles: dict[str, Any] = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) or last in _ROWS:
            styles[name] = RowwiseParallel(input_layouts=Replicate())
        elif last in _COLUMNS or name == "lm_head":
            styles[name] = ColwiseParallel()
    tied = model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]
    parallelize_module(model, mesh, styles)
    if tied:  # each of the two got a parameter of its own
        model.lm_head.weight = model.model.embed_tokens.weight  # type: ignore[union-attr]


def _wrap_fsdp1(model: nn.Module, mesh: DeviceMesh | None, recipe: Recipe) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    classes = {type(block) for block in _blocks(model)}
    hybrid = len(recipe.mesh) == 2
    return FullyShardedDataParallel(
        model,
        device_mesh=mesh,
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy.HYBRID_SHARD if hybrid else ShardingStrategy.FULL_SHARD,
        auto_wrap_policy=partial(transformer_auto_wrap_policy, transformer_layer_cls=classes),
        use_orig_params=recipe.use_orig_params,
    )
