"""Loading and computing with transformers, of real models; and what is said where that is not possible."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import nbmerge
from nbmerge.validation import loading, room, running
from nbmerge.validation.findings import WARNING
from nbmerge.validation.running import RunningCheck
from tests.support.models import HAS_CONVERSIONS, write_model_world
from tests.validation.directories import CLEAN, clean, edit_index, edit_json, edit_tensors, only, run, sentences

QUERY = "model.layers.0.self_attn.q_proj.weight"
HEAD = "lm_head.weight"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A tiny Llama."""
    return clean(tmp_path / "whole", "llama")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", CLEAN)
def test_a_whole_model_loads_and_computes(family: str, dtype: str, tmp_path: Path):
    directory = clean(tmp_path / "model", family, dtype)
    outcome = run(RunningCheck(directory), directory)
    assert sentences(outcome) == []
    assert f" in {dtype}; logits of " in outcome.said
    assert "are finite" in outcome.said
    assert ("greedy: 'The capital of " in outcome.said) == (family != "qwen2_value")
    assert outcome.said.endswith("the same logits as the reference, bit for bit")


@pytest.mark.parametrize("dialect", ["hub", "transformers"])
def test_a_merge_gives_the_logits_of_what_was_sharded(dialect: str, tmp_path: Path):
    reference = clean(tmp_path / "reference", "qwen3_moe", "bfloat16")
    write_model_world(tmp_path / "actor", "qwen3_moe", dtype="bfloat16")
    nbmerge.merge(tmp_path / "actor", tmp_path / "out", dialect=dialect, progress=False)
    outcome = run(RunningCheck(reference), tmp_path / "out")
    assert sentences(outcome) == []
    assert "greedy tokens: " in outcome.said
    assert "bit for bit" in outcome.said


def test_what_transformers_says_of_its_loading_is_found(whole: Path):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.extra"] = tensors.pop(QUERY)
        tensors["model.norm.weight"] = torch.ones(5)

    edit_tensors(whole, change)
    outcome = run(RunningCheck(), whole)
    if not HAS_CONVERSIONS:  # transformers 4 raises for a tensor of another shape
        only(outcome, "cannot be loaded by transformers")
        return
    assert [(finding.what, finding.subject) for finding in outcome.findings] == [
        ("is not filled by the files", QUERY),
        ("is not used by the model", "model.extra"),
        ("does not fit into the model", "model.norm.weight"),
    ]
    assert outcome.findings[2].detail == "[5] stored, [16] in the model"
    assert "not computed" in outcome.said


