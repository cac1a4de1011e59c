"""What lies around and beside the containers: where each goes, the sizes of the model as JSON, and small files."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbmerge.demo.megatron.pieces import ParallelSizes, layers_of

ITERATION = 10
_LM = f"iter_{ITERATION:07d}"
# By layout: the directories of weights, of random number generators and of the optimizer's state.
CONTAINERS: Mapping[str, tuple[str, str, str]] = {
    "megatron": ("model/dist_ckpt", "extra/dist_ckpt", "optimizer/dist_ckpt"),  # verl 0.9 and later
    "megatron_v1": ("dist_ckpt", "dist_ckpt", "dist_ckpt"),  # verl 0.5 to 0.8
    "megatron_lm": (_LM, _LM, _LM),
}
_CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


def huggingface_directory(layout: str, checkpoint: Path) -> Path:
    """Where config.json and the tokenizer go; Megatron-LM writes none, so they lie outside its checkpoint."""
    if layout == "megatron_lm":
        return checkpoint.parent / "huggingface"
    return checkpoint / "model" / "huggingface" if layout == "megatron" else checkpoint / "huggingface"


def write_around(checkpoint: Path, layout: str, config: Any, sizes: ParallelSizes, *, optimizer: bool) -> None:
    """The files of a checkpoint that are in no container. config: transformers' config of the model."""
    if layout == "megatron_lm":
        (checkpoint / "latest_checkpointed_iteration.txt").write_text(str(ITERATION), encoding="utf-8")
        return
    _write_json(checkpoint / "transformer_config.json", transformer_config(config, sizes))
    if layout == "megatron":
        _write_json(checkpoint / "ckpt_contents.json", _contents(sizes.world_size, optimizer=optimizer))


def write_beside(container: Path, layout: str, config: Any, sizes: ParallelSizes, *, rows: int) -> None:
    """metadata.json and common.pt of one container. rows: of the padded vocabulary."""
    import torch

    common: dict[str, Any] = {"content_metadata": _CONTENT}
    if layout == "megatron_lm":
        arguments = training_arguments(config, sizes, rows=rows)
        common |= {"args": arguments, "checkpoint_version": 3.0, "iteration": ITERATION}
    torch.save(common, container / "common.pt")
    about = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    about |= {"common_backend": "torch", "common_backend_version": 1}
    (container / "metadata.json").write_text(json.dumps(about), encoding="utf-8")


def transformer_config(config: Any, sizes: ParallelSizes) -> dict[str, Any]:
    """The part of megatron-core's TransformerConfig that says anything about shapes, as verl writes it."""
    first = len(layers_of(0, sizes.layers, sizes.pp)) if sizes.layers % sizes.pp else None
    experts = sizes.experts or None
    return {
        "tensor_model_parallel_size": sizes.tp,
        "pipeline_model_parallel_size": sizes.pp,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "expert_model_parallel_size": sizes.ep,
        "expert_tensor_parallel_size": sizes.expert_tp,
        "params_dtype": str(config.dtype),
        "num_layers": sizes.layers,
        "num_layers_in_first_pipeline_stage": first,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "ffn_hidden_size": config.intermediate_size,
        "kv_channels": _head_dim(config),
        "add_bias_linear": False,
        "add_qkv_bias": config.model_type == "qwen2",
        "gated_linear_unit": True,
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": config.moe_intermediate_size if experts else None,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "qk_layernorm": config.model_type in ("qwen3", "qwen3_moe"),
        "multi_latent_attention": False,
        "transformer_impl": "transformer_engine",
    }


def training_arguments(config: Any, sizes: ParallelSizes, *, rows: int) -> Namespace:
    """The arguments of the training run that Megatron-LM saves, as far as they say anything about shapes."""
    known = transformer_config(config, sizes)
    for name in ("params_dtype", "gated_linear_unit", "num_moe_experts", "layernorm_epsilon"):
        del known[name]  # Megatron-LM names them otherwise, or not at all
    return Namespace(
        **known,
        params_dtype=config.dtype,
        swiglu=True,
        num_experts=sizes.experts or None,
        vocab_size=config.vocab_size,
        padded_vocab_size=rows,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        world_size=sizes.world_size,
        ckpt_format="torch_dist",
    )


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _contents(world_size: int, *, optimizer: bool) -> dict[str, Any]:
    """verl's own table of what the checkpoint holds."""
    entry = {"format": "megatron_dist_checkpoint"}
    contents: dict[str, Any] = {
        "hf_config": {"format": "huggingface", "path": "model/huggingface"},
        "model": {"backend": "dist_checkpointing", **entry, "path": "model/dist_ckpt"},
        "rng_state": {**entry, "key": "rng_state", "path": "extra/dist_ckpt"},
        "transformer_config": {"format": "json", "path": "transformer_config.json"},
    }
    if optimizer:
        contents["optimizer"] = {**entry, "path": "optimizer/dist_ckpt"}
    return {
        "arch": None,
        "backend": {"has_bridge": False, "peft": False, "use_dist_checkpointing": True},
        "contents": contents,
        "directories": {},
        "framework": "megatron",
        "global_step": 0,
        "role": "actor",
        "save_contents": ["model", *(["optimizer"] if optimizer else []), "extra"],
        "saved_any_dist_ckpt": True,
        "schema_version": 2,
        "world_size": world_size,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
