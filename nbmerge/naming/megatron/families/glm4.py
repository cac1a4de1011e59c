"""GLM-4, dense and with experts.

The dense model has norms after attention and MLP, which Megatron-LM itself does not have: slime and mbridge add them
under these names. Sources: slime, megatron_to_hf/glm4.py; Megatron-Bridge, models/glm/glm45_bridge.py.
"""

from nbmerge.naming.megatron.blocks import (
    ATTENTION,
    DENSE_MLP,
    MLP_NORM,
    QK_NORM,
    ROUTER_BIAS,
    decoder,
    ends,
    experts,
    multi_token_prediction,
    shared_experts,
)
from nbmerge.naming.megatron.family import Family, Rows
from nbmerge.naming.megatron.rules import Copy

_FUSED_MLP: Rows = {
    "mlp.linear_fc1.weight": Copy("mlp.gate_up_proj.weight"),
    "mlp.linear_fc2.weight": Copy("mlp.down_proj.weight"),
    "post_self_attn_layernorm.weight": Copy("post_self_attn_layernorm.weight"),
    "post_mlp_layernorm.weight": Copy("post_mlp_layernorm.weight"),
}

GLM_4 = Family(
    name="glm4",
    model_types=("glm4",),
    ends=ends(),
    stacks=(decoder(ATTENTION, MLP_NORM, _FUSED_MLP),),
    interleaved=True,  # slime, scripts/models/glm4-9B.sh
)

_LAYER = decoder(
    ATTENTION, QK_NORM, MLP_NORM, DENSE_MLP, experts(), shared_experts("mlp.shared_experts"), ROUTER_BIAS
)  # fmt: skip

GLM_4_MOE = Family(
    name="glm4_moe",
    model_types=("glm4_moe",),
    ends=ends(),
    stacks=(_LAYER, multi_token_prediction(_LAYER.rows)),
)
