"""Names, shapes, ties and dtypes against the class, in real models that are damaged one way at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import nbmerge
from nbmerge.validation.element_types import DtypesCheck
from nbmerge.validation.findings import WARNING
from nbmerge.validation.structure import StructureCheck, TiedCheck
from nbmerge.validation.subject import Subject
from tests.support.models import HAS_CONVERSIONS, write_model_world
from tests.validation.directories import CLEAN, clean, edit_json, edit_tensors, only, run, sentences

ALL = (StructureCheck, TiedCheck, DtypesCheck)
NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A tiny Llama."""
    return clean(tmp_path / "whole", "llama")


def rename(tensors: dict[str, Any], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", CLEAN)
def test_what_save_pretrained_writes_has_no_findings(family: str, dtype: str, tmp_path: Path):
    directory = clean(tmp_path / "model", family, dtype)
    for check in ALL:
        assert sentences(run(check(), directory)) == []


@pytest.mark.parametrize("dialect", ["hub", "transformers"])
@pytest.mark.parametrize("family", ["qwen2_tied", "qwen3_moe", "deepseek_v3", "qwen3_vl"])
def test_a_merge_has_no_findings_in_either_dialect(family: str, dialect: str, tmp_path: Path):
    write_model_world(tmp_path / "actor", family, dtype="bfloat16")
    nbmerge.merge(tmp_path / "actor", tmp_path / "out", dialect=dialect, progress=False)
    outcomes = [run(check(), tmp_path / "out") for check in ALL]
    assert [sentences(outcome) for outcome in outcomes] == [[], [], []]
    in_memory = HAS_CONVERSIONS and dialect == "transformers" and family in ("qwen3_moe", "deepseek_v3")
    assert ("has in memory" in outcomes[0].said) == in_memory


FURTHER = "model.layers.2."  # the layer after the last one of a tiny model


@pytest.fixture
def further(tmp_path: Path) -> Path:
    """A DeepSeek-V3 whose config states no further layers, and that holds one with two tensors."""
    directory = clean(tmp_path / "further", "deepseek_v3")
    edit_json(directory / "config.json", num_nextn_predict_layers=0, num_mtp_layers=...)
    edit_tensors(directory, lambda t: t.update({f"{FURTHER}{n}.weight": torch.ones(3) for n in ("enorm", "mlp.x")}))
    return directory


def test_a_further_layer_is_known_where_the_config_says_that_there_is_one(further: Path):
    assert len(run(StructureCheck(), further).findings) == 2
    edit_json(further / "config.json", num_nextn_predict_layers=1)
    outcome = run(StructureCheck(), further)
    assert sentences(outcome) == []
    assert "2 that it knows and does not load" in outcome.said
    edit_tensors(further, lambda tensors: rename(tensors, f"{FURTHER}mlp.x.weight", "model.layers.3.mlp.x.weight"))
    assert only(run(StructureCheck(), further), "is no tensor").subject == "model.layers.3.mlp.x.weight"


def test_a_further_layer_is_known_where_the_receipt_says_that_it_was_written(further: Path):
    names = [f"{FURTHER}enorm.weight", f"{FURTHER}mlp.x.weight"]
    (further / "nbmerge_receipt.json").write_text(json.dumps({"unloaded": names}))
    assert sentences(run(StructureCheck(), further)) == []


def test_a_layer_of_the_decoder_that_the_config_does_not_count_is_no_further_layer(tmp_path: Path):
    directory = clean(tmp_path / "model", "deepseek_v3")
    edit_json(directory / "config.json", num_hidden_layers=1, num_nextn_predict_layers=1, num_mtp_layers=...)
    assert "is no tensor of DeepseekV3ForCausalLM" in sentences(run(StructureCheck(), directory))


@pytest.mark.parametrize(
    "name", ["model.mtp.norm.weight", "model.layers.0.extra.weight", "model.layers.2.extra.weight"]
)
def test_a_receipt_hides_no_other_tensor(whole: Path, name: str):
    edit_tensors(whole, lambda tensors: tensors.update({name: torch.ones(3)}))
    (whole / "nbmerge_receipt.json").write_text(json.dumps({"unloaded": [name]}))
    assert only(run(StructureCheck(), whole), "is no tensor of LlamaForCausalLM").subject == name


def test_a_tensor_that_is_missing_is_found(whole: Path):
    edit_tensors(whole, lambda tensors: tensors.pop(QUERY))
    finding = only(run(StructureCheck(), whole), "is missing")
    assert (finding.subject, finding.detail) == (QUERY, "shape [16, 16]")
    assert "LlamaForCausalLM has it" in finding.why


def test_findings_of_one_kind_are_grouped(whole: Path):
    from nbmerge.validation.findings import CheckResult

    edit_tensors(whole, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".mlp." in name])
    (group,) = CheckResult("structure", "", run(StructureCheck(), whole)).groups
    assert len(group.members) == 6


