"""Rows that families share. Sources: megatron/core/models/gpt/gpt_layer_specs.py and the modules that it names.

A layer norm lies under the name of the linear layer that transformer_engine fuses it into, or, in the local
specification, under a name of its own; both are listed.
"""

from __future__ import annotations

from nbmerge.naming.megatron.family import Rows, Stack
from nbmerge.naming.megatron.rules import QKV, Copy, Halves, Head, Rule, Vocabulary


def ends(prefix: str = "model.", head: str = "lm_head.weight") -> Rows:
    """Embedding, final norm and output layer."""
    return {
        "embedding.word_embeddings.weight": Vocabulary(f"{prefix}embed_tokens.weight"),
        "decoder.final_layernorm.weight": Copy(f"{prefix}norm.weight"),
        "output_layer.weight": Head(head),
        "output_layer.bias": Copy("score.bias"),
    }


def decoder(*rows: Rows, prefix: str = "model.") -> Stack:
    """The decoder's layers."""
    return Stack("decoder.layers.", f"{prefix}layers.", {name: rule for part in rows for name, rule in part.items()})


def renamed(rows: Rows, prefix: str) -> Rows:
    """The rows with a prefix before their Megatron names."""
    return {prefix + name: rule for name, rule in rows.items()}


ATTENTION: Rows = {
    "self_attention.linear_qkv.layer_norm_weight": Copy("input_layernorm.weight"),
    "input_layernorm.weight": Copy("input_layernorm.weight"),
    "self_attention.linear_qkv.weight": QKV(
        "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"
    ),
    "self_attention.linear_qkv.bias": QKV("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "self_attention.linear_proj.weight": Copy("self_attn.o_proj.weight"),
    "self_attention.linear_proj.bias": Copy("self_attn.o_proj.bias"),
}

QK_NORM: Rows = {
    "self_attention.q_layernorm.weight": Copy("self_attn.q_norm.weight"),
    "self_attention.k_layernorm.weight": Copy("self_attn.k_norm.weight"),
}

# Multi-head latent attention. Its query may be projected directly or through a low rank.
LATENT_ATTENTION: Rows = {
    "input_layernorm.weight": Copy("input_layernorm.weight"),
    "self_attention.linear_q_proj.weight": Copy("self_attn.q_proj.weight"),
    "self_attention.linear_q_down_proj.weight": Copy("self_attn.q_a_proj.weight"),
    "self_attention.linear_q_down_proj.bias": Copy("self_attn.q_a_proj.bias"),
    "self_attention.linear_q_up_proj.layer_norm_weight": Copy("self_attn.q_a_layernorm.weight"),
    "self_attention.q_layernorm.weight": Copy("self_attn.q_a_layernorm.weight"),
    "self_attention.linear_q_up_proj.weight": Copy("self_attn.q_b_proj.weight"),
    "self_attention.linear_kv_down_proj.weight": Copy("self_attn.kv_a_proj_with_mqa.weight"),
    "self_attention.linear_kv_down_proj.bias": Copy("self_attn.kv_a_proj_with_mqa.bias"),
    "self_attention.linear_kv_up_proj.layer_norm_weight": Copy("self_attn.kv_a_layernorm.weight"),
    "self_attention.kv_layernorm.weight": Copy("self_attn.kv_a_layernorm.weight"),
    "self_attention.linear_kv_up_proj.weight": Copy("self_attn.kv_b_proj.weight"),
    "self_attention.linear_proj.weight": Copy("self_attn.o_proj.weight"),
    "self_attention.linear_proj.bias": Copy("self_attn.o_proj.bias"),
}

# torch_dist writes the norm before an MLP under the name of the fused one, even for experts without such a layer.
MLP_NORM: Rows = {
    "mlp.linear_fc1.layer_norm_weight": Copy("post_attention_layernorm.weight"),
    "pre_mlp_layernorm.weight": Copy("post_attention_layernorm.weight"),
}

DENSE_MLP: Rows = {
    "mlp.linear_fc1.weight": Halves("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc1.bias": Halves("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "mlp.linear_fc2.weight": Copy("mlp.down_proj.weight"),
    "mlp.linear_fc2.bias": Copy("mlp.down_proj.bias"),
}


def experts(module: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Rows:
    """Router and routed experts, published one by one."""
    return {
        "mlp.router.weight": Copy(f"{module}.gate.weight"),
        "mlp.experts.{e}.linear_fc1.weight": Halves(
            f"{module}.experts.{{e}}.{gate}.weight", f"{module}.experts.{{e}}.{up}.weight"
        ),
        "mlp.experts.{e}.linear_fc2.weight": Copy(f"{module}.experts.{{e}}.{down}.weight"),
    }


# Sigmoid routing keeps a bias of each expert, in fp32, which training moves and no gradient does.
ROUTER_BIAS: Rows = {"mlp.router.expert_bias": Copy("mlp.gate.e_score_correction_bias")}


def shared_experts(module: str) -> Rows:
    """Experts that every token goes through."""
    rows: dict[str, Rule] = {
        "mlp.shared_experts.linear_fc1.weight": Halves(f"{module}.gate_proj.weight", f"{module}.up_proj.weight"),
        "mlp.shared_experts.linear_fc2.weight": Copy(f"{module}.down_proj.weight"),
    }
    return rows


def multi_token_prediction(layer: Rows) -> Stack:
    """Layers that predict further tokens: published after the decoder's own, and loaded by no class.

    The published ones hold copies of embedding and output layer. Source: megatron/core/transformer/
    multi_token_prediction.py, and the files of deepseek-ai/DeepSeek-V3.
    """
    rows: dict[str, Rule] = {
        "enorm.weight": Copy("enorm.weight"),
        "hnorm.weight": Copy("hnorm.weight"),
        "eh_proj.weight": Copy("eh_proj.weight"),
        "final_layernorm.weight": Copy("shared_head.norm.weight"),
        **renamed(layer, "transformer_layer."),
    }
    return Stack(
        "mtp.layers.",
        "model.layers.",
        rows,
        after="num_hidden_layers",
        extra={"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"},
        loaded=False,
    )
