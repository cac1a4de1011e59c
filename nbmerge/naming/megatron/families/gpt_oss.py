"""gpt-oss: biases everywhere, attention sinks, and experts that are published in one tensor, transposed.

Published experts have gate and up in turns, column by column. Source: Megatron-Bridge, models/gpt_oss.
"""

from nbmerge.naming.megatron.blocks import ATTENTION, MLP_NORM, decoder, ends
from nbmerge.naming.megatron.family import Family, Rows
from nbmerge.naming.megatron.rules import Copy, Packed

_EXPERTS: Rows = {
    "mlp.router.weight": Copy("mlp.router.weight"),
    "mlp.router.bias": Copy("mlp.router.bias"),
    "mlp.experts.{e}.linear_fc1.weight": Packed("mlp.experts.gate_up_proj", transposed=True, interleaved=True),
    "mlp.experts.{e}.linear_fc1.bias": Packed("mlp.experts.gate_up_proj_bias", interleaved=True),
    "mlp.experts.{e}.linear_fc2.weight": Packed("mlp.experts.down_proj", transposed=True),
    "mlp.experts.{e}.linear_fc2.bias": Packed("mlp.experts.down_proj_bias"),
}

_SINKS: Rows = {"self_attention.core_attention.softmax_offset": Copy("self_attn.sinks")}

GPT_OSS = Family(
    name="gpt_oss",
    model_types=("gpt_oss",),
    ends=ends(),
    stacks=(decoder(ATTENTION, _SINKS, MLP_NORM, _EXPERTS),),
)
