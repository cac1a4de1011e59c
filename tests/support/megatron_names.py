"""Published tensors under Megatron's names, written by hand from the table of what Megatron saves.

Nothing of nbmerge is used here, so that a merge that gives the published tensors back proves nbmerge's own tables.
One function for each shape of layer, and one line of `FAMILIES` for each family. What layers are made of is in
`megatron_layers`, what comes before the language model in `megatron_vision`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tests.support import megatron_vision as vision
from tests.support.megatron_layers import (
    Container,
    Form,
    Published,
    Spec,
    Tensors,
    dense_mlp,
    dense_norm,
    expert_mlp,
    grouped_attention,
    interleaved_experts,
    latent_attention,
    packed_experts,
    under,
)
from tests.support.megatron_layers import fused_qkv as fused_qkv

Layer = Callable[[Published, str], Tensors]
Tower = Callable[[Published, Any], Tensors]


@dataclass(frozen=True)
class Family:
    """layer: of the decoder. prefix: of the published language model. tower: what sees, from its part of the config;
    Megatron's language model then has the prefix `language_model.`.
    """

    layer: Layer
    prefix: str = "model."
    tower: Tower | None = None


def to_megatron(
    family: str,
    published: Mapping[str, torch.Tensor],
    config: Any,
    *,
    spec: Spec = "te",
    container: Container = "torch_dist",
    form: Form = "bridge",
) -> Tensors:
    """The tensors of a whole model under Megatron's names, layer by layer, experts stacked [E, ...].

    published: as `save_pretrained` writes them, with `model.layers.{L + K}.*` for MTP layers. config: the family's
    transformers config. form: of Megatron-Bridge or mbridge, which name some models differently.
    Raises AssertionError where a published tensor has no place, so that no table is half done.
    """
    text = config.get_text_config()
    source = Published(published, text, spec, container, form)
    table = FAMILIES[family]
    tensors = text_model(source, table.prefix)
    for number in range(text.num_hidden_layers):
        tensors |= under(f"decoder.layers.{number}.", table.layer(source, f"{table.prefix}layers.{number}."))
    for extra in itertools.count():
        prefix = f"{table.prefix}layers.{text.num_hidden_layers + extra}."
        if not source.has(prefix + "enorm.weight"):
            break
        tensors |= under(f"mtp.layers.{extra}.", mtp_layer(source, prefix, table.layer))
    if table.tower is not None:
        tensors = under("language_model.", tensors) | table.tower(source, config.vision_config)
    left = sorted(published.keys() - source.used)
    assert not left, f"{family} has no Megatron name for {left}"
    return tensors


# Outside the layers


def text_model(source: Published, prefix: str) -> Tensors:
    """Embedding, last norm, and a head where one is published: rows of the vocabulary, or a value head [1, H]."""
    tensors = {
        "embedding.word_embeddings.weight": source.take(f"{prefix}embed_tokens.weight"),
        "decoder.final_layernorm.weight": source.take(f"{prefix}norm.weight"),
    }
    if source.has("lm_head.weight"):
        tensors["output_layer.weight"] = source.take("lm_head.weight")
    if source.has("score.weight"):
        tensors["output_layer.weight"] = source.take("score.weight")
        source.used.add("score.bias")  # Megatron's value head has none
    return tensors


def mtp_layer(source: Published, prefix: str, layer: Layer) -> Tensors:
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


# Layers


def dense_layer(source: Published, prefix: str) -> Tensors:
    return grouped_attention(source, prefix) | dense_mlp(source, prefix)


def gemma_layer(source: Published, prefix: str) -> Tensors:
    """From Gemma 2 on: norms after attention and MLP too, in the linear layer (bridge) or beside it (mbridge)."""
    take = source.under(prefix)
    layer = grouped_attention(source, prefix) | dense_mlp(source, prefix, norm="pre_feedforward_layernorm.weight")
    bridge = source.form == "bridge"
    for module, norm in (
        ("self_attention.linear_proj", "post_attention_layernorm.weight"),
        ("mlp.linear_fc2", "post_feedforward_layernorm.weight"),
    ):
        layer[f"{module}.post_layernorm.weight" if bridge else norm] = take(norm)
    return layer


def glm4_layer(source: Published, prefix: str) -> Tensors:
    """Gate and up are published in one, and two more norms under Megatron's own names for them."""
    take = source.under(prefix)
    return grouped_attention(source, prefix) | {
        dense_norm(source): take("post_attention_layernorm.weight"),
        "mlp.linear_fc1.weight": take("mlp.gate_up_proj.weight"),
        "mlp.linear_fc2.weight": take("mlp.down_proj.weight"),
        "post_self_attn_layernorm.weight": take("post_self_attn_layernorm.weight"),
        "post_mlp_layernorm.weight": take("post_mlp_layernorm.weight"),
    }


