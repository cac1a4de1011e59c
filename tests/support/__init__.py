"""Small helpers that make real checkpoints and read real results.

models     tiny random models, and what `save_pretrained` writes of them
adapters   peft models of the tiny families, and checkpoints of them
worlds     per-rank FSDP checkpoints: plain tensors, and real DTensors and ShardedTensors without process groups
megatron   Megatron checkpoints: tensors (`_names` of `_layers` and `_vision`, `_forms`), `_objects`, containers,
           `_others` (FSDP and zarr), `_models` (whole checkpoints of the tiny models), `_runs` (directories of runs)
deepspeed  DeepSpeed checkpoints in their documented form, for any number of pretend ranks
pickles    torch.save archives around any pickle
trees      random expressions, each with the tensor that torch makes of it
results    what is on disk: tensors by name, bit by bit
processes  a fresh interpreter, another user
"""

from __future__ import annotations

import os

from hypothesis import settings


def examples(count: int) -> settings:
    """So many random examples; thirty times as many with NBMERGE_HYPOTHESIS=thorough."""
    return settings(max_examples=count * (30 if os.environ.get("NBMERGE_HYPOTHESIS") == "thorough" else 1))
