"""Adapters of embeddings that are one tensor with the head: folded to what peft's merge makes of them."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import nbmerge
from tests.support.adapters import Adapted, adapted, loaded_by_peft, save_adapter_config, write_directory, write_world
from tests.support.messages import assert_says, refusal
from tests.support.models import HAS_CONVERSIONS, save_tiny_model, tiny_model
from tests.support.results import assert_same, bits, receipt_of, saved_bits

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = ["q_proj"]
UNTIED: dict[str, dict[str, Any]] = {
    "embedding_saved": {"modules_to_save": ["embed_tokens"]},
    "head_saved": {"modules_to_save": ["lm_head"]},
    "both_saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding_adapted_head_saved": {"target_modules": ["embed_tokens", *Q], "modules_to_save": ["lm_head"]},
    "head_adapted_embedding_saved": {"target_modules": ["lm_head", *Q], "modules_to_save": ["embed_tokens"]},
}
TIED: dict[str, dict[str, Any]] = {
    "embedding_saved_ensured": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "head_saved_ensured": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "embedding": {"target_modules": ["embed_tokens", *Q]},
    "embedding_dora": {"target_modules": ["embed_tokens", *Q], "use_dora": True},
    "head": {"target_modules": ["lm_head", *Q]},
    "head_dora": {"target_modules": ["lm_head", *Q], "use_dora": True},
    "both": {"target_modules": ["embed_tokens", "lm_head", *Q]},
    "both_dora": {"target_modules": ["embed_tokens", "lm_head", *Q], "use_dora": True},
}
DOUBLED = {"target_modules": ["embed_tokens", *Q], "ensure_weight_tying": True}
_NEEDS_ENSURED = pytest.mark.skipif(
    "ensure_weight_tying" not in {one.name for one in dataclasses.fields(LoraConfig)},
    reason="this peft has no ensure_weight_tying",
)
KINDS = [
    pytest.param(kind, marks=[_NEEDS_ENSURED] if "ensure_weight_tying" in config else [])
    for kind, config in (UNTIED | TIED).items()
]


def tied(kind: str, dtype: str = "bfloat16", family: str = "qwen2_tied") -> Adapted:
    return adapted(family, dtype, **{"target_modules": Q, **copy.deepcopy((UNTIED | TIED)[kind])})


def is_tied(directory: Path) -> bool:
    return bool(json.loads((directory / "config.json").read_text())["tie_word_embeddings"])


def assert_is_peft_s(out: Path, want: dict[str, Any], kind: str) -> None:
    """Same tensors, and a config with which transformers loads them."""
    assert_same(saved_bits(out), want)
    assert is_tied(out) is (kind in TIED)
    assert (HEAD in want) is (kind in UNTIED)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_s_directory(tmp_path: Path, kind: str):
    base = save_tiny_model("qwen2_tied", tmp_path / "base", "bfloat16")
    adapter = write_directory(tmp_path / "adapter", tied(kind))
    nbmerge.merge(adapter, tmp_path / "out", lora="fold", base_model=base)
    loaded = loaded_by_peft("qwen2_tied", base, adapter)
    want = loaded.folded()
    assert_is_peft_s(tmp_path / "out", want, kind)
    assert nbmerge.validate(tmp_path / "out", checkpoint=adapter).ok


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_the_whole_model(tmp_path: Path, kind: str):
    made = tied(kind)
    write_world(tmp_path / "ckpt", made)
    save_adapter_config(made, tmp_path / "ckpt")
    nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", lora="fold")
    assert_is_peft_s(tmp_path / "out", made.folded(), kind)
    assert nbmerge.validate(tmp_path / "out", checkpoint=tmp_path / "ckpt").ok


@pytest.mark.parametrize("kind", UNTIED)
def test_what_comes_apart_computes_what_was_trained(tmp_path: Path, kind: str):
    made = tied(kind, "float32")
    base = save_tiny_model("qwen2_tied", tmp_path / "base")
    adapter = write_directory(tmp_path / "adapter", made)
    nbmerge.merge(adapter, tmp_path / "out", lora="fold", base_model=base)
    model = type(tiny_model("qwen2_tied")).from_pretrained(tmp_path / "out")
    trained = loaded_by_peft("qwen2_tied", base, adapter)
    torch.testing.assert_close(made.logits(model.eval()), trained.logits(), rtol=0, atol=1e-5)
    recorded = receipt_of(tmp_path / "out")
    assert recorded["lora"]["untied"] == [HEAD]
    assert recorded["config_edits"]["tie_word_embeddings"] == {"from": True, "to": False}


@pytest.mark.parametrize(("kind", "other"), [("embedding", HEAD), ("head", EMBEDDING)])
def test_a_tensor_that_changes_with_an_adapted_one_is_told(tmp_path: Path, kind: str, other: str):
    write_world(tmp_path / "ckpt", tied(kind))
    report = nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", lora="fold", lora_alpha=5)
    assert f"{other}, tied to what is adapted, changed with it, as in peft's merge" in str(report.plan)
    assert receipt_of(tmp_path / "out")["lora"]["also_changed"] == [other]


@_NEEDS_ENSURED
@pytest.mark.parametrize("source", ["adapter", "ckpt"])
def test_an_adapter_that_peft_adds_twice_is_refused_and_split(tmp_path: Path, source: str):
    made = adapted("qwen2_tied", **copy.deepcopy(DOUBLED))
    base = save_tiny_model("qwen2_tied", tmp_path / "base")
    write_directory(tmp_path / "adapter", made)
    write_world(tmp_path / "ckpt", made)
    save_adapter_config(made, tmp_path / "ckpt")
    options = {"base_model": base} if source == "adapter" else {}
    message = refusal(nbmerge.PlanError, nbmerge.merge, tmp_path / source, tmp_path / "x", lora="fold", **options)
    assert_says(
        message, f"{EMBEDDING} is adapted, and tied to {HEAD} with ensure_weight_tying", "twice", "--lora split"
    )
    nbmerge.merge(tmp_path / source, tmp_path / "out", lora="split", **options)
    loaded = loaded_by_peft("qwen2_tied", tmp_path / "out", tmp_path / "out" / "lora_adapter")
    trained = loaded_by_peft("qwen2_tied", base, tmp_path / "adapter")
    assert_same(loaded.folded(), trained.folded())


def test_ties_that_were_asked_for_are_not_undone(tmp_path: Path):
    write_world(tmp_path / "ckpt", tied("head_saved"))
    message = refusal(
        nbmerge.PlanError, nbmerge.merge, tmp_path / "ckpt", tmp_path / "x", lora="fold", lora_alpha=5,
        tie_word_embedding=True,
    )  # fmt: skip
    assert_says(message, f"{HEAD} was trained whole, and is tied to {EMBEDDING}", "leave tie_word_embedding out")


def test_originals_that_drifted_apart_are_refused(tmp_path: Path):
    made = tied("head")
    state = made.state()
    state["base_model.model.lm_head.base_layer.weight"] += 1
    write_world(tmp_path / "ckpt", made, state)
    message = refusal(nbmerge.PlanError, nbmerge.merge, tmp_path / "ckpt", tmp_path / "x", lora="fold", lora_alpha=5)
    assert_says(message, f"{HEAD} is tied to {EMBEDDING}, and holds other values")


@pytest.mark.parametrize("kind", ["embedding_saved", "head_saved"])
def test_a_vision_model_whose_language_part_has_ties_of_its_own(tmp_path: Path, kind: str):
    base = save_tiny_model("qwen3_vl", tmp_path / "base", "bfloat16")
    adapter = write_directory(tmp_path / "adapter", tied(kind, family="qwen3_vl"))
    if not HAS_CONVERSIONS:  # transformers 4 ties them whatever the config says
        message = refusal(nbmerge.PlanError, nbmerge.merge, adapter, tmp_path / "x", lora="fold", base_model=base)
        assert_says(message, "the model's config cannot untie the two", "--lora split")
        return
    nbmerge.merge(adapter, tmp_path / "out", lora="fold", base_model=base)
    want = loaded_by_peft("qwen3_vl", base, adapter).folded()
    assert_same(saved_bits(tmp_path / "out"), want)
    model = type(tiny_model("qwen3_vl")).from_pretrained(tmp_path / "out", dtype="auto")
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert not is_tied(tmp_path / "out") and not torch.equal(head, embedding)
    assert bits(head) == want[HEAD]


def test_the_mean_of_what_came_apart(tmp_path: Path):
    base = save_tiny_model("qwen2_tied", tmp_path / "base", "bfloat16")
    adapter = write_directory(tmp_path / "adapter", tied("head_saved"))
    nbmerge.average([adapter, adapter], tmp_path / "mean", lora="fold", base_model=base)
    assert_is_peft_s(tmp_path / "mean", loaded_by_peft("qwen2_tied", base, adapter).folded(), "head_saved")
    assert nbmerge.validate(tmp_path / "mean", checkpoint=[adapter, adapter]).ok
