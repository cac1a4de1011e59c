"""A published model under the names and in the shapes that megatron-core saves: what a merge has to undo.

Written without nbmerge's own naming tables, so that a merge of a demonstration checkpoint proves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


def megatron_tensors(published: Mapping[str, torch.Tensor], config: Any, *, divisible_by: int = 1) -> Tensors:
    """The whole tensors of a dense or mixture-of-experts decoder, layers stacked [L, ...], as transformer_engine names.

    published: of llama, qwen2, qwen3 or qwen3_moe, as `save_pretrained` writes them; config: its transformers config.
    divisible_by: the vocabulary is padded with random rows to a multiple of it (Megatron's make_vocab_size_divisible_by
    times its tensor parallel size). A tied head has no tensor of its own, and a value head is not padded.
    """
    tensors: Tensors = {
        "embedding.word_embeddings.weight": _padded(published["model.embed_tokens.weight"], divisible_by, seed=1)
    }
    layers = [_layer(published, f"model.layers.{n}.", config) for n in range(config.num_hidden_layers)]
    for name in layers[0]:
        tensors[f"decoder.layers.{name}"] = torch.stack([layer[name] for layer in layers])
    tensors["decoder.final_layernorm.weight"] = published["model.norm.weight"]
    if "score.weight" in published:
        tensors["output_layer.weight"] = published["score.weight"]
    elif "lm_head.weight" in published:
        tensors["output_layer.weight"] = _padded(published["lm_head.weight"], divisible_by, seed=2)
    return tensors


def optimizer_tensors(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Adam's state as the distributed optimizer saves it with `fully_reshardable`: fp32 weights and zero moments."""
    return {
        f"optimizer.state.{kind}.{name}": tensor.float() if kind == "param" else torch.zeros(tensor.shape)
        for kind in ("param", "exp_avg", "exp_avg_sq")
        for name, tensor in tensors.items()
    }


def _padded(table: torch.Tensor, divisible_by: int, *, seed: int) -> torch.Tensor:
    """[V, H] → [V rounded up, H], the same in every process."""
    missing = -table.shape[0] % divisible_by
    more = torch.randn(missing, table.shape[1], generator=torch.Generator().manual_seed(seed))
    return torch.cat([table, more.to(table.dtype)])


def _layer(published: Mapping[str, torch.Tensor], prefix: str, config: Any) -> Tensors:
    """One layer, by the names inside it."""
    tensors = {
        "self_attention.linear_qkv.layer_norm_weight": published[prefix + "input_layernorm.weight"],
        "self_attention.linear_proj.weight": published[prefix + "self_attn.o_proj.weight"],
    }
    for kind in ("weight", "bias"):
        if f"{prefix}self_attn.q_proj.{kind}" in published:
            q, k, v = (published[f"{prefix}self_attn.{part}_proj.{kind}"] for part in "qkv")
            tensors[f"self_attention.linear_qkv.{kind}"] = _by_group(q, k, v, config.num_key_value_heads)
    for part in "qk":
        if f"{prefix}self_attn.{part}_norm.weight" in published:
            tensors[f"self_attention.{part}_layernorm.weight"] = published[f"{prefix}self_attn.{part}_norm.weight"]
    norm = published[prefix + "post_attention_layernorm.weight"]
    if f"{prefix}mlp.gate.weight" not in published:
        fc1, fc2 = _gated(published, prefix + "mlp.")
        return tensors | {
            "mlp.linear_fc1.layer_norm_weight": norm, "mlp.linear_fc1.weight": fc1, "mlp.linear_fc2.weight": fc2,
        }  # fmt: skip
    experts = [_gated(published, f"{prefix}mlp.experts.{e}.") for e in range(config.num_experts)]
    return tensors | {
        "pre_mlp_layernorm.weight": norm,
        "mlp.router.weight": published[prefix + "mlp.gate.weight"],
        "mlp.experts.experts.linear_fc1.weight": torch.stack([fc1 for fc1, _ in experts]),
        "mlp.experts.experts.linear_fc2.weight": torch.stack([fc2 for _, fc2 in experts]),
    }


def _by_group(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: int) -> torch.Tensor:
    """The rows of each query group together: its query heads, its key head, its value head."""
    return torch.cat([part for group in zip(*(t.chunk(groups) for t in (q, k, v)), strict=True) for part in group])


def _gated(published: Mapping[str, torch.Tensor], prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
    """fc1 [2F, H], gate above up, and fc2 [H, F]."""
    gate, up, down = (published[f"{prefix}{part}_proj.weight"] for part in ("gate", "up", "down"))
    return torch.cat([gate, up]), down
