"""What Megatron's layers are made of, written by hand from the published tensors: attention, MLPs, experts.

Nothing of nbmerge is used here. `megatron_names` puts layers and families together from these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Tensors = dict[str, torch.Tensor]
Spec = Literal["te", "local"]
Container = Literal["torch_dist", "ranks"]
Form = Literal["bridge", "mbridge"]


@dataclass
class Published:
    """The tensors that are renamed; `take` notes which of them were used.

    config: of the text model. container: "torch_dist" renames the norms of the local spec as TE has them; "ranks"
    keeps the names of the modules, as files of ranks and Megatron-FSDP do. form: where Megatron-Bridge and mbridge
    name a model differently, whose names.
    """

    tensors: Mapping[str, torch.Tensor]
    config: Any
    spec: Spec = "te"
    container: Container = "torch_dist"
    form: Form = "bridge"
    used: set[str] = field(default_factory=set)

    def take(self, name: str) -> torch.Tensor:
        self.used.add(name)
        return self.tensors[name]

    def has(self, name: str) -> bool:
        return name in self.tensors

    def under(self, prefix: str) -> Callable[[str], torch.Tensor]:
        """`take` of names below the prefix."""
        return lambda name: self.take(prefix + name)

    @property
    def local_names(self) -> bool:
        """Whether the norms have modules of their own."""
        return self.spec == "local" and self.container == "ranks"


def under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The same tensors with a prefix."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


# Attention


def fused_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: Any) -> torch.Tensor:
    """Rows group by group: the group's query heads, its key head, its value head."""
    groups = config.num_key_value_heads
    rows = k.shape[0] // groups
    queries = rows * (config.num_attention_heads // groups)
    parts: list[torch.Tensor] = []
    for group in range(groups):
        parts += [q[group * queries : (group + 1) * queries], *(t[group * rows : (group + 1) * rows] for t in (k, v))]
    return torch.cat(parts)


def grouped_attention(source: Published, prefix: str) -> Tensors:
    """Grouped-query attention with its norm: bias and norms of q and k where they are published."""
    take = source.under(prefix)
    norm = "input_layernorm.weight" if source.local_names else "self_attention.linear_qkv.layer_norm_weight"
    tensors = {norm: take("input_layernorm.weight")}
    for end in ("weight", "bias"):
        if source.has(f"{prefix}self_attn.q_proj.{end}"):
            q, k, v = (take(f"self_attn.{part}_proj.{end}") for part in "qkv")
            tensors[f"self_attention.linear_qkv.{end}"] = fused_qkv(q, k, v, source.config)
        if source.has(f"{prefix}self_attn.o_proj.{end}"):
            tensors[f"self_attention.linear_proj.{end}"] = take(f"self_attn.o_proj.{end}")
    for part in "qk":
        if source.has(f"{prefix}self_attn.{part}_norm.weight"):
            tensors[f"self_attention.{part}_layernorm.weight"] = take(f"self_attn.{part}_norm.weight")
    if source.has(prefix + "self_attn.sinks"):
        tensors["self_attention.core_attention.softmax_offset"] = take("self_attn.sinks")
    return tensors


def latent_attention(source: Published, prefix: str) -> Tensors:
    """Multi-head latent attention (DeepSeek), with or without a low rank for the queries."""
    take = source.under(prefix)
    local = source.spec == "local"
    tensors = {
        "input_layernorm.weight": take("input_layernorm.weight"),
        "self_attention.linear_kv_down_proj.weight": take("self_attn.kv_a_proj_with_mqa.weight"),
        "self_attention.linear_kv_up_proj.weight": take("self_attn.kv_b_proj.weight"),
        "self_attention.linear_proj.weight": take("self_attn.o_proj.weight"),
    }
    norm = "self_attention.kv_layernorm.weight" if local else "self_attention.linear_kv_up_proj.layer_norm_weight"
    tensors[norm] = take("self_attn.kv_a_layernorm.weight")
    if source.has(prefix + "self_attn.q_proj.weight"):
        tensors["self_attention.linear_q_proj.weight"] = take("self_attn.q_proj.weight")
        return tensors
    norm = "self_attention.q_layernorm.weight" if local else "self_attention.linear_q_up_proj.layer_norm_weight"
    tensors[norm] = take("self_attn.q_a_layernorm.weight")
    tensors["self_attention.linear_q_down_proj.weight"] = take("self_attn.q_a_proj.weight")
    tensors["self_attention.linear_q_up_proj.weight"] = take("self_attn.q_b_proj.weight")
    return tensors


# What follows the attention


def fc1(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[2F, H]: the gate above, up below."""
    return torch.cat([gate, up])


def dense_norm(source: Published, *, latent: bool = False) -> str:
    """The name of the norm before a dense MLP."""
    own_norm = source.spec == "local" if latent else source.local_names
    return "pre_mlp_layernorm.weight" if own_norm else "mlp.linear_fc1.layer_norm_weight"


def expert_norm(source: Published, *, latent: bool = False) -> str:
    """The name of the norm before experts: torch_dist of the local spec writes that of an fc1 which is not there."""
    local_dist = source.spec == "local" and source.container == "torch_dist" and not latent
    return "mlp.linear_fc1.layer_norm_weight" if local_dist else "pre_mlp_layernorm.weight"


def dense_mlp(
    source: Published, prefix: str, *, latent: bool = False, norm: str = "post_attention_layernorm.weight"
) -> Tensors:
    """A gated MLP with its norm, which is published as `norm`."""
    take = source.under(prefix)
    return {
        dense_norm(source, latent=latent): take(norm),
        "mlp.linear_fc1.weight": fc1(take("mlp.gate_proj.weight"), take("mlp.up_proj.weight")),
        "mlp.linear_fc2.weight": take("mlp.down_proj.weight"),
    }


def expert_mlp(
    source: Published,
    prefix: str,
    *,
    block: str = "mlp",
    words: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    shared: str = "",
    latent: bool = False,
) -> Tensors:
    """Router and experts with their norm. words: gate, up and down; shared: the published name of a shared expert."""
    take = source.under(prefix)
    tensors = {
        expert_norm(source, latent=latent): take("post_attention_layernorm.weight"),
        "mlp.router.weight": take(f"{block}.gate.weight"),
    }
    if source.has(f"{prefix}{block}.gate.e_score_correction_bias"):
        tensors["mlp.router.expert_bias"] = take(f"{block}.gate.e_score_correction_bias")
    gate, up, down = words
    pattern = re.compile(re.escape(f"{prefix}{block}.experts.") + rf"\d+\.{down}\.weight")
    count = sum(pattern.fullmatch(name) is not None for name in source.tensors)
    experts = [take_expert(take, f"{block}.experts.{e}.", gate, up, down) for e in range(count)]
    tensors["mlp.experts.experts.linear_fc1.weight"] = torch.stack([first for first, _ in experts])
    tensors["mlp.experts.experts.linear_fc2.weight"] = torch.stack([second for _, second in experts])
    if shared:
        first, second = take_expert(take, f"{block}.{shared}.", gate, up, down)
        tensors["mlp.shared_experts.linear_fc1.weight"] = first
        tensors["mlp.shared_experts.linear_fc2.weight"] = second
    if source.has(f"{prefix}{block}.shared_expert_gate.weight"):
        tensors["mlp.shared_experts.gate_weight"] = take(f"{block}.shared_expert_gate.weight")
    return tensors


def take_expert(
    take: Callable[[str], torch.Tensor], prefix: str, gate: str, up: str, down: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """fc1 [2F, H] and fc2 [H, F] of one expert."""
    first = fc1(take(f"{prefix}{gate}.weight"), take(f"{prefix}{up}.weight"))
    return first, take(f"{prefix}{down}.weight")


def packed_experts(source: Published, prefix: str) -> Tensors:
    """Experts that are published as tensors of all of them, [E, 2F, H] and [E, H, F], or those transposed."""
    take = source.under(prefix)
    first, second = take("mlp.experts.gate_up_proj"), take("mlp.experts.down_proj")
    if first.shape[1] == source.config.hidden_size:
        first, second = first.transpose(1, 2), second.transpose(1, 2)
    return {
        expert_norm(source): take("post_attention_layernorm.weight"),
        "mlp.router.weight": take("mlp.gate.weight"),
        "mlp.experts.experts.linear_fc1.weight": first.contiguous(),
        "mlp.experts.experts.linear_fc2.weight": second.contiguous(),
    }


def interleaved_experts(source: Published, prefix: str) -> Tensors:
    """gpt-oss: published [E, H, 2F] and [E, F, H], a gate column, an up column, and so on; biases everywhere."""
    take = source.under(prefix)
    weight, bias = take("mlp.experts.gate_up_proj"), take("mlp.experts.gate_up_proj_bias")
    return {
        expert_norm(source): take("post_attention_layernorm.weight"),
        "mlp.router.weight": take("mlp.router.weight"),
        "mlp.router.bias": take("mlp.router.bias"),
        "mlp.experts.experts.linear_fc1.weight": torch.stack([fc1(e[:, 0::2].T, e[:, 1::2].T) for e in weight]),
        "mlp.experts.experts.linear_fc1.bias": torch.stack([fc1(e[0::2], e[1::2]) for e in bias]),
        "mlp.experts.experts.linear_fc2.weight": torch.stack([e.T for e in take("mlp.experts.down_proj")]),
        "mlp.experts.experts.linear_fc2.bias": take("mlp.experts.down_proj_bias"),
    }
