"""Qwen3-MoE: Qwen3 with routed experts."""

from nbmerge.naming.megatron.blocks import ATTENTION, DENSE_MLP, MLP_NORM, QK_NORM, decoder, ends, experts
from nbmerge.naming.megatron.family import Family

QWEN3_MOE = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    ends=ends(),
    stacks=(decoder(ATTENTION, QK_NORM, MLP_NORM, DENSE_MLP, experts()),),
    proven=True,
)
