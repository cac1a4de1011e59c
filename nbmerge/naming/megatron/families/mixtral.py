"""Mixtral, whose experts are called w1 (gate), w2 (down) and w3 (up)."""

from nbmerge.naming.megatron.blocks import ATTENTION, MLP_NORM, decoder, ends, experts
from nbmerge.naming.megatron.family import Family

MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    ends=ends(),
    stacks=(decoder(ATTENTION, MLP_NORM, experts("block_sparse_moe", gate="w1", up="w3", down="w2")),),
    proven=True,
)
