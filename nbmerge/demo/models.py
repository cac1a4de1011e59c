"""Tiny models of real classes, with dimensions that do not divide evenly and weights that are all different."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbmerge.errors import OptionError

if TYPE_CHECKING:
    from nbmerge.demo.recipes import Recipe

VOCABULARY = 257  # a prime: no number of ranks divides it


@dataclass(frozen=True)
class Architecture:
    """transformers' names of the config and model class, and the values of the tiny config."""

    config_class: str
    model_class: str
    values: Mapping[str, Any]
    has_tokenizer: bool = True


_DECODER: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 18,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "bos_token_id": None,
}
_MOE: Mapping[str, Any] = {
    **_DECODER,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 10,
    "head_dim": 6,
}
_GEMMA4: Mapping[str, Any] = {
    **_DECODER,
    "head_dim": 6,
    "global_head_dim": 6,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 4,
    "num_kv_shared_layers": 0,
}
_RESNET: Mapping[str, Any] = {
    "embedding_size": 6,
    "hidden_sizes": [10, 14],
    "depths": [1, 1],
    "layer_type": "basic",
    "num_labels": 5,
}
ARCHITECTURES: Mapping[str, Architecture] = {
    "qwen2": Architecture("Qwen2Config", "Qwen2ForCausalLM", _DECODER),
    "qwen2_value": Architecture("Qwen2Config", "Qwen2ForTokenClassification", {**_DECODER, "num_labels": 1}),
    "llama": Architecture("LlamaConfig", "LlamaForCausalLM", _DECODER),
    "qwen3": Architecture("Qwen3Config", "Qwen3ForCausalLM", {**_DECODER, "head_dim": 6}),
    "qwen3_moe": Architecture("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _MOE),
    "gemma4": Architecture("Gemma4TextConfig", "Gemma4ForCausalLM", _GEMMA4),
    "resnet": Architecture("ResNetConfig", "ResNetForImageClassification", _RESNET, has_tokenizer=False),
}


def architecture(name: str) -> Architecture:
    """The architecture of that name. Raises OptionError where there is none."""
    if name not in ARCHITECTURES:
        raise OptionError(f"no architecture {name!r}", fix=f"one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def build_model(recipe: Recipe) -> Any:
    """The whole model of a recipe on the CPU, with the same weights in every process that asks for it."""
    import torch
    import transformers

    arch = architecture(recipe.arch)
    config = getattr(transformers, arch.config_class)(**recipe.model_values)
    config.architectures = [arch.model_class]
    config.dtype = getattr(torch, recipe.dtype)
    model = getattr(transformers, arch.model_class)(config)
    if recipe.extra_buffers:
        model.register_buffer("steps_seen", torch.tensor(0))
        model.register_buffer("tokens_seen", torch.zeros(5, dtype=torch.int64))
    fill(model, recipe.seed)
    if recipe.is_megatron and hasattr(model, "score"):
        torch.nn.init.zeros_(model.score.bias)  # Megatron's value head has none, which is as good as one of zeros
    return model.to(config.dtype).eval()


def fill(model: Any, seed: int) -> None:
    """Gives every parameter and saved buffer random values, so that no two of them can be taken for each other."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.normal_(mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.3, generator=generator)
            else:
                tensor.random_(1, 1000, generator=generator)


def with_adapter(model: Any, recipe: Recipe) -> Any:
    """The model in peft's wrapper, with an adapter on all linear layers that is no longer as it was initialised."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=recipe.lora_r, lora_alpha=2 * recipe.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05, generator=generator)
    return adapted
