"""Qwen2.5-VL, Qwen3-VL and Qwen3-VL-MoE: the language model's own table, and the vision tower in both its forms.

Megatron-Bridge takes Qwen2.5-VL's tower over from transformers as it is (`visual.`), mbridge builds it of Megatron's
layers (`vision_model.`); for Qwen3-VL both do the latter. Its MLPs and mergers are not gated, but for Qwen2.5-VL's.
Sources: Megatron-Bridge, models/qwen_vl; mbridge, models/qwen2_5_vl and qwen3_vl.
"""

from nbmerge.naming.megatron.blocks import ATTENTION, DENSE_MLP, MLP_NORM, QK_NORM, decoder, ends
from nbmerge.naming.megatron.family import Family, Rows, Stack
from nbmerge.naming.megatron.rules import Copy, Halves, Packed, Rule, VisionQKV


def _both(rows: dict[str, str]) -> Rows:
    """Weights and biases that are copied."""
    return {f"{megatron}.{kind}": Copy(f"{to}.{kind}") for megatron, to in rows.items() for kind in ("weight", "bias")}


_ATTENTION: Rows = {
    "self_attention.linear_qkv.layer_norm_weight": Copy("norm1.weight"),
    "self_attention.linear_qkv.layer_norm_bias": Copy("norm1.bias"),
    "self_attention.linear_qkv.weight": VisionQKV("attn.qkv.weight"),
    "self_attention.linear_qkv.bias": VisionQKV("attn.qkv.bias"),
    **_both({"self_attention.linear_proj": "attn.proj"}),
    "mlp.linear_fc1.layer_norm_weight": Copy("norm2.weight"),
    "mlp.linear_fc1.layer_norm_bias": Copy("norm2.bias"),
}

_GATED_MLP: dict[str, Rule] = {
    "mlp.linear_fc1.weight": Halves("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc1.bias": Halves("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    **_both({"mlp.linear_fc2": "mlp.down_proj"}),
}

QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    model_types=("qwen2_5_vl",),
    ends={
        **ends(),
        "vision_model.patch_embed.proj.weight": Copy("visual.patch_embed.proj.weight"),
        "vision_model.decoder.final_layernorm.weight": Copy("visual.merger.ln_q.weight"),
        **_both({
            "vision_model.projection.encoder.linear_fc1": "visual.merger.mlp.0",
            "vision_model.projection.encoder.linear_fc2": "visual.merger.mlp.2",
        }),
    },
    stacks=(
        decoder(ATTENTION, MLP_NORM, DENSE_MLP),
        Stack("vision_model.decoder.layers.", "visual.blocks.", {**_ATTENTION, **_GATED_MLP}),
    ),
    unchanged={"visual.": "visual."},
)  # fmt: skip

_VISUAL = "model.visual."
_QWEN3_VISION_ENDS: Rows = {
    "vision_model.pos_embed.weight": Copy(f"{_VISUAL}pos_embed.weight"),
    **_both({
        "vision_model.patch_embed.proj": f"{_VISUAL}patch_embed.proj",
        "vision_model.merger.patch_norm": f"{_VISUAL}merger.norm",
        "vision_model.merger.linear_fc1": f"{_VISUAL}merger.linear_fc1",
        "vision_model.merger.linear_fc2": f"{_VISUAL}merger.linear_fc2",
    }),
}  # fmt: skip

_QWEN3_VISION = (
    Stack(
        "vision_model.decoder.layers.", f"{_VISUAL}blocks.",
        {**_ATTENTION, **_both({"mlp.linear_fc1": "mlp.linear_fc1", "mlp.linear_fc2": "mlp.linear_fc2"})},
    ),
    Stack(
        "vision_model.decoder.deepstack_merger_list.", f"{_VISUAL}deepstack_merger_list.",
        _both({"patch_norm": "norm", "linear_fc1": "linear_fc1", "linear_fc2": "linear_fc2"}),
    ),
)  # fmt: skip

_QWEN3_ENDS: Rows = {**ends("model.language_model."), **_QWEN3_VISION_ENDS}
_UNCHANGED = {"visual.": _VISUAL}
_PREFIX = "model.language_model."

QWEN3_VL = Family(
    name="qwen3_vl",
    model_types=("qwen3_vl",),
    ends=_QWEN3_ENDS,
    stacks=(decoder(ATTENTION, QK_NORM, MLP_NORM, DENSE_MLP, prefix=_PREFIX), *_QWEN3_VISION),
    unchanged=_UNCHANGED,
)

# Published in one tensor; versions of transformers differ in whether it is transposed.
_EXPERTS: Rows = {
    "mlp.router.weight": Copy("mlp.gate.weight"),
    "mlp.experts.{e}.linear_fc1.weight": Packed("mlp.experts.gate_up_proj", transposed=None, beside="down_proj"),
    "mlp.experts.{e}.linear_fc2.weight": Packed("mlp.experts.down_proj", transposed=None, beside="gate_up_proj"),
}

QWEN3_VL_MOE = Family(
    name="qwen3_vl_moe",
    model_types=("qwen3_vl_moe",),
    ends=_QWEN3_ENDS,
    stacks=(decoder(ATTENTION, QK_NORM, MLP_NORM, DENSE_MLP, _EXPERTS, prefix=_PREFIX), *_QWEN3_VISION),
    unchanged=_UNCHANGED,
)
