"""Tiny random models of several families, and checkpoints of them.

Sizes are odd on purpose (5 rows on 2 ranks), so that what is put together wrong does not pass by luck.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.support.worlds import write_mesh_world, write_ranks

_TEXT = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
_VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16,
           "patch_size": 2, "spatial_merge_size": 2}  # fmt: skip
_SIGLIP = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
           "image_size": 8, "patch_size": 2, "vision_use_head": False}  # fmt: skip
HAS_CONVERSIONS = version("transformers").split(".")[0] != "4"
"""Whether the installed transformers fuses experts in memory and turns that round when it saves."""

_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}


def _rope() -> dict[str, Any]:
    """The rotary embedding of a vision-language model, under the key that the installed transformers has for it."""
    return {"rope_parameters" if HAS_CONVERSIONS else "rope_scaling": dict(_ROPE)}


def _config(name: str) -> tuple[str, Any]:
    """Class name and config of a family."""
    import transformers as tf

    text = dict(_TEXT)
    head = dict(text, head_dim=4)
    wide = dict(text, head_dim=6)  # other than hidden_size / heads
    latent = dict(
        text, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=6,
        first_k_dense_replace=1, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    make: dict[str, Callable[[], tuple[str, Any]]] = {
        "qwen2": lambda: ("Qwen2ForCausalLM", tf.Qwen2Config(**text, tie_word_embeddings=False)),
        "qwen2_tied": lambda: ("Qwen2ForCausalLM", tf.Qwen2Config(**text, tie_word_embeddings=True)),
        "qwen2_value": lambda: ("Qwen2ForTokenClassification", tf.Qwen2Config(**text, num_labels=1)),
        "llama": lambda: ("LlamaForCausalLM", tf.LlamaConfig(**text, tie_word_embeddings=False)),
        "qwen3": lambda: ("Qwen3ForCausalLM", tf.Qwen3Config(**head, tie_word_embeddings=False)),
        "qwen2_moe": lambda: (
            "Qwen2MoeForCausalLM",
            tf.Qwen2MoeConfig(
                **text, **_EXPERTS, shared_expert_intermediate_size=10, decoder_sparse_step=1, tie_word_embeddings=False
            ),
        ),
        "qwen3_moe": lambda: (
            "Qwen3MoeForCausalLM",
            tf.Qwen3MoeConfig(**head, **_EXPERTS, decoder_sparse_step=1, tie_word_embeddings=False),
        ),
        "mixtral": lambda: (
            "MixtralForCausalLM",
            tf.MixtralConfig(**text, num_local_experts=3, num_experts_per_tok=2, tie_word_embeddings=False),
        ),
        "gemma3": lambda: (
            "Gemma3ForCausalLM",
            tf.Gemma3TextConfig(**head, query_pre_attn_scalar=4, sliding_window=16),
        ),
        "gemma2": lambda: (
            "Gemma2ForCausalLM",
            tf.Gemma2Config(**wide, query_pre_attn_scalar=4, sliding_window=16),
        ),
        "gemma": lambda: ("GemmaForCausalLM", tf.GemmaConfig(**wide)),
        "gemma3_vision": lambda: (
            "Gemma3ForConditionalGeneration",
            tf.Gemma3Config(
                text_config=dict(head, query_pre_attn_scalar=4, sliding_window=16),
                vision_config=_SIGLIP, mm_tokens_per_image=4, boi_token_index=1, eoi_token_index=2, image_token_index=3,
            ),
        ),
        "mistral": lambda: (
            "MistralForCausalLM",
            tf.MistralConfig(**wide, sliding_window=None, tie_word_embeddings=False),
        ),
        "glm4": lambda: (
            "Glm4ForCausalLM",
            tf.Glm4Config(**head, attention_bias=True, pad_token_id=0, eos_token_id=0, tie_word_embeddings=False),
        ),
        "glm4_moe": lambda: (
            "Glm4MoeForCausalLM",
            tf.Glm4MoeConfig(
                **head, n_routed_experts=4, n_shared_experts=1, n_group=2, topk_group=1, num_experts_per_tok=2,
                moe_intermediate_size=6, first_k_dense_replace=1, attention_bias=True, use_qk_norm=True,
                tie_word_embeddings=False,
            ),
        ),
        "gpt_oss": lambda: (
            "GptOssForCausalLM",
            tf.GptOssConfig(
                **head, num_local_experts=4, num_experts_per_tok=2, sliding_window=16, pad_token_id=0, eos_token_id=0,
                tie_word_embeddings=False,
            ),
        ),
        "deepseek_v2": lambda: (
            "DeepseekV2ForCausalLM",
            tf.DeepseekV2Config(**latent, n_shared_experts=2, q_lora_rank=None),
        ),
        "deepseek_v3": lambda: (
            "DeepseekV3ForCausalLM",
            tf.DeepseekV3Config(**latent, n_group=2, topk_group=1, q_lora_rank=8),
        ),
        "deepseek_v3_direct": lambda: (  # Moonlight
            "DeepseekV3ForCausalLM",
            tf.DeepseekV3Config(**latent, n_group=2, topk_group=1, q_lora_rank=None),
        ),
        "qwen2_5_vl": lambda: (
            "Qwen2_5_VLForConditionalGeneration",
            tf.Qwen2_5_VLConfig(
                text_config=dict(text, **_rope()),
                vision_config=dict(_VISION, window_size=8, fullatt_block_indexes=[1]),
                tie_word_embeddings=False,
            ),
        ),
        "qwen3_vl": lambda: (
            "Qwen3VLForConditionalGeneration",
            tf.Qwen3VLConfig(
                text_config=dict(head, **_rope(), tie_word_embeddings=True),
                vision_config=dict(_VISION, num_position_embeddings=16, deepstack_visual_indexes=[0]),
                tie_word_embeddings=True,
            ),
        ),
        "qwen3_vl_deep": lambda: (
            "Qwen3VLForConditionalGeneration",
            tf.Qwen3VLConfig(
                text_config=dict(head, **_rope(), tie_word_embeddings=False),
                vision_config=dict(
                    _VISION, depth=4, intermediate_size=26, num_position_embeddings=16,
                    deepstack_visual_indexes=[0, 1, 3],
                ),
                tie_word_embeddings=False,
            ),
        ),
        "qwen3_vl_moe": lambda: (
            "Qwen3VLMoeForConditionalGeneration",
            tf.Qwen3VLMoeConfig(
                text_config=dict(
                    head, **_EXPERTS, **_rope(), decoder_sparse_step=1, tie_word_embeddings=False
                ),
                vision_config=dict(_VISION, num_position_embeddings=16, deepstack_visual_indexes=[0]),
                tie_word_embeddings=False,
            ),
        ),
    }  # fmt: skip
    return make[name]()


FAMILIES = (
    "qwen2", "qwen2_tied", "qwen2_value", "llama", "qwen3_moe", "mixtral", "gemma3", "deepseek_v3", "qwen2_5_vl",
    "qwen3_vl",
)  # fmt: skip
# Families that only tests of Megatron need.
MORE_FAMILIES = (
    "qwen2_moe", "qwen3", "deepseek_v2", "deepseek_v3_direct", "gemma", "gemma2", "gemma3_vision", "glm4", "glm4_moe",
    "gpt_oss", "mistral", "qwen3_vl_deep", "qwen3_vl_moe",
)  # fmt: skip


@functools.cache
def tiny_model(name: str, dtype: str = "float32") -> Any:
    """A random model of the family, with other values in every tensor. Shared: do not change it."""
    import transformers

    cls, config = _config(name)
    with torch.random.fork_rng(), torch.no_grad():  # the first to ask must not find its own seed changed
        torch.manual_seed(len(name))
        model = getattr(transformers, cls)(config).to(getattr(torch, dtype))
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape) / 8)
    return model.eval()


def memory_state(name: str, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """The model's state dict with its in-memory names, tied copies included."""
    return {key: value.detach().clone() for key, value in tiny_model(name, dtype).state_dict().items()}


