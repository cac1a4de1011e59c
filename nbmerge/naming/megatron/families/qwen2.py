"""Qwen2 and Qwen2.5: Llama's tensors, and biases on query, key and value."""

from nbmerge.naming.megatron.blocks import ATTENTION, DENSE_MLP, MLP_NORM, decoder, ends
from nbmerge.naming.megatron.family import Family

QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    ends=ends(),
    stacks=(decoder(ATTENTION, MLP_NORM, DENSE_MLP),),
    proven=True,
)
