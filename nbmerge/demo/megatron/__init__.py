"""Megatron checkpoints without Megatron: torch's own writer, and keys, pieces and files as megatron-core has them.

pieces   which boxes of each tensor a rank holds
names    a published model under Megatron's names
files    what lies beside the containers
save     the container itself, written by the ranks of a process group
"""