@pytest.mark.parametrize(
    ("new", "words"),
    [
        ("model.layers.0.self_attn.q_proj.base_layer.weight", "folded"),
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "folded"),
        ("model._orig_mod.layers.0.self_attn.q_proj.weight", "training wrapper"),
        ("language_model.layers.0.self_attn.q_proj.weight", "another prefix"),
        ("model.layers.0.self_attn.magic", "neither loads it nor knows it"),
    ],
)
def test_a_name_that_the_class_has_not_is_found_with_its_cause(whole: Path, new: str, words: str):
    edit_tensors(whole, lambda tensors: rename(tensors, QUERY, new))
    outcome = run(StructureCheck(), whole)
    assert sentences(outcome) == ["is missing", "is no tensor of LlamaForCausalLM"]
    assert outcome.findings[1].subject == new
    assert words in outcome.findings[1].why


def test_buffers_that_are_computed_anew_are_fine(whole: Path):
    edit_tensors(whole, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    assert sentences(run(StructureCheck(), whole)) == []


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((128,), "8 times as many rows"),
        ((18,), "padding"),
        ((15,), "too few rows"),
        ((16, 1), "another dimension"),
        ((), "another dimension"),
    ],
)
def test_a_shape_that_the_class_has_not_is_found_with_its_cause(whole: Path, shape: tuple[int, ...], words: str):
    edit_tensors(whole, lambda tensors: tensors.update({NORM: torch.ones(shape)}))
    finding = only(run(StructureCheck(), whole), "has another shape")
    assert finding.detail == f"{list(shape)} here, [16] in LlamaForCausalLM"
    assert words in finding.why


def test_the_config_decides_the_class(tmp_path: Path):
    directory = clean(tmp_path / "model", "qwen2_value")
    edit_json(directory / "config.json", architectures=["Qwen2ForCausalLM"], tie_word_embeddings=True)
    outcome = run(StructureCheck(), directory)
    assert [finding.subject for finding in outcome.findings] == ["score.bias", "score.weight"]


@pytest.mark.parametrize("change", [{"model_type": "nothing"}, {"architectures": ["Nothing"]}, {"hidden_size": "a"}])
def test_a_config_that_makes_no_model_is_one_finding(whole: Path, change: dict[str, Any]):
    edit_json(whole / "config.json", **change)
    assert only(run(StructureCheck(), whole), "makes no model").subject == "config.json"
    assert not run(TiedCheck(), whole).ran
    assert not run(DtypesCheck(), whole).ran


@pytest.mark.parametrize("given", [{"quant_method": "fp8"}, {"load_in_4bit": True}])
def test_quantised_weights_are_not_judged(whole: Path, given: dict[str, Any]):
    edit_json(whole / "config.json", quantization_config=given)
    assert [run(check(), whole).ran for check in ALL] == [False, False, False]


@pytest.mark.parametrize("given", [{}, {"bits": 4}, {"quant_method": None}])
def test_a_quantization_config_without_a_method_switches_nothing_off(whole: Path, given: dict[str, Any]):
    edit_json(whole / "config.json", quantization_config=given)
    assert [run(check(), whole).ran for check in ALL] == [True, True, True]
    assert only(run(StructureCheck(), whole), "names no quant_method", WARNING).subject == "config.json"


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_that_are_not_installed_here_change_no_tensor(tmp_path: Path, key: str):
    directory = clean(tmp_path / "model", "qwen3_moe")
    edit_json(directory / "config.json", **{key: "flash_attention_2"})
    outcome = run(StructureCheck(), directory)
    assert (sentences(outcome), outcome.ran) == ([], True)


def test_a_tie_of_which_a_side_cannot_be_read_says_so_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from nbmerge.engine import comparison
    from nbmerge.errors import CorruptFileError

    def fail(*_: Any) -> None:
        raise CorruptFileError("the file was cut", where="here", fix="again")

    directory = clean(tmp_path / "model", "qwen2_tied")
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    monkeypatch.setattr(comparison, "first_difference", fail)
    assert only(run(TiedCheck(), directory), "is tied to").detail.endswith("they cannot be compared: the file was cut")


def test_a_tied_tensor_that_is_written_twice_is_a_warning_while_it_is_equal(tmp_path: Path):
    directory = clean(tmp_path / "model", "qwen2_tied")
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert sentences(run(StructureCheck(), directory)) == []
    assert only(run(TiedCheck(), directory), "is written though it is tied", WARNING).subject == "lm_head.weight"