def tied_copies(name: str) -> set[str]:
    """The in-memory names whose tensor is that of an earlier name: what is tied, whichever transformers says how."""
    firsts: dict[int, str] = {}
    tensors = tiny_model(name).state_dict(keep_vars=True)
    return {key for key, tensor in tensors.items() if firsts.setdefault(id(tensor), key) != key}


def kept_in_fp32(name: str, tensors: Iterable[str]) -> set[str]:
    """Which of the tensors the installed transformers keeps in fp32 beside bf16 weights: releases differ."""
    kept = {*(tiny_model(name)._keep_in_fp32_modules_strict or ()), "e_score_correction_bias"}
    return {tensor for tensor in tensors if any(f".{tensor}".endswith(f".{each}") for each in kept)}


def tiny_config(name: str) -> Any:
    """The family's config object."""
    return _config(name)[1]


@functools.cache
def _published(name: str, dtype: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as directory:
        path = save_tiny_model(name, Path(directory), dtype) / "model.safetensors"
        return {key: value.clone() for key, value in load_file(path).items()}


def published_state(name: str, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """The model's tensors with their published names, as `save_pretrained` writes them. Do not change them in place."""
    return dict(_published(name, dtype))


def save_tiny_model(name: str, directory: Path, dtype: str = "float32") -> Path:
    """What `save_pretrained` writes of it."""
    tiny_model(name, dtype).save_pretrained(directory)
    return directory


def write_config(directory: Path, name: str, **changes: Any) -> Path:
    """config.json of a family, with `changes`, and a tokenizer file that must be copied as it is."""
    cls, config = _config(name)
    directory.mkdir(parents=True, exist_ok=True)
    content = {**json.loads(config.to_json_string(use_diff=False)), "architectures": [cls], **changes}
    (directory / "config.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_bytes(b'{"odd":\t"bytes", "keep": "them"}\r\n')
    return directory


def write_model_world(
    directory: Path, name: str, world_size: int = 2, dtype: str = "float32", *, state: dict[str, Any] | None = None
) -> Path:
    """A checkpoint of a tiny model with huggingface/: DTensors, or plain tensors at world size 1."""
    state = memory_state(name, dtype) if state is None else state
    if world_size == 1:
        write_ranks(directory, [state])
    else:
        write_mesh_world(directory, state, (world_size,))
    write_config(directory / "huggingface", name)
    return directory
