"""DeepSeek-V2 and V3: latent attention, dense first layers, shared experts; V3 routes by a bias and predicts ahead."""

from nbmerge.naming.megatron.blocks import (
    DENSE_MLP,
    LATENT_ATTENTION,
    MLP_NORM,
    ROUTER_BIAS,
    decoder,
    ends,
    experts,
    multi_token_prediction,
    shared_experts,
)
from nbmerge.naming.megatron.family import Family

_LAYER = decoder(LATENT_ATTENTION, MLP_NORM, DENSE_MLP, experts(), shared_experts("mlp.shared_experts"), ROUTER_BIAS)

DEEPSEEK_V2 = Family(
    name="deepseek_v2", model_types=("deepseek_v2",), ends=ends(), stacks=(_LAYER,), proven=True, interleaved=None
)  # fmt: skip

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    model_types=("deepseek_v3", "kimi_k2"),
    ends=ends(),
    stacks=(_LAYER, multi_token_prediction(_LAYER.rows)),
    proven=True,
    interleaved=None,
)
