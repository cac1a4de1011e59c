"""Qwen1.5-MoE and Qwen2-MoE: routed experts, and a shared one behind a gate."""

from nbmerge.naming.megatron.blocks import ATTENTION, DENSE_MLP, MLP_NORM, decoder, ends, experts, shared_experts
from nbmerge.naming.megatron.family import Family
from nbmerge.naming.megatron.rules import Copy

QWEN2_MOE = Family(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    ends=ends(),
    stacks=(
        decoder(
            ATTENTION, MLP_NORM, DENSE_MLP, experts(), shared_experts("mlp.shared_expert"),
            {"mlp.shared_experts.gate_weight": Copy("mlp.shared_expert_gate.weight")},
        ),
    ),
    proven=True,
)  # fmt: skip