def qwen3_moe_layer(source: Published, prefix: str) -> Tensors:
    return grouped_attention(source, prefix) | expert_mlp(source, prefix)


def qwen2_moe_layer(source: Published, prefix: str) -> Tensors:
    return grouped_attention(source, prefix) | expert_mlp(source, prefix, shared="shared_expert")


def qwen3_vl_moe_layer(source: Published, prefix: str) -> Tensors:
    return grouped_attention(source, prefix) | packed_experts(source, prefix)


def gpt_oss_layer(source: Published, prefix: str) -> Tensors:
    return grouped_attention(source, prefix) | interleaved_experts(source, prefix)


def mixtral_layer(source: Published, prefix: str) -> Tensors:
    experts = expert_mlp(source, prefix, block="block_sparse_moe", words=("w1", "w3", "w2"))
    return grouped_attention(source, prefix) | experts


def deepseek_layer(source: Published, prefix: str) -> Tensors:
    """Dense in the first layers, experts in the rest."""
    return latent_attention(source, prefix) | _dense_or_experts(source, prefix, latent=True)


def glm4_moe_layer(source: Published, prefix: str) -> Tensors:
    """As DeepSeek's, with plain attention."""
    return grouped_attention(source, prefix) | _dense_or_experts(source, prefix, latent=False)


def _dense_or_experts(source: Published, prefix: str, *, latent: bool) -> Tensors:
    if source.has(prefix + "mlp.gate_proj.weight"):
        return dense_mlp(source, prefix, latent=latent)
    return expert_mlp(source, prefix, shared="shared_experts", latent=latent)


# A further family is one line here, and a function above where its layers are new.
FAMILIES: dict[str, Family] = {
    "llama": Family(dense_layer),
    "mistral": Family(dense_layer),
    "qwen2": Family(dense_layer),
    "qwen2_tied": Family(dense_layer),
    "qwen2_value": Family(dense_layer),
    "qwen3": Family(dense_layer),
    "qwen2_moe": Family(qwen2_moe_layer),
    "qwen3_moe": Family(qwen3_moe_layer),
    "mixtral": Family(mixtral_layer),
    "deepseek_v2": Family(deepseek_layer),
    "deepseek_v3": Family(deepseek_layer),
    "gemma": Family(dense_layer),
    "gemma2": Family(gemma_layer),
    "gemma3": Family(gemma_layer),
    "gemma3_vision": Family(gemma_layer, "language_model.model.", vision.gemma3_tower),
    "glm4": Family(glm4_layer),
    "glm4_moe": Family(glm4_moe_layer),
    "gpt_oss": Family(gpt_oss_layer),
    "qwen2_5_vl": Family(dense_layer, "model.", vision.qwen2_5_tower),
    "qwen3_vl": Family(dense_layer, "model.language_model.", vision.qwen3_tower),
    "qwen3_vl_moe": Family(qwen3_vl_moe_layer, "model.language_model.", vision.qwen3_tower),
}
