"""The directory that peft writes of an adapter alone is folded as peft loads and merges it, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import nbmerge
from tests.support.adapters import Adapted, adapted, loaded_by_peft, save_adapter_config, write_directory, write_world
from tests.support.messages import assert_says, refusal
from tests.support.models import HAS_CONVERSIONS, save_tiny_model
from tests.support.results import assert_same, saved_bits
from tests.test_lora_merge import KINDS

EXPERTS = {"target_modules": ["q_proj"], "r": 2, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def both(path: Path, made: Adapted, dtype: str = "bfloat16") -> tuple[Path, Path]:
    """Its base model's directory and the adapter's."""
    base = save_tiny_model(made.family, path / "base", dtype)
    return base, write_directory(path / "adapter", made)


def folded(path: Path, base: Path, adapter: Path, **options: Any) -> Path:
    nbmerge.merge(adapter, path / "out", lora="fold", base_model=base, **options)
    return path / "out"


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fold_is_peft_s_own(tmp_path: Path, kind: str, adapter_dtype: str):
    """An adapter of 16 bits is widened when peft loads it; what was trained whole gets the base model's dtype."""
    base, adapter = both(tmp_path, adapted(dtype=adapter_dtype, **KINDS[kind]))
    assert_same(saved_bits(folded(tmp_path, base, adapter)), loaded_by_peft("qwen2", base, adapter).folded())


@pytest.mark.parametrize("kind", ["linear", "dora", "embedding", "modules_to_save"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_fold_into_other_dtypes_is_peft_s_own(tmp_path: Path, kind: str, dtype: str):
    base, adapter = both(tmp_path, adapted(dtype="bfloat16", **KINDS[kind]), dtype)
    assert_same(saved_bits(folded(tmp_path, base, adapter)), loaded_by_peft("qwen2", base, adapter).folded())


@pytest.mark.skipif(not HAS_CONVERSIONS, reason="experts are fused in memory from transformers 5 on")
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "qwen3_vl_moe"])
def test_adapters_of_fused_experts(tmp_path: Path, family: str):
    base, adapter = both(tmp_path, adapted(family, "bfloat16", **EXPERTS))
    assert_same(saved_bits(folded(tmp_path, base, adapter)), loaded_by_peft(family, base, adapter).folded())


def test_a_pickled_adapter(tmp_path: Path):
    made = adapted(dtype="bfloat16")
    base = save_tiny_model("qwen2", tmp_path / "base", "bfloat16")
    adapter = write_directory(tmp_path / "adapter", made, safe_serialization=False)
    assert (adapter / "adapter_model.bin").is_file()
    assert_same(saved_bits(folded(tmp_path, base, adapter)), loaded_by_peft("qwen2", base, adapter).folded())


def test_a_critic_s_head(tmp_path: Path):
    base, adapter = both(tmp_path, adapted("qwen2_value", "bfloat16", task_type="TOKEN_CLS"))
    assert_same(saved_bits(folded(tmp_path, base, adapter)), loaded_by_peft("qwen2_value", base, adapter).folded())


@pytest.mark.parametrize("kind", KINDS)
def test_split_and_adapter_write_what_peft_loads_to_the_same_model(tmp_path: Path, kind: str):
    base, adapter = both(tmp_path, adapted(dtype="bfloat16", **KINDS[kind]))
    want = loaded_by_peft("qwen2", base, adapter).folded()
    nbmerge.merge(adapter, tmp_path / "split", lora="split", base_model=base)
    nbmerge.merge(adapter, tmp_path / "alone", lora="adapter", base_model=base)
    assert_same(loaded_by_peft("qwen2", tmp_path / "split", tmp_path / "split" / "lora_adapter").folded(), want)
    assert_same(loaded_by_peft("qwen2", base, tmp_path / "alone" / "lora_adapter").folded(), want)
    assert_same(saved_bits(tmp_path / "alone" / "lora_adapter"), saved_bits(adapter))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_split_is_folded_to_what_is_folded_at_once(tmp_path: Path, kind: str):
    """Of adapters in float32, which peft trains by default."""
    write_world(tmp_path / "ckpt", made := adapted(**KINDS[kind]))
    save_adapter_config(made, tmp_path / "ckpt")
    nbmerge.merge(tmp_path / "ckpt", tmp_path / "split", lora="split")
    out = folded(tmp_path, tmp_path / "split", tmp_path / "split" / "lora_adapter")
    assert_same(saved_bits(out), made.folded())
    message = refusal(nbmerge.PlanError, nbmerge.merge, tmp_path / "split", tmp_path / "x", lora="fold")
    assert_says(message, f"{tmp_path / 'split' / 'lora_adapter'} --base_model {tmp_path / 'split'}")


def test_an_embedding_that_was_saved_with_the_adapter_replaces_the_base_model_s(tmp_path: Path):
    made = adapted(dtype="bfloat16")
    with torch.no_grad():
        made.model.get_input_embeddings().weight.add_(1)
    base = save_tiny_model("qwen2", tmp_path / "base", "bfloat16")
    adapter = write_directory(tmp_path / "adapter", made, save_embedding_layers=True)
    want = loaded_by_peft("qwen2", base, adapter).folded()
    assert want["model.embed_tokens.weight"] != saved_bits(base)["model.embed_tokens.weight"]
    assert_same(saved_bits(folded(tmp_path, base, adapter)), want)
    nbmerge.merge(adapter, tmp_path / "alone", lora="adapter", base_model=base)
    assert_same(saved_bits(tmp_path / "alone" / "lora_adapter"), saved_bits(adapter))