def test_what_the_merge_knew_not_to_be_loaded_is_fine_fused_or_not(tmp_path: Path):
    directory = clean(tmp_path / "model", "deepseek_v3")

    def add_layer(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.1.")]:
            tensors[name.replace("layers.1.", "layers.2.")] = tensors[name].clone()

        tensors["model.layers.2.eh_proj.weight"] = torch.ones(16, 32)

    edit_json(directory / "config.json", num_nextn_predict_layers=0, num_mtp_layers=...)
    edit_tensors(directory, add_layer)
    assert sentences(run(RunningCheck(), directory)) == ["is not used by the model"]
    names = loading.Subject.of(directory).entries
    added = [name for name in names if name.startswith("model.layers.2.")]
    (directory / "nbmerge_receipt.json").write_text(json.dumps({"unloaded": added}))
    assert sentences(run(RunningCheck(), directory)) == []
    (directory / "nbmerge_receipt.json").unlink()
    edit_json(directory / "config.json", num_nextn_predict_layers=1)
    assert sentences(run(RunningCheck(), directory)) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_found(whole: Path, value: float):
    edit_tensors(whole, lambda tensors: tensors[HEAD][2, 2].fill_(value))
    assert "of 851 for 23 tokens" in only(run(RunningCheck(), whole), "computes logits that are not finite").detail


def test_other_logits_than_the_references_are_found_unless_they_are_close(whole: Path, tmp_path: Path):
    reference = clean(tmp_path / "reference", "llama")
    edit_tensors(whole, lambda tensors: tensors[HEAD][2].mul_(1.001))
    finding = only(run(RunningCheck(reference), whole), "computes other logits than the reference")
    assert finding.detail.startswith("23 of 851 differ, by at most ")
    outcome = run(RunningCheck(reference, atol=1e-2, rtol=0.0), whole)
    assert sentences(outcome) == []
    assert "within the tolerance" in outcome.said


def test_a_reference_of_another_vocabulary_or_none_is_found(whole: Path, tmp_path: Path):
    reference = clean(tmp_path / "reference", "llama")
    edit_json(reference / "config.json", vocab_size=50)
    edit_tensors(
        reference, lambda t: t.update({name: torch.ones(50, 16) for name in (HEAD, "model.embed_tokens.weight")})
    )
    only(run(RunningCheck(reference), whole), "has logits of another shape than the reference")
    (reference / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "no such thing"}')
    assert only(run(RunningCheck(reference), whole), "cannot be loaded").subject == "the reference"
    shutil.rmtree(reference)
    assert "the reference was not run" in run(RunningCheck(reference), whole).said


def test_a_reference_that_is_not_whole_is_found(whole: Path, tmp_path: Path):
    reference = clean(tmp_path / "reference", "llama")
    edit_tensors(reference, lambda tensors: tensors.pop(QUERY))
    assert only(run(RunningCheck(reference), whole), "does not fill its own model").detail == QUERY


def test_a_model_that_does_not_load_is_found(whole: Path):
    edit_json(whole / "config.json", hidden_size="wide")
    only(run(RunningCheck(), whole), "cannot be loaded by transformers")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 cannot be multiplied\nand more"),
        TypeError("'NoneType' object cannot be interpreted as an integer"),
    ],
)
def test_a_model_whose_pass_fails_is_found(whole: Path, monkeypatch: pytest.MonkeyPatch, error: Exception):
    from transformers import LlamaForCausalLM

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "forward", fail)
    detail = only(run(RunningCheck(), whole), "fails in a forward pass").detail
    assert detail == f"{type(error).__name__}: {error}".splitlines()[0]


def test_a_config_with_which_no_pass_is_possible_is_found(tmp_path: Path):
    directory = clean(tmp_path / "model", "qwen2_tied")
    windows = {"layer_types": ["sliding_attention"] * 2, "sliding_window": None, "use_sliding_window": True}
    edit_json(directory / "config.json", **windows)
    detail = only(run(RunningCheck(), directory), "fails in a forward pass").detail
    assert "TypeError: " in detail and "'NoneType'" in detail


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TypeError("f.forward() missing 1 required positional argument: 'pixels'"), "no pass with tokens alone"),
        (RuntimeError('"addmm" not implemented for Float8_e4m3fn'), "no pass on this machine"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "no pass on this machine"),
    ],
)
def test_a_pass_that_is_not_possible_here_is_said_and_no_finding(
    whole: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
):
    from transformers import LlamaForCausalLM

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "forward", fail)
    outcome = run(RunningCheck(whole), whole)
    assert sentences(outcome) == []
    assert words in outcome.said
    assert not outcome.ran


def test_generation_is_greedy_whatever_search_the_generation_config_asks_for(whole: Path):
    said = run(RunningCheck(), whole).said
    edit_json(
        whole / "generation_config.json",
        num_beams=50, num_return_sequences=3, stop_strings=["a"], do_sample=True, temperature=9.0,
        repetition_penalty=5.0, max_length=3, prompt_lookup_num_tokens=2,
    )  # fmt: skip
    outcome = run(RunningCheck(), whole)
    assert sentences(outcome) == []
    assert outcome.said == said
    assert "greedy: " in said


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_that_is_not_installed_here_is_replaced(whole: Path, tmp_path: Path, key: str):
    reference = clean(tmp_path / "reference", "llama")
    edit_json(whole / "config.json", **{key: "flash_attention_2"})
    outcome = run(RunningCheck(reference), whole)
    assert sentences(outcome) == []
    assert "bit for bit" in outcome.said


