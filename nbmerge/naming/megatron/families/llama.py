"""Llama 2 and 3, and Mistral, which has the same tensors."""

from nbmerge.naming.megatron.blocks import ATTENTION, DENSE_MLP, MLP_NORM, decoder, ends
from nbmerge.naming.megatron.family import Family

LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral"),
    ends=ends(),
    stacks=(decoder(ATTENTION, MLP_NORM, DENSE_MLP),),
    proven=True,
)
