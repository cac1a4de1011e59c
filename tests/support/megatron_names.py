"""Published tensors under Megatron's names, written by hand from the table of what Megatron saves.

Nothing of nbmerge is used here, so that a merge that gives the published tensors back proves nbmerge's own tables.
One function for each shape of layer, and one line of `FAMILIES` for each family.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Tensors = dict[str, torch.Tensor]
Spec = Literal["te", "local"]
Container = Literal["torch_dist", "ranks"]


@dataclass
class Published:
    """The tensors that are renamed; `take` notes which of them were used.

    config: of the text model. container: "torch_dist" renames the norms of the local spec as TE has them; "ranks"
    keeps the names of the modules, as files of ranks and Megatron-FSDP do.
    """

    tensors: Mapping[str, torch.Tensor]
    config: Any
    spec: Spec = "te"
    container: Container = "torch_dist"
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


def to_megatron(
    family: str,
    published: Mapping[str, torch.Tensor],
    config: Any,
    *,
    spec: Spec = "te",
    container: Container = "torch_dist",
) -> Tensors:
    """The tensors of a whole model under Megatron's names, layer by layer, experts stacked [E, ...].

    published: as `save_pretrained` writes them, with `model.layers.{L + K}.*` for MTP layers. config: the family's
    transformers config. Raises AssertionError where a published tensor has no place, so that no table is half done.
    """
    source = Published(published, config, spec, container)
    outside, layer = FAMILIES[family]
    tensors = outside(source)
    for number in range(config.num_hidden_layers):
        tensors |= under(f"decoder.layers.{number}.", layer(source, f"model.layers.{number}."))
    for extra in itertools.count():
        prefix = f"model.layers.{config.num_hidden_layers + extra}."
        if not source.has(prefix + "enorm.weight"):
            break
        tensors |= under(f"mtp.layers.{extra}.", mtp_layer(source, prefix, layer))
    left = sorted(published.keys() - source.used)
    assert not left, f"{family} has no Megatron name for {left}"
    return tensors


def under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The same tensors with a prefix."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


# Outside the layers


def text_model(source: Published) -> Tensors:
    """Embedding, last norm, and a head where one is published: rows of the vocabulary, or a value head [1, H]."""
    tensors = {
        "embedding.word_embeddings.weight": source.take("model.embed_tokens.weight"),
        "decoder.final_layernorm.weight": source.take("model.norm.weight"),
    }
    if source.has("lm_head.weight"):
        tensors["output_layer.weight"] = source.take("lm_head.weight")
    if source.has("score.weight"):
        tensors["output_layer.weight"] = source.take("score.weight")
        source.used.add("score.bias")  # Megatron's value head has none
    return tensors


def mtp_layer(source: Published, prefix: str, layer: Callable[[Published, str], Tensors]) -> Tensors:
    """A layer that predicts a token further; the two tables beside it are copies of the model's own."""
    take = source.under(prefix)
    for copy in ("embed_tokens.weight", "shared_head.head.weight"):
        source.used.add(prefix + copy)
    return {
        "enorm.weight": take("enorm.weight"),
        "hnorm.weight": take("hnorm.weight"),
        "eh_proj.weight": take("eh_proj.weight"),
        "final_layernorm.weight": take("shared_head.norm.weight"),
        **under("transformer_layer.", layer(source, prefix)),
    }


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


def dense_mlp(source: Published, prefix: str, *, latent: bool = False) -> Tensors:
    """A gated MLP with its norm."""
    take = source.under(prefix)
    own_norm = source.spec == "local" if latent else source.local_names
    norm = "pre_mlp_layernorm.weight" if own_norm else "mlp.linear_fc1.layer_norm_weight"
    return {
        norm: take("post_attention_layernorm.weight"),
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
    local_dist = source.spec == "local" and source.container == "torch_dist" and not latent
    tensors = {
        "mlp.linear_fc1.layer_norm_weight" if local_dist else "pre_mlp_layernorm.weight": take(
            "post_attention_layernorm.weight"
        ),
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


# Layers


def dense_layer(source: Published, prefix: str) -> Tensors:
    return grouped_attention(source, prefix) | dense_mlp(source, prefix)


def qwen3_moe_layer(source: Published, prefix: str) -> Tensors:
    return grouped_attention(source, prefix) | expert_mlp(source, prefix)


def qwen2_moe_layer(source: Published, prefix: str) -> Tensors:
    return grouped_attention(source, prefix) | expert_mlp(source, prefix, shared="shared_expert")


def mixtral_layer(source: Published, prefix: str) -> Tensors:
    experts = expert_mlp(source, prefix, block="block_sparse_moe", words=("w1", "w3", "w2"))
    return grouped_attention(source, prefix) | experts


def deepseek_layer(source: Published, prefix: str) -> Tensors:
    """Dense in the first layers, experts in the rest."""
    if source.has(prefix + "mlp.gate_proj.weight"):
        rest = dense_mlp(source, prefix, latent=True)
    else:
        rest = expert_mlp(source, prefix, shared="shared_experts", latent=True)
    return latent_attention(source, prefix) | rest


Outside = Callable[[Published], Tensors]
Layer = Callable[[Published, str], Tensors]
# A further family is one line here, and a function above where its layers are new.
FAMILIES: dict[str, tuple[Outside, Layer]] = {
    "llama": (text_model, dense_layer),
    "qwen2": (text_model, dense_layer),
    "qwen2_tied": (text_model, dense_layer),
    "qwen2_value": (text_model, dense_layer),
    "qwen3": (text_model, dense_layer),
    "qwen2_moe": (text_model, qwen2_moe_layer),
    "qwen3_moe": (text_model, qwen3_moe_layer),
    "mixtral": (text_model, mixtral_layer),
    "deepseek_v2": (text_model, deepseek_layer),
    "deepseek_v3": (text_model, deepseek_layer),
}
