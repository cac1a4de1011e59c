"""Qwen3: norms of query and key heads, and no biases."""

from nbmerge.naming.megatron.blocks import ATTENTION, DENSE_MLP, MLP_NORM, QK_NORM, decoder, ends
from nbmerge.naming.megatron.family import Family

QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    ends=ends(),
    stacks=(decoder(ATTENTION, QK_NORM, MLP_NORM, DENSE_MLP),),
    proven=True,
)
