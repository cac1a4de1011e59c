"""The checkpoints that these tests merge, by name."""

from __future__ import annotations

from collections.abc import Mapping

from nbmerge.demo import Recipe
from nbmerge.demo.recipes import MEGATRON_ARCHITECTURES

# Dimensions that two ranks of tensor parallelism divide.
_EVEN = {
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

RECIPES: Mapping[str, Recipe] = {
    "fsdp2": Recipe(optimizer=True),
    "fsdp2_renamed_mesh_tied_bf16": Recipe(mesh_dim_names=("dp_shard",), tied=True, dtype="bfloat16", seed=1),
    "fsdp2_fp16_llama": Recipe(arch="llama", dtype="float16"),
    "fsdp2_world_of_1": Recipe(world_size=1),
    "fsdp2_world_of_3": Recipe(world_size=3),
    "fsdp2_world_of_8": Recipe(world_size=8),
    "hsdp_2x2_bf16": Recipe(layout="hsdp", dtype="bfloat16"),
    "hsdp_4x2_renamed": Recipe(layout="hsdp", world_size=8, mesh_shape=(4, 2), mesh_dim_names=("replica", "shards")),
    "tp_2x2_even_tied_bf16": Recipe(layout="fsdp_tp", dtype="bfloat16", tied=True, config=_EVEN),
    "tp_2x2_uneven": Recipe(layout="fsdp_tp"),
    "tp_4x2_uneven": Recipe(layout="fsdp_tp", world_size=8),
    "tp_2x4_uneven": Recipe(layout="fsdp_tp", world_size=8, mesh_shape=(2, 4)),
    "three_dimensional_2x2x2": Recipe(layout="ddp_fsdp_tp", world_size=8),
    "fsdp1_mesh": Recipe(layout="fsdp1"),
    "fsdp1_mesh_flat_params_bf16": Recipe(layout="fsdp1", use_orig_params=False, dtype="bfloat16"),
    "fsdp1_mesh_tied": Recipe(layout="fsdp1", tied=True),
    "fsdp1_hsdp_2x2": Recipe(layout="fsdp1_hsdp"),
    "fsdp1_no_mesh": Recipe(layout="fsdp1_no_mesh"),
    "fsdp1_no_mesh_flat_params_tied": Recipe(layout="fsdp1_no_mesh", use_orig_params=False, tied=True),
    "fsdp1_no_mesh_world_of_8": Recipe(layout="fsdp1_no_mesh", world_size=8),
    "fsdp1_world_of_1": Recipe(layout="fsdp1", world_size=1),
    "fsdp1_no_mesh_world_of_1": Recipe(layout="fsdp1_no_mesh", world_size=1),
    "plain_world_of_1": Recipe(layout="plain", world_size=1),
    "mixture_of_experts_fsdp2": Recipe(arch="qwen3_moe"),
    "mixture_of_experts_fsdp1_no_mesh": Recipe(arch="qwen3_moe", layout="fsdp1_no_mesh", dtype="bfloat16"),
    "value_model": Recipe(arch="qwen2_value"),
    "buffers_of_one_element_gemma4": Recipe(arch="gemma4", tied=True),
    "buffers_of_no_dimension_resnet_fsdp2": Recipe(arch="resnet"),
    "buffers_of_no_dimension_resnet_fsdp1": Recipe(arch="resnet", layout="fsdp1_no_mesh"),
}

# They have an index, and no merge.
UNMERGED: Mapping[str, Recipe] = {
    "unknown_buffers_fsdp2": Recipe(extra_buffers=True),
    "unknown_buffers_fsdp1_no_mesh": Recipe(extra_buffers=True, layout="fsdp1_no_mesh"),
}
REFUSED: Mapping[str, Recipe] = {
    "flat_parameters": Recipe(layout="fsdp1_flat", use_orig_params=False),
    "flat_parameters_orig_params": Recipe(layout="fsdp1_flat"),
}

# Megatron: all layouts of all architectures; those of more ranks, dtypes and forms besides.
MEGATRON: Mapping[str, Recipe] = {
    "dense": Recipe(layout="megatron_v1"),  # 3 layers on 2 stages, 2 ranks of tensor parallelism
    "experts": Recipe(layout="megatron", arch="qwen3_moe", mesh_shape=(1, 2, 2), dtype="bfloat16", optimizer=True),
    "megatron_lm": Recipe(layout="megatron_lm", arch="llama", tied=True),
    "value": Recipe(layout="megatron", arch="qwen2_value", world_size=2),
    "thick": Recipe(layout="megatron", arch="qwen3", world_size=2, mesh_shape=(2, 1, 1)),
    **{
        f"{layout}_{arch}": Recipe(layout=layout, arch=arch, seed=1)
        for layout in ("megatron", "megatron_v1", "megatron_lm")
        for arch in MEGATRON_ARCHITECTURES
    },
    "one_rank": Recipe(layout="megatron_v1", world_size=1, mesh_shape=(1, 1, 1)),
    "three_stages": Recipe(layout="megatron_v1", arch="llama", world_size=3, mesh_shape=(3, 1, 1), dtype="float16"),
    "tied_with_optimizer": Recipe(layout="megatron_v1", tied=True, optimizer=True, dtype="bfloat16"),
    "experts_of_three_ranks": Recipe(layout="megatron_lm", arch="qwen3_moe", world_size=6, mesh_shape=(1, 3, 2)),
    "experts_on_stages": Recipe(layout="megatron_v1", arch="qwen3_moe", world_size=8, mesh_shape=(2, 2, 2)),
}

EVERY: Mapping[str, Recipe] = {
    **RECIPES,
    **UNMERGED,
    **REFUSED,
    **{f"megatron {name}": recipe for name, recipe in MEGATRON.items()},
}
