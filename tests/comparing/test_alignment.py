"""Which tensors are compared with which: names, dialects, ties, padded vocabularies, and what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nbmerge.comparing.alignment import align
from nbmerge.comparing.differ import diff_weights
from nbmerge.comparing.rolling import EMBEDDINGS, MATRICES, NORMS, place_of
from nbmerge.comparing.sources import both_weights
from nbmerge.opening import open_checkpoint
from nbmerge.weights import Weights, weights_of
from tests.comparing.making import save, weights
from tests.support.megatron_models import megatron_state, write_megatron
from tests.support.models import (
    HAS_CONVERSIONS,
    memory_state,
    published_state,
    save_tiny_model,
    write_config,
    write_model_world,
)


def published(tmp_path: Path, family: str, **changes: object) -> Weights:
    """A directory as save_pretrained writes it, with its config."""
    directory = save(tmp_path / f"{family}_published", published_state(family))
    write_config(directory, family, **changes)
    return weights_of(directory)


def in_memory(tmp_path: Path, family: str) -> Weights:
    """A directory with the names in memory."""
    state = {name: tensor.clone() for name, tensor in memory_state(family).items()}
    directory = save(tmp_path / f"{family}_memory", state)
    write_config(directory, family)
    return weights_of(directory)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_tied", "qwen3_moe", "mixtral"])
def test_a_checkpoint_and_its_merge_are_equal(tmp_path: Path, family: str) -> None:
    checkpoint = weights_of(write_model_world(tmp_path / "world", family, 3))
    diff = diff_weights(checkpoint, weights_of(save_tiny_model(family, tmp_path / "merged")))
    assert diff.is_empty, diff.sentence
    assert len(diff.tensors) == len(published_state(family))


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_a_megatron_checkpoint_and_its_model_are_equal(tmp_path: Path, family: str) -> None:
    checkpoint = weights_of(write_megatron(tmp_path / "world", megatron_state(family), family))
    assert diff_weights(checkpoint, weights_of(save_tiny_model(family, tmp_path / "model"))).is_empty


@pytest.mark.parametrize("opened", [False, True])
def test_a_checkpoint_without_a_config_is_opened_with_the_others(tmp_path: Path, opened: bool) -> None:
    write_megatron(tmp_path / "world", megatron_state("qwen2"), "qwen2")
    (tmp_path / "world" / "huggingface").rename(tmp_path / "elsewhere")
    source: Any = tmp_path / "world" / "dist_ckpt"
    model = save_tiny_model("qwen2", tmp_path / "model")
    source = open_checkpoint(source) if opened else source
    assert diff_weights(*both_weights(source, model)).is_empty
    assert diff_weights(*both_weights(model, source)).is_empty
    assert not diff_weights(weights_of(source), weights_of(model)).tensors


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "qwen2_moe", "qwen3_vl_moe", "gemma3_vision"])
@pytest.mark.parametrize("turned", [False, True])
def test_published_names_meet_names_in_memory(tmp_path: Path, family: str, turned: bool) -> None:
    a, b = published(tmp_path, family), in_memory(tmp_path, family)
    diff = diff_weights(b, a) if turned else diff_weights(a, b)
    assert not diff.changed
    assert not diff.mismatched
    assert not diff.unmatched
    assert set(diff.tensors) >= set(published_state(family))
    assert any("names in memory" in note for note in diff.notes) or a.tensors.keys() == b.tensors.keys()


@pytest.mark.skipif(not HAS_CONVERSIONS, reason="transformers 4 keeps the experts of Mixtral one by one")
def test_a_changed_expert_is_found_in_the_fused_tensor(tmp_path: Path) -> None:
    a, state = published(tmp_path, "mixtral"), memory_state("mixtral")
    name = next(name for name in state if name.endswith("experts.down_proj"))
    state[name][2, 3, 4] += 1
    directory = save(tmp_path / "changed", {key: tensor.clone() for key, tensor in state.items()})
    write_config(directory, "mixtral")
    (changed,) = diff_weights(a, weights_of(directory)).changed
    assert (changed.changed, changed.largest_at) == (1, (3, 4))
    assert ".experts.2." in changed.name


def test_a_side_without_a_config_takes_the_others(tmp_path: Path) -> None:
    bare = weights(tmp_path / "bare", memory_state("mixtral"))
    assert diff_weights(bare, published(tmp_path, "mixtral")).is_empty


def test_wrappers_prefixes_are_taken_off(tmp_path: Path) -> None:
    a = {"model.norm.weight": torch.ones(3)}
    b = {"module.model._orig_mod.norm.weight": torch.ones(3)}
    assert diff_weights(weights(tmp_path / "a", a), weights(tmp_path / "b", b)).is_empty


def test_a_tied_head_is_compared_with_the_embedding(tmp_path: Path) -> None:
    tied = published(tmp_path, "qwen2_tied")
    state = published_state("qwen2_tied")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    directory = save(tmp_path / "untied", state)
    write_config(directory, "qwen2_tied", tie_word_embeddings=False)
    diff = diff_weights(tied, weights_of(directory))
    assert [tensor.name for tensor in diff.changed] == ["lm_head.weight"]
    assert diff["lm_head.weight"].note == "A ties it to model.embed_tokens.weight"
    assert not diff.unmatched


def test_a_padded_vocabulary_is_compared_in_its_common_rows(tmp_path: Path) -> None:
    a = {"model.embed_tokens.weight": torch.randn(37, 8), "lm_head.weight": torch.randn(37, 8)}
    b = {name: torch.cat([tensor, torch.zeros(11, 8)]) for name, tensor in a.items()}
    for turned in (False, True):
        x, y = weights(tmp_path / "a", a), weights(tmp_path / "b", b)
        diff = diff_weights(y, x) if turned else diff_weights(x, y)
        assert not diff.changed
        assert not diff.is_empty
        assert diff["lm_head.weight"].shape == (37, 8)
        beyond = [(one.name, one.shape, one.why) for one in (diff.only_a if turned else diff.only_b)]
        assert ("lm_head.weight", (11, 8), "rows of the vocabulary from 37 on") in beyond
        assert "2 tensors are only in" in diff.sentence


def test_what_no_rule_pairs_is_listed(tmp_path: Path) -> None:
    a = {"x.weight": torch.ones(3, 4), "steps": torch.ones(2), "only": torch.ones(1)}
    b = {"x.weight": torch.ones(4, 3), "steps": torch.ones(2, dtype=torch.int32), "other": torch.ones(1)}
    alignment = align(weights(tmp_path / "a", a), weights(tmp_path / "b", b))
    assert alignment.pairs == ()
    assert [(one.name, one.why) for one in alignment.mismatched] == [
        ("steps", "float32 and int32 cannot be compared"),
        ("x.weight", "[3, 4] and [4, 3]: no rule says which elements belong together"),
    ]
    assert [(one.name, one.side) for one in alignment.unmatched] == [("only", "A"), ("other", "B")]


def test_a_config_that_makes_no_model_is_told(tmp_path: Path) -> None:
    directory = save(tmp_path / "a", {"x": torch.ones(1)})
    (directory / "config.json").write_text('{"model_type": "nothing-like-it"}')
    alignment = align(weights_of(directory), weights(tmp_path / "b", {"y": torch.ones(1)}))
    assert any(note.startswith("the config of A tells no names: ") for note in alignment.notes)


def test_models_that_agree_ask_no_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbmerge.naming.model import HFModel

    a = published(tmp_path, "qwen2")
    monkeypatch.setattr(HFModel, "facts", property(lambda self: pytest.fail("asked")))
    assert len(align(a, a).pairs) == len(a.tensors)


@pytest.mark.parametrize(
    ("name", "dims", "stack", "layer", "kind", "part"),
    [
        ("model.layers.3.self_attn.q_proj.weight", 2, "model.layers", 3, "self_attn.q_proj", MATRICES),
        ("model.layers.3.self_attn.q_proj.bias", 1, "model.layers", 3, "self_attn.q_proj", "biases"),
        ("model.layers.3.mlp.experts.17.up_proj.weight", 2, "model.layers", 3, "mlp.experts", MATRICES),
        ("model.layers.3.mlp.experts.gate_up_proj", 3, "model.layers", 3, "mlp.experts", MATRICES),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", 2, "model.layers", 3, "mlp.shared_experts.up_proj",
         MATRICES),
        ("model.layers.0.post_attention_layernorm.weight", 1, "model.layers", 0, "norms", NORMS),
        ("model.layers.0.self_attn.q_norm.weight", 1, "model.layers", 0, "norms", NORMS),
        ("transformer.h.11.ln_1.weight", 1, "transformer.h", 11, "norms", NORMS),
        ("model.norm.weight", 1, "", None, "norms", NORMS),
        ("model.embed_tokens.weight", 2, "", None, "embed_tokens", EMBEDDINGS),
        ("lm_head.weight", 2, "", None, "lm_head", EMBEDDINGS),
        ("visual.blocks.7.attn.qkv.weight", 2, "visual.blocks", 7, "attn.qkv", MATRICES),
        ("visual.merger.mlp.0.weight", 2, "", None, "visual.merger.mlp", MATRICES),
        ("model.layers.2.mlp.gate.e_score_correction_bias", 1, "model.layers", 2, "mlp.gate.e_score_correction_bias",
         "biases"),
        ("weight", 2, "", None, "weight", MATRICES),
        ("A_log", 1, "", None, "A_log", "other tensors"),
    ],
)  # fmt: skip
def test_names_have_places(name: str, dims: int, stack: str, layer: int | None, kind: str, part: str) -> None:
    place = place_of(name, dims)
    assert (place.stack, place.layer, place.kind, place.part) == (stack, layer, kind, part)
