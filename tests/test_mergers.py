"""The merger objects: verl's names and signatures over the same engine."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

import nbmerge
from nbmerge import (
    ConfigError,
    FSDPModelMerger,
    HubError,
    ModelMergerConfig,
    OptionError,
    PlanError,
    VerificationError,
)
from nbmerge.display.model import Fact
from tests.support.adapters import adapted
from tests.support.messages import assert_says, refusal
from tests.support.models import memory_state, save_tiny_model, write_config, write_model_world
from tests.support.results import assert_same, bits_of_all, saved_bits


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return write_model_world(tmp_path / "actor", "qwen2_tied")


def merger(ckpt: Path, out: Path | None, **more: object) -> FSDPModelMerger:
    return FSDPModelMerger(
        ModelMergerConfig(backend="fsdp", local_dir=str(ckpt), target_dir=None if out is None else str(out), **more)
    )


def assert_is_the_merge(directory: Path, tiny_model_dir) -> None:
    assert_same(saved_bits(directory), saved_bits(tiny_model_dir("qwen2_tied")))


def test_merge_and_save_writes_the_directory(ckpt: Path, tmp_path: Path, tiny_model_dir):
    made = merger(ckpt, tmp_path / "out")
    report = made.merge_and_save()
    made.cleanup()
    assert report.verification is not None
    assert_is_the_merge(tmp_path / "out", tiny_model_dir)


def test_the_methods_have_verls_names():
    names = {"get_transformers_auto_model_class", "merge_and_save", "save_lora_adapter", "save_hf_model_and_tokenizer",
             "upload_to_huggingface", "cleanup"}  # fmt: skip
    assert names <= {name for name, _ in inspect.getmembers(nbmerge.BaseModelMerger, inspect.isfunction)}


def test_the_base_class_merges_whatever_is_recognised(ckpt: Path, tmp_path: Path, tiny_model_dir):
    config = ModelMergerConfig(local_dir=str(ckpt), target_dir=str(tmp_path / "out"))
    assert nbmerge.BaseModelMerger(config).merge_and_save().plan.checkpoint.backend == "fsdp"
    assert_is_the_merge(tmp_path / "out", tiny_model_dir)


def test_a_merger_of_another_back_end_refuses(ckpt: Path, tmp_path: Path):
    config = ModelMergerConfig(local_dir=str(ckpt), target_dir=str(tmp_path / "out"), backend="fsdp")
    message = refusal(OptionError, nbmerge.MegatronModelMerger(config).merge_and_save)
    assert "backend='fsdp' for MegatronModelMerger" in message


def test_further_options_are_those_of_merge(ckpt: Path, tmp_path: Path):
    merger(ckpt, tmp_path / "out", options={"dtype": "bfloat16", "max_shard_size": "4KB"}).merge_and_save()
    got = saved_bits(tmp_path / "out")
    assert {value[0] for value in got.values()} == {"bfloat16"}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_an_existing_target_is_replaced_where_the_options_say_so(ckpt: Path, tmp_path: Path, tiny_model_dir):
    merger(ckpt, tmp_path / "out").merge_and_save()
    refusal(nbmerge.TargetError, merger(ckpt, tmp_path / "out").merge_and_save)
    merger(ckpt, tmp_path / "out", options={"overwrite": True}).merge_and_save()
    assert_is_the_merge(tmp_path / "out", tiny_model_dir)


class TestSavingAStateDict:
    def test_of_torch_tensors(self, ckpt: Path, tmp_path: Path, tiny_model_dir):
        state = memory_state("qwen2_tied")
        state["model.norm.weight"] = torch.nn.Parameter(state["model.norm.weight"])
        state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].T.contiguous().T  # strided
        merger(ckpt, tmp_path / "out").save_hf_model_and_tokenizer(state)
        assert_is_the_merge(tmp_path / "out", tiny_model_dir)
        assert (tmp_path / "out" / "tokenizer_config.json").is_file()

    def test_of_lazy_tensors_and_torch_tensors(self, ckpt: Path, tmp_path: Path):
        lazy = dict(nbmerge.open_checkpoint(ckpt).tensors)
        changed = torch.randn(16).bfloat16()
        merger(ckpt, tmp_path / "out").save_hf_model_and_tokenizer({**lazy, "model.norm.weight": changed})
        want = memory_state("qwen2_tied")
        del want["lm_head.weight"]
        assert_same(saved_bits(tmp_path / "out"), bits_of_all({**want, "model.norm.weight": changed}))

    def test_is_incomplete_without_all_of_it(self, ckpt: Path, tmp_path: Path):
        made = merger(ckpt, tmp_path / "out")
        message = refusal(nbmerge.PlanError, made.save_hf_model_and_tokenizer, {"model.norm.weight": torch.ones(16)})
        assert_says(message, "no tensor of the checkpoint fills model.embed_tokens.weight")
        assert not (tmp_path / "out").exists()

    def test_of_something_else(self, ckpt: Path, tmp_path: Path):
        made = merger(ckpt, tmp_path / "out")
        message = refusal(OptionError, made.save_hf_model_and_tokenizer, {"model.norm.weight": [1.0]})
        assert_says(message, "model.norm.weight is a list", "torch tensors")

    def test_does_not_touch_the_tensors(self, ckpt: Path, tmp_path: Path):
        state = memory_state("qwen2_tied")
        merger(ckpt, tmp_path / "out", options={"dtype": "bfloat16"}).save_hf_model_and_tokenizer(state)
        assert bits_of_all(state) == bits_of_all(memory_state("qwen2_tied"))


class TestTheOperationTest:
    def test_says_nothing_of_an_equal_directory(self, ckpt: Path, tmp_path: Path):
        save_tiny_model("qwen2_tied", tmp_path / "reference")
        made = merger(ckpt, None, operation="test", test_hf_dir=str(tmp_path / "reference"))
        assert made.merge_and_save().target is None

    def test_raises_with_all_differences(self, ckpt: Path, tmp_path: Path):
        save_tiny_model("qwen2", tmp_path / "reference")
        made = merger(ckpt, None, operation="test", test_hf_dir=str(tmp_path / "reference"))
        message = refusal(VerificationError, made.merge_and_save)
        assert_says(message, f"27 differences from {tmp_path / 'reference'}", "model.embed_tokens.weight is not close")

    def test_needs_something_to_compare_with(self, ckpt: Path):
        assert_says(refusal(OptionError, ModelMergerConfig, operation="test", local_dir=str(ckpt)), "test_hf_dir")


@pytest.mark.parametrize(
    ("family", "auto"),
    [
        ("qwen2", "AutoModelForCausalLM"),
        ("qwen2_value", "AutoModelForTokenClassification"),
        ("qwen3_vl", "AutoModelForImageTextToText"),
    ],
)
def test_the_auto_class_is_the_one_that_loads_the_result(tmp_path: Path, family: str, auto: str):
    import transformers

    ckpt = write_model_world(tmp_path / "ckpt", family)
    found = merger(ckpt, None).get_transformers_auto_model_class()
    assert found is getattr(transformers, auto)
    merger(ckpt, tmp_path / "out").merge_and_save()
    assert type(found.from_pretrained(tmp_path / "out")).__name__.startswith("Qwen")


def test_an_architecture_of_no_auto_class_is_told(ckpt: Path):
    write_config(ckpt / "huggingface", "qwen2_tied", architectures=["Qwen2Model"])
    message = refusal(ConfigError, merger(ckpt, None).get_transformers_auto_model_class)
    assert_says(message, "no auto class is known for the architecture 'Qwen2Model'", "transformers.Qwen2Model")


def test_an_upload_that_cannot_work_is_told_before_anything_is_written(ckpt: Path, tmp_path: Path):
    made = merger(ckpt, tmp_path / "out", hf_upload_path="me/model")
    assert made.config.hf_upload
    assert_says(refusal(HubError, made.merge_and_save), "the Hub is switched off", "fix:")  # as in all tests
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_saved_from_tensors_in_memory(ckpt: Path, tmp_path: Path):
    made = adapted("qwen2_tied")
    path = merger(ckpt, tmp_path / "out", options={"lora_alpha": 5}).save_lora_adapter(made.state())
    assert path == tmp_path / "out" / "lora_adapter"
    assert_same(saved_bits(path), made.adapter())
    assert merger(ckpt, tmp_path / "none").save_lora_adapter(memory_state("qwen2_tied")) is None
    assert_says(refusal(PlanError, merger(ckpt, tmp_path / "none").save_lora_adapter, made.state()), "--lora_alpha N")
    assert not (tmp_path / "none").exists()


def test_a_config_without_a_checkpoint_or_of_another_operation_is_told():
    assert_says(refusal(OptionError, ModelMergerConfig), "there is no checkpoint", "local_dir=")
    assert_says(refusal(OptionError, ModelMergerConfig, operation="fold", local_dir="x"), "operation='fold'")


def test_a_merger_shows_its_configuration_and_how_far_it_has_come(ckpt: Path, tmp_path: Path):
    made = merger(ckpt, tmp_path / "out", options={"dtype": "bfloat16"})
    assert made.view().sentence.endswith("nothing has been read yet")
    assert Fact("dtype", "bfloat16", code=True) in made.view().sections[0].facts
    made.open()
    assert made.view().sentence.endswith("opened")
    assert [section.title for section in made.view().sections] == ["Configuration", "Shard layout", "Shard map"]
    made.plan()
    assert made.view().sentence.endswith("planned") and "will write" in repr(made)
    made.merge_and_save()
    assert made.view().sentence.endswith("done")
    assert "nbmerge.validate(merger.report)" in str(made._repr_html_())
