"""The published sizes: held against transformers' own defaults where those are a published model's."""

from __future__ import annotations

from collections import Counter

import pytest

from nbmerge.explaining.anatomy import Anatomy
from nbmerge.explaining.diagnosis import Diagnosis
from nbmerge.explaining.sizes import PUBLISHED


def by_name(name: str):
    return next(model for model in PUBLISHED if model.name == name)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("LlamaConfig", "Llama 2 7B"), ("MistralConfig", "Mistral 7B"), ("MixtralConfig", "Mixtral 8x7B"),
        ("GemmaConfig", "Gemma 7B"), ("Gemma2Config", "Gemma 2 2B"), ("GptOssConfig", "gpt-oss 120B"),
        ("DeepseekV3Config", "DeepSeek-V3"),
    ],
)  # fmt: skip
def test_are_those_of_transformers_defaults(config: str, name: str):
    import transformers

    theirs, ours = getattr(transformers, config)(), by_name(name)
    assert theirs.hidden_size == ours.hidden_size
    assert theirs.num_hidden_layers == ours.layers
    assert theirs.num_attention_heads == ours.heads
    # Gemma 2's default is a size of its own in some fields; these three name it.
    if config != "Gemma2Config":
        assert theirs.intermediate_size == ours.intermediate_size
        assert theirs.num_key_value_heads == ours.key_value_heads
    assert theirs.model_type in ours.model_types


def test_are_told_apart_by_their_shapes():
    """No two models have all the same sizes but those that differ in nothing but the vocabulary."""
    keys = Counter(
        (m.hidden_size, m.intermediate_size, m.layers, m.heads, m.key_value_heads, m.head_dim, m.vocab_size, m.experts)
        for m in PUBLISHED
    )
    assert max(keys.values()) == 1


def shapes_of(name: str, extra: dict[str, tuple[int, ...]] | None = None) -> dict[str, tuple[int, ...]]:
    """A few tensors of each layer of a published model."""
    m = by_name(name)
    shapes = {"model.embed_tokens.weight": (m.vocab_size, m.hidden_size)}
    for layer in range(m.layers):
        at = f"model.layers.{layer}."
        shapes[at + "self_attn.q_proj.weight"] = (m.query_rows, m.hidden_size)
        shapes[at + "self_attn.k_proj.weight"] = (m.key_rows, m.hidden_size)
        shapes[at + "mlp.gate_proj.weight"] = (m.intermediate_size, m.hidden_size)
        shapes[at + "mlp.down_proj.weight"] = (m.hidden_size, m.intermediate_size)
    return shapes | (extra or {})


@pytest.mark.parametrize("name", [model.name for model in PUBLISHED if not model.experts])
def test_a_model_is_named_by_its_shapes(name: str):
    assert [model.name for model in Anatomy.of(shapes_of(name)).published()] == [name]


def test_another_size_of_the_family_is_named():
    diagnosis = Diagnosis("Qwen3ForCausalLM", shapes_of("Qwen3 8B"), shapes_of("Qwen3 4B"))
    assert diagnosis.sentence == (
        "config.json is of another size: the checkpoint has hidden_size 4096 and intermediate_size 12288, the sizes of "
        "Qwen3 8B; config.json says hidden_size 2560 and intermediate_size 9728"
    )
    (problem,) = diagnosis.problem()
    assert problem.fix.startswith("pass the config of Qwen3 8B")


def test_another_family_is_told_by_its_parts():
    norms = {"model.layers.0.self_attn.k_norm.weight": (128,)}
    diagnosis = Diagnosis("LlamaForCausalLM", shapes_of("Llama 3 8B", norms), shapes_of("Llama 3 8B"))
    assert diagnosis.sentence == (
        "config.json is of another family: the checkpoint has query and key norms, which LlamaForCausalLM has not, and "
        "its tensors are named as those of Qwen3"
    )


def test_a_padded_vocabulary_is_no_other_model():
    padded = shapes_of("Llama 3 8B", {"model.embed_tokens.weight": (128512, 4096)})
    assert Diagnosis("LlamaForCausalLM", padded, shapes_of("Llama 3 8B")).sentence == ""


def test_one_layer_less_is_no_other_model():
    fewer = {name: shape for name, shape in shapes_of("Llama 3 8B").items() if ".31." not in name}
    assert Diagnosis("LlamaForCausalLM", fewer, shapes_of("Llama 3 8B")).sentence == ""