def test_tied_tensors_with_other_values_are_found_at_the_first_that_differs(tmp_path: Path):
    directory = clean(tmp_path / "model", "qwen2_tied")
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    edit_tensors(directory, lambda tensors: tensors["lm_head.weight"][3, 5:].add_(1))
    finding = only(run(TiedCheck(), directory), "is tied to a tensor with other values")
    assert "[3, 5]" in finding.detail
    edit_tensors(directory, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(37, 16).bfloat16()}))
    assert "bfloat16 [37, 16] and float32" in only(run(TiedCheck(), directory), "is tied to").detail


def test_a_shared_tensor_under_its_other_name_alone_is_loaded(tmp_path: Path):
    directory = clean(tmp_path / "model", "qwen2_tied")
    edit_tensors(directory, lambda tensors: rename(tensors, "model.embed_tokens.weight", "lm_head.weight"))
    for check in ALL:
        assert sentences(run(check(), directory)) == []


def test_a_dtype_other_than_the_configs_is_a_warning(whole: Path):
    edit_tensors(whole, lambda tensors: tensors.update({NORM: tensors[NORM].bfloat16()}))
    finding = only(run(DtypesCheck(), whole), "is bfloat16, and config.json says float32", WARNING)
    assert finding.subject == NORM


def test_a_tensor_that_the_class_keeps_in_fp32_may_stay_there(tmp_path: Path):
    directory = clean(tmp_path / "model", "deepseek_v3", "bfloat16")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[name].float()}))
    assert sentences(run(DtypesCheck(), directory)) == []


def test_integers_where_the_class_has_floats_are_found(whole: Path):
    edit_tensors(whole, lambda tensors: tensors.update({QUERY: tensors[QUERY].to(torch.int8)}))
    assert only(run(DtypesCheck(), whole), "holds integers where the class has floats").subject == QUERY


def test_a_config_without_a_dtype_is_no_finding(whole: Path):
    edit_json(whole / "config.json", dtype=..., torch_dtype=...)
    assert run(DtypesCheck(), whole).said == "21 float32; config.json states no dtype"
    edit_json(whole / "config.json", dtype="nonsense")
    assert sentences(run(DtypesCheck(), whole)) == []


@pytest.mark.parametrize("family", ["llama", "qwen2_tied"])
def test_a_file_that_is_damaged_is_one_finding_and_checks_that_saw_nothing_are_not_run(family: str, tmp_path: Path):
    directory = clean(tmp_path / "model", family)
    (directory / "model.safetensors").write_bytes(b"")
    finding = only(run(StructureCheck(), directory), "cannot be read, and what it holds")
    assert finding.subject == "model.safetensors"
    assert "`headers`" in finding.why
    assert "hf_model_config_path" not in finding.fix
    assert not run(DtypesCheck(), directory).ran
    assert run(TiedCheck(), directory).ran == (family == "llama")  # which ties nothing


@pytest.mark.parametrize("gone", [False, True], ids=["damaged", "gone"])
def test_of_shards_what_is_in_others_is_compared(gone: bool, tmp_path: Path):
    directory = clean(tmp_path / "model", "llama", shards=True)
    index = Subject.of(directory).index
    path = directory / index[NORM]
    path.unlink() if gone else path.write_bytes(b"")
    edit_tensors(directory, lambda tensors: tensors.pop(QUERY), index[QUERY])
    assert index[NORM] != index[QUERY]
    outcome = run(StructureCheck(), directory)
    assert [(finding.what[:14], finding.subject) for finding in outcome.findings] == [
        ("cannot be read", path.name),
        ("is missing", QUERY),
    ]
    held = sum(file == path.name for file in index.values())
    assert outcome.findings[0].detail.startswith(f"{held} of the 21 tensors of LlamaForCausalLM were not found: ")


def test_a_directory_without_weights_is_one_finding(whole: Path):
    (whole / "model.safetensors").unlink()
    only(run(StructureCheck(), whole), "holds no safetensors files")


def test_a_config_that_is_missing_is_said_in_its_own_words(whole: Path):
    (whole / "config.json").unlink()
    assert only(run(StructureCheck(), whole), "makes no model").detail == "there is no config.json"
    (whole / "config.json").mkdir()
    assert only(run(StructureCheck(), whole), "makes no model").detail == "config.json: Is a directory"
    (whole / "config.json").rmdir()
    (whole / "config.json").write_text("[" * 100_000)
    assert "is no JSON object" in only(run(StructureCheck(), whole), "makes no model").detail