def test_attention_of_a_part_of_the_model_is_replaced(tmp_path: Path):
    directory = clean(tmp_path / "model", "qwen3_vl")
    edit_json(directory / "config.json", attn_implementation={"text_config": "flash_attention_2"})
    outcome = run(RunningCheck(), directory)
    assert sentences(outcome) == []
    assert "are finite" in outcome.said


def test_a_model_that_cannot_generate_is_a_warning(whole: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import LlamaForCausalLM

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("num_return_sequences")

    monkeypatch.setattr(LlamaForCausalLM, "generate", fail)
    assert "num_return_sequences" in only(run(RunningCheck(), whole), "cannot generate", WARNING).detail


def test_a_model_of_images_is_loaded_and_nothing_is_computed(tmp_path: Path):
    import transformers

    config = transformers.ResNetConfig(embedding_size=6, hidden_sizes=[10, 14], depths=[1, 1], layer_type="basic")
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    outcome = run(RunningCheck(), tmp_path)
    assert sentences(outcome) == []
    assert outcome.said == "ResNetForImageClassification in float32; it takes no tokens, and nothing was computed"
    assert not outcome.ran


def test_a_model_that_is_too_large_for_the_memory_is_not_loaded(whole: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "free_memory", lambda: 10**4)
    outcome = run(RunningCheck(), whole)
    assert (outcome.ran, outcome.said) == (False, "loading takes 0.0 GB, 0.0 GB are free")


def test_memory_is_reckoned_in_the_dtype_that_is_loaded(whole: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "free_memory", lambda: 40_000)  # 60 % of it is enough for 20,416 bytes of float32
    assert run(RunningCheck(), whole).ran
    edit_json(whole / "config.json", dtype="float64")
    assert not run(RunningCheck(), whole).ran


def test_memory_that_is_used_up_while_loading_is_no_finding(whole: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(running, "load_model", fail)
    assert not run(RunningCheck(), whole).ran


def test_weights_outside_the_directory_are_not_loaded(tmp_path: Path):
    directory = clean(tmp_path / "model", "llama", shards=True)
    edit_index(directory, lambda index: index["weight_map"].update({HEAD: "../elsewhere.safetensors"}))
    outcome = run(RunningCheck(), directory)
    assert (outcome.ran, outcome.said) == (False, "the index leads out of the directory")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_without_a_config_or_weights_nothing_is_run(whole: Path, name: str):
    (whole / name).unlink()
    assert not run(RunningCheck(), whole).ran


def test_pickled_weights_are_never_loaded(whole: Path):
    (whole / "model.safetensors").unlink()
    (whole / "pytorch_model.bin").write_bytes(b"never read")
    assert not run(RunningCheck(), whole).ran


def test_code_of_the_directory_is_not_run_without_trust(whole: Path):
    (whole / "own.py").write_text("raise RuntimeError('ran')")
    edit_json(
        whole / "config.json",
        architectures=["OwnForCausalLM"],
        auto_map={"AutoModelForCausalLM": "own.OwnForCausalLM"},
    )
    outcome = run(RunningCheck(), whole)
    assert not outcome.ran
    assert "trust_remote_code" in outcome.said
    assert "ran" in only(run(RunningCheck(), whole, trust_remote_code=True), "cannot be loaded").detail


def test_nothing_is_shown_and_nothing_is_left_changed(whole: Path, capfd: pytest.CaptureFixture[str]):
    from transformers.utils import logging

    edit_tensors(whole, lambda tensors: tensors.pop(QUERY))
    logging.set_verbosity_info()
    state = torch.random.get_rng_state()
    try:
        run(RunningCheck(), whole)
        assert capfd.readouterr() == ("", "")
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.is_grad_enabled()
    finally:
        logging.set_verbosity_warning()


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' own files")
def test_free_memory_is_the_least_of_machine_and_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    machine = room.free_memory()
    assert machine is not None
    assert machine > 2**20
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500\n")
    monkeypatch.setattr(room, "_GROUPS", ((tmp_path, "memory.max", "memory.current", "inactive_file"),))
    assert room.free_memory() == 1500
    (tmp_path / "memory.max").write_text("max\n")
    assert room.free_memory() != 1500
