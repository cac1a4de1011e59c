"""Gemma 1, 2 and 3, text and (Gemma 3) vision. Norms are zero-centred on both sides, so that nothing changes in them.

From Gemma 2 on, attention and MLP have a norm after them too. Megatron-Bridge keeps it in the linear layer that it
follows, mbridge in the layer. Sources: Megatron-Bridge, models/gemma and gemma_vl; mbridge, models/gemma3.
"""

from nbmerge.naming.megatron.blocks import ATTENTION, DENSE_MLP, MLP_NORM, QK_NORM, decoder, ends
from nbmerge.naming.megatron.family import Family, Rows, Stack
from nbmerge.naming.megatron.rules import QKV, Copy, Transposed

_NORMS: Rows = {
    "mlp.linear_fc1.layer_norm_weight": Copy("pre_feedforward_layernorm.weight"),
    "pre_mlp_layernorm.weight": Copy("pre_feedforward_layernorm.weight"),
    "self_attention.linear_proj.post_layernorm.weight": Copy("post_attention_layernorm.weight"),
    "post_attention_layernorm.weight": Copy("post_attention_layernorm.weight"),
    "mlp.linear_fc2.post_layernorm.weight": Copy("post_feedforward_layernorm.weight"),
    "post_feedforward_layernorm.weight": Copy("post_feedforward_layernorm.weight"),
}

GEMMA = Family(
    name="gemma",
    model_types=("gemma",),
    ends=ends(),
    stacks=(decoder(ATTENTION, MLP_NORM, DENSE_MLP),),
    zero_centred=True,
)

GEMMA_2 = Family(
    name="gemma2",
    model_types=("gemma2",),
    ends=ends(),
    stacks=(decoder(ATTENTION, _NORMS, DENSE_MLP),),
    zero_centred=True,
)

GEMMA_3 = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    ends=ends(),
    stacks=(decoder(ATTENTION, QK_NORM, _NORMS, DENSE_MLP),),
    zero_centred=True,
)

_VISION_LAYER: Rows = {
    f"{megatron}{kind}": rule
    for kind in ("weight", "bias")
    for megatron, rule in {
        "self_attention.linear_qkv.layer_norm_": Copy(f"layer_norm1.{kind}"),
        "self_attention.linear_qkv.": QKV(
            f"self_attn.q_proj.{kind}", f"self_attn.k_proj.{kind}", f"self_attn.v_proj.{kind}",
            heads="vision_config.num_attention_heads", groups="vision_config.num_attention_heads",
            head_dim="vision_config.head_dim", hidden="vision_config.hidden_size",
        ),
        "self_attention.linear_proj.": Copy(f"self_attn.out_proj.{kind}"),
        "mlp.linear_fc1.layer_norm_": Copy(f"layer_norm2.{kind}"),
        "mlp.linear_fc1.": Copy(f"mlp.fc1.{kind}"),
        "mlp.linear_fc2.": Copy(f"mlp.fc2.{kind}"),
    }.items()
}  # fmt: skip

_PROJECTOR: Rows = {
    "multi_modal_projector.mm_soft_embed_norm.weight": Copy("multi_modal_projector.mm_soft_emb_norm.weight"),
    "multi_modal_projector.proj.weight": Transposed("multi_modal_projector.mm_input_projection_weight"),
    "vision_projection.mm_input_projection.layer_norm_weight": Copy("multi_modal_projector.mm_soft_emb_norm.weight"),
    "vision_projection.mm_input_projection.weight": Transposed("multi_modal_projector.mm_input_projection_weight"),
}

_VISION_ENDS: Rows = {
    f"vision_model.{megatron}": Copy(f"vision_tower.{published}")
    for megatron, published in {
        "conv1.weight": "embeddings.patch_embedding.weight",
        "conv1.bias": "embeddings.patch_embedding.bias",
        "position_embeddings.weight": "embeddings.position_embedding.weight",
        "ln_post.weight": "post_layernorm.weight",
        "ln_post.bias": "post_layernorm.bias",
    }.items()
}

GEMMA_3_VISION = Family(
    name="gemma3 with vision",
    model_types=("gemma3",),
    ends={**ends("language_model.model.", "language_model.lm_head.weight"), **_PROJECTOR, **_VISION_ENDS},
    stacks=(
        decoder(ATTENTION, QK_NORM, _NORMS, DENSE_MLP, prefix="language_model.model."),
        Stack("vision_model.decoder.layers.", "vision_tower.encoder.layers.", _VISION_LAYER),
    ),
    unchanged={"vision_tower.": "vision_tower."},
    zero_centred=True,
)
