"""Adapters of peft models as Megatron-Bridge holds them, and the files that it and verl write of them.

Megatron-Bridge itself needs transformer_engine and a GPU: this is its documented form (megatron/bridge/peft).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from nbmerge.geometry import Box
from tests.support.adapters import PREFIX, Adapted, adapted
from tests.support.megatron_layers import Tensors, fused_qkv
from tests.support.megatron_ranks import Ranks, rank_states
from tests.support.models import tiny_config

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_FUSED = {"linear_qkv": ("self_attn", ("q", "k", "v")), "linear_fc1": ("mlp", ("gate", "up"))}
_SINGLE = {"linear_proj": "self_attn.o_proj", "linear_fc2": "mlp.down_proj"}
_PARENT = {"linear_qkv": "self_attention", "linear_proj": "self_attention", "linear_fc1": "mlp", "linear_fc2": "mlp"}


def shared(family: str = "qwen2", dtype: str = "float32", **config: object) -> Adapted:
    """A peft model in which the projections of a fused layer have one A, as Megatron-Bridge's have."""
    made = adapted(family, dtype, **{"r": 4, "target_modules": ALL, **config})
    parameters = dict(made.model.named_parameters())
    with torch.no_grad():
        for name, tensor in parameters.items():
            for module, (first, *others) in ((m, o) for m, o in _FUSED.values()):
                if f"{module}.{first}_proj.lora_A" in name:
                    for other in others:
                        parameters[name.replace(f"{first}_proj", f"{other}_proj")].copy_(tensor)
    return made


def megatron_adapter(made: Adapted, *, canonical: bool = False) -> Tensors:
    """Its adapter under Megatron's names, layer by layer. canonical: an adapter for each projection."""
    state, config = made.state(), tiny_config(made.family)
    found: Tensors = {}
    for layer in range(config.num_hidden_layers):
        prefix = f"{PREFIX}model.layers.{layer}."
        for part, (kind, end) in {
            "linear_in.weight": ("lora_A", ".default.weight"),
            "linear_out.weight": ("lora_B", ".default.weight"),
            "weight_magnitude": ("lora_magnitude_vector", ".default.weight"),
        }.items():
            for linear, module in _SINGLE.items():
                if (name := f"{prefix}{module}.{kind}{end}") in state:
                    found[f"decoder.layers.{layer}.{_PARENT[linear]}.{linear}.adapter.{part}"] = state[name]
            for linear, (module, projections) in _FUSED.items():
                names = [f"{prefix}{module}.{one}_proj.{kind}{end}" for one in projections]
                if names[0] not in state:
                    continue
                stem, parts = f"decoder.layers.{layer}.{_PARENT[linear]}.{linear}.adapter", [state[n] for n in names]
                if canonical:
                    for one, tensor in zip(projections, parts, strict=True):
                        found[f"{stem}.adapter_{one}.{part}"] = tensor
                elif part == "linear_in.weight":
                    assert all(torch.equal(parts[0], other) for other in parts[1:])
                    found[f"{stem}.{part}"] = parts[0]
                else:
                    found[f"{stem}.{part}"] = fused_qkv(*parts, config) if len(parts) == 3 else torch.cat(parts)
    return found


def index_pieces(tp: int, *, scrambled: bool = True) -> object:
    """The pieces in which `tp` ranks save adapters into an index; all else in one. Use after `as_saved`."""

    def pieces(name: str, tensor: torch.Tensor) -> Iterator[tuple[int, Box]]:
        dim = _cut(name)
        if dim is None:
            yield 0, Box.whole(tuple(tensor.shape))
            return
        dim += len(tensor.shape) - 2  # behind the layers of a stacked tensor
        count = 2 * tp if _is_split(name) else tp
        for number in range(count):
            length = tensor.shape[dim] // count
            offset = tuple(number * length if d == dim else 0 for d in range(len(tensor.shape)))
            shape = tuple(length if d == dim else n for d, n in enumerate(tensor.shape))
            yield number % tp, Box(offset, shape)

    return pieces


def as_saved(tensors: Mapping[str, torch.Tensor], tp: int) -> Tensors:
    """The tensors as `tp` ranks put them into an index.

    Each rank's rows of an adapter of the gate or the up projection are halved, as if they were both: the first halves
    of all ranks come first.
    """
    return {
        name: tensor.unflatten(-2, (tp, 2, -1)).transpose(-4, -3).flatten(-4, -2)
        if "linear_fc1.adapter.adapter_" in name and "linear_out" in name
        else tensor
        for name, tensor in tensors.items()
    }


def _is_split(name: str) -> bool:
    return "linear_fc1.adapter." in name and "linear_out" in name


def _cut(name: str) -> int | None:
    """The dimension of a matrix that tensor parallel ranks cut; None for what is no adapter's."""
    match = re.search(r"\.(linear_\w+)\.adapter\.(?:adapter_\w+\.)?(linear_in|linear_out)\.weight$", name)
    if match is None:
        return None
    return 1 if match[2] == "linear_in" and match[1] in _SINGLE else 0


def write_verl_adapter(directory: Path, adapter: Tensors, ranks: Ranks) -> Path:
    """verl's `mp_rank_*_adapter.pt`."""
    directory.mkdir(parents=True)
    by_rank = [_of_rank(adapter, ranks.tp, tp) for tp in range(ranks.tp)]
    for tp, held in enumerate(by_rank):
        for folder, chunks in rank_states(held, Ranks(stages=ranks.stages, ep=ranks.ep)).items():
            name = "_".join(["mp_rank", f"{tp:02}", *folder.split("_")[3:]])
            torch.save({"adapter_state_dict": dict(chunks[0])}, directory / f"{name}_adapter.pt")
    return directory


def _of_rank(adapter: Tensors, ranks: int, rank: int) -> Tensors:
    held: Tensors = {}
    for name, tensor in adapter.items():
        dim = _cut(name)
        if dim is None:
            held[name] = tensor
            continue
        halves = tensor.chunk(2) if _is_split(name) and ".adapter_" not in name else (tensor,)
        held[name] = torch.cat([half.chunk(ranks, dim)[rank] for half in halves], dim).clone()
    return held
