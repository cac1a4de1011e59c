"""A Megatron checkpoint that does not fit is refused with what is wrong, told once, and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import nbmerge
from nbmerge import InconsistentCheckpointError, NotACheckpointError, PlanError
from nbmerge.cli import main
from tests.support.megatron_forms import hybrid, singleton, stacked
from tests.support.megatron_layers import Tensors
from tests.support.megatron_models import (
    megatron_state,
    merge_megatron,
    refused_megatron,
    without,
    write_megatron,
)
from tests.support.messages import assert_says, refusal
from tests.support.models import memory_state, published_state, save_tiny_model, tiny_config
from tests.support.results import assert_same, bits, bits_of_all, receipt_of, saved_bits

FC1 = "decoder.layers.0.mlp.linear_fc1.weight"


class TestTensorsThatNoRuleTakes:
    @pytest.mark.parametrize("form", ["layers", "stacked"])
    def test_are_told_with_the_nearest_rule(self, tmp_path: Path, form: str):
        state = megatron_state("llama")
        for layer in range(2):
            state[f"decoder.layers.{layer}.self_attention.linear_qk.weight"] = torch.zeros(3)
        message = refused_megatron(tmp_path, stacked(state) if form == "stacked" else state, "llama")
        source = "decoder.layers.0.self" if form == "layers" else "decoder.layers.self"
        assert_says(message, "1 problem", f"no rule takes {source}_attention.linear_qk.weight",
                    "nearest rule: decoder.layers.N.self_attention.linear_qkv.weight → self_attn.q_proj.weight",
                    "the table of llama has no row", "fix:")  # fmt: skip
        assert ("and 1 more like it" in message) == (form == "layers")

    def test_that_are_like_nothing_are_told_without_one(self, tmp_path: Path):
        message = refused_megatron(tmp_path, megatron_state("llama") | {"zzz": torch.zeros(1)}, "llama")
        assert_says(message, "no rule takes zzz")
        assert "nearest" not in message

    def test_of_experts_are_told_together(self, tmp_path: Path):
        message = refused_megatron(tmp_path, singleton(megatron_state("qwen3_moe")), "qwen3")
        assert_says(message, "no rule takes decoder.layers.0.mlp.experts.experts.0.linear_fc2.weight and 5 more",
                    "no rule takes decoder.layers.0.mlp.router.weight and 1 more")  # fmt: skip

    def test_that_the_class_does_not_have(self, tmp_path: Path):
        """There is a rule for the bias of a Llama's attention; this config's model has none."""
        message = refused_megatron(tmp_path, megatron_state("qwen2"), "llama")
        assert_says(message, "decoder.layers.0.self_attention.linear_qkv.bias becomes",
                    "model.layers.0.self_attn.q_proj.bias of shape [16]", "LlamaForCausalLM has no such tensor",
                    "fix:", "--hf_model_config_path")  # fmt: skip

    def test_under_two_names_for_one_parameter(self, tmp_path: Path):
        state = megatron_state("llama")
        norm = "decoder.layers.0.input_layernorm.weight"
        message = refused_megatron(tmp_path, state | {norm: torch.zeros(16)}, "llama")
        assert_says(message, "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", norm,
                    "both become model.layers.0.input_layernorm.weight", "fix:")  # fmt: skip

    @pytest.mark.parametrize("prefix", ["module.", "model.module.", "module.module."])
    def test_twice_with_and_without_a_wrappers_prefix(self, tmp_path: Path, prefix: str):
        state, norm = megatron_state("llama"), "decoder.final_layernorm.weight"
        message = refused_megatron(tmp_path, state | {prefix + norm: torch.zeros(16)}, "llama")
        assert_says(message, f"{norm} and {prefix}{norm} are both {norm}", "fix: save the state dict of the unwrapped")

    @pytest.mark.parametrize("prefix", ["module.", "model.module.", "module.module."])
    def test_wrappers_prefixes_are_taken_off(self, tmp_path: Path, prefix: str):
        merge_megatron(tmp_path, {prefix + name: t for name, t in megatron_state("llama").items()}, "llama")
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(published_state("llama")))

    def test_of_adapters_ask_what_is_to_be_done(self, tmp_path: Path):
        name = "decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight"
        message = refused_megatron(tmp_path, megatron_state("llama") | {name: torch.zeros(2, 2)}, "llama")
        assert_says(message, "1 problem", "LoRA tensors", name, "lora='fold'")


class TestTensorsThatNothingFills:
    def test_are_told_with_the_name_that_they_would_come_from(self, tmp_path: Path):
        message = refused_megatron(tmp_path, without(megatron_state("llama"), "mlp.linear_fc2"), "llama")
        assert_says(message, "1 problem", "fills model.layers.0.mlp.down_proj.weight and 1 more like it",
                    "the rule takes decoder.layers.N.mlp.linear_fc2.weight", "fix:", "--base_model DIR")  # fmt: skip

    def test_that_come_from_one_tensor_are_told_once(self, tmp_path: Path):
        message = refused_megatron(tmp_path, megatron_state("llama"), "qwen2")
        assert_says(message, "2 problems", "fills model.layers.0.self_attn.q_proj.bias and 5 more like it",
                    "decoder.layers.N.self_attention.linear_qkv.bias")  # fmt: skip
        first = message.splitlines()[1]
        assert_says(first, "config.json is of another family", "lacks biases of query, key and value", "those of Llama")

    @pytest.mark.parametrize(
        ("gone", "words"),
        [
            ("embedding.", ("fills model.embed_tokens.weight", "embedding.word_embeddings.weight")),
            ("final_layernorm.", ("fills model.norm.weight", "decoder.final_layernorm.weight")),
            ("output_layer.", ("fills lm_head.weight", "output_layer.weight", "--tie_word_embedding")),
        ],
    )
    def test_outside_the_layers(self, tmp_path: Path, gone: str, words: tuple[str, ...]):
        message = refused_megatron(tmp_path, without(megatron_state("llama"), gone), "llama")
        assert_says(message, "1 problem", *words, "fix:")

    def test_of_a_whole_module_are_told_together(self, tmp_path: Path):
        message = refused_megatron(tmp_path, without(megatron_state("llama"), "1.mlp.linear_fc"), "llama")
        assert_says(message, "nothing in the checkpoint fills model.layers.1.mlp.*: 3 tensors")

    def test_of_a_vision_tower_are_told_together(self, tmp_path: Path):
        message = refused_megatron(tmp_path, without(megatron_state("qwen3_vl"), "vision_model."), "qwen3_vl")
        assert_says(message, "1 problem", "nothing in the checkpoint fills model.visual.*: 39 tensors",
                    "vision_model.patch_embed.proj.weight", "--base_model DIR")  # fmt: skip

    def test_of_layers_that_are_gone_are_one_problem_with_their_numbers(self, tmp_path: Path):
        """A pipeline stage whose files were not copied."""
        message = refused_megatron(tmp_path, megatron_state("llama"), "llama", {"num_hidden_layers": 90})
        assert_says(message, "1 problem", "88 layers of the model are not in the checkpoint: 2-89",
                    "model.layers.2.* for one", "a pipeline stage is missing", "fix: copy the checkpoint")  # fmt: skip

    def test_of_layers_in_between(self, tmp_path: Path):
        state = {name.replace("layers.1.", "layers.3."): t for name, t in megatron_state("llama").items()}
        message = refused_megatron(tmp_path, state, "llama", {"num_hidden_layers": 6})
        assert_says(message, "4 layers of the model are not in the checkpoint: 1-2, 4-5")

    def test_of_one_layer(self, tmp_path: Path):
        message = refused_megatron(tmp_path, without(megatron_state("llama"), "layers.1."), "llama")
        assert_says(message, "1 problem", "1 layer of the model is not in the checkpoint: 1")

    def test_of_experts_that_are_gone_are_one_problem_with_their_numbers(self, tmp_path: Path):
        """The files of an expert parallel rank."""
        state = without(singleton(megatron_state("deepseek_v3")), "experts.2.linear", "experts.3.linear")
        message = refused_megatron(tmp_path, state, "deepseek_v3")
        assert_says(message, "1 problem", "2 experts, in 1 layer, are not in the checkpoint: 2-3",
                    "model.layers.1.mlp.experts.2.* for one", "an expert parallel rank is missing", "fix:")  # fmt: skip

    def test_of_one_expert_in_part(self, tmp_path: Path):
        state = without(singleton(megatron_state("qwen3_moe")), "experts.1.linear_fc2")
        message = refused_megatron(tmp_path, state, "qwen3_moe")
        assert_says(message, "1 problem", "fills model.layers.0.mlp.experts.1.down_proj.weight and 1 more like it")

    @pytest.mark.parametrize(("model", "gone", "have"), [
        ("gpt_oss", "experts.1.linear_fc", "0, 2-3"), ("gpt_oss", "experts.3.linear_fc", "0-2"),
        ("qwen3_vl_moe", "experts.0.linear_fc", "1-2"),
    ])  # fmt: skip
    def test_because_an_expert_of_a_packed_tensor_is_gone(self, tmp_path: Path, model: str, gone: str, have: str):
        state = without(singleton(megatron_state(model), plain=("vision_model.",)), gone)
        message = refused_megatron(tmp_path, state, model)
        count = 4 if model == "gpt_oss" else 3
        assert_says(message, f"layers.0.mlp.experts.down_proj cannot be put together from experts {have}",
                    f"it has {count} of one shape", "linear_fc2.weight", "fix: copy the checkpoint")  # fmt: skip
        assert "nothing in the checkpoint" not in message

    def test_because_a_packed_experts_shape_is_another(self, tmp_path: Path):
        state = singleton(megatron_state("gpt_oss"))
        name = "decoder.layers.0.mlp.experts.experts.2.linear_fc2.weight"
        state[name] = torch.zeros(16, 7)
        message = refused_megatron(tmp_path, state, "gpt_oss")
        assert_says(message, "1 problem", "model.layers.0.mlp.experts.down_proj cannot be put together", "one shape")

    @pytest.mark.parametrize("half", ["_w", "_v"])
    def test_because_one_half_is_gone(self, tmp_path: Path, half: str):
        state = singleton(megatron_state("llama"))
        del state[FC1 + ("_v" if half == "_w" else "_w")]
        message = refused_megatron(tmp_path, {f"module.{name}": t for name, t in state.items()}, "llama")
        assert_says(message, "1 problem", f"{FC1} has only one of its halves: module.{FC1}{half}", "fix:")


class TestConfigsOfOtherModels:
    def test_with_fewer_layers(self, tmp_path: Path):
        message = refused_megatron(tmp_path, megatron_state("llama"), "llama", {"num_hidden_layers": 1})
        assert_says(message, "1 problem", "the checkpoint has 1 layer that config.json's model has not: 1",
                    "decoder.layers.1.", "fix: pass the config")  # fmt: skip

    def test_with_fewer_layers_than_a_stacked_tensor(self, tmp_path: Path):
        message = refused_megatron(tmp_path, stacked(megatron_state("llama")), "llama", {"num_hidden_layers": 1})
        assert_says(message, "1 problem", "1 layer that config.json's model has not: 1", "decoder.layers.")

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"num_attention_heads": 8}, "has 32 rows; 2 query groups of 4 query, one key and one value head of 4"),
            ({"num_key_value_heads": 4}, "has 32 rows; 4 query groups of 1 query, one key and one value head of 4"),
            ({"head_dim": 8}, "has 32 rows; 2 query groups of 2 query, one key and one value head of 8 make 64"),
            ({"num_key_value_heads": 3}, "cannot be cut: config.json has 4 heads in 3 query groups"),
        ],
    )
    @pytest.mark.parametrize("form", ["layers", "stacked"])
    def test_with_other_heads(self, tmp_path: Path, changes: dict[str, int], words: str, form: str):
        state = megatron_state("llama")
        message = refused_megatron(tmp_path, stacked(state) if form == "stacked" else state, "llama", changes)
        assert_says(message, "self_attention.linear_qkv.weight " + words, "not of one model", "fix: pass the config")
        assert "no tensor of the checkpoint fills" not in message  # what cannot be cut is told once

    def test_with_another_hidden_size(self, tmp_path: Path):
        message = refused_megatron(tmp_path, megatron_state("llama"), "llama", {"hidden_size": 32})
        assert_says(message, "model.embed_tokens.weight has shape [40, 16]", "LlamaForCausalLM has [37, 32]",
                    "embedding.word_embeddings.weight", "more like these", "fix: pass the config")  # fmt: skip

    def test_with_another_width(self, tmp_path: Path):
        message = refused_megatron(tmp_path, megatron_state("llama"), "llama", {"intermediate_size": 32})
        assert_says(message, "model.layers.0.mlp.gate_proj.weight has shape [24, 16]", "has [32, 16]", FC1)

    def test_with_experts_where_the_checkpoint_has_none(self, tmp_path: Path):
        message = refused_megatron(tmp_path, megatron_state("qwen3"), "qwen3_moe")
        assert_says(message, "nothing in the checkpoint fills model.layers.0.mlp.experts.* and 1 part like it",
                    f"{FC1} becomes model.layers.0.mlp.gate_proj.weight", "fix:")  # fmt: skip

    def test_with_more_experts(self, tmp_path: Path):
        message = refused_megatron(tmp_path, megatron_state("deepseek_v3"), "deepseek_v3", {"n_routed_experts": 6})
        assert_says(message, "2 experts, in 1 layer, are not in the checkpoint: 4-5", "config.json has more experts")

    @pytest.mark.parametrize(("model_type", "architecture", "lacking"), [
        ("starcoder2", "Starcoder2ForCausalLM", "self_attn.q_proj.bias"), ("olmo2", "Olmo2ForCausalLM", "q_norm"),
    ])  # fmt: skip
    def test_of_a_family_without_a_table(self, tmp_path: Path, model_type: str, architecture: str, lacking: str):
        changes = {"model_type": model_type, "architectures": [architecture]}
        message = refused_megatron(tmp_path, megatron_state("llama"), "llama", changes)
        assert_says(message, f"there is no Megatron table for model_type '{model_type}'", "nearest: llama (nothing for",
                    lacking, "qwen3_moe", "fix: add a table", "CONTRIBUTING.md")  # fmt: skip

    def test_of_a_family_without_a_table_that_some_rule_is_missing_for(self, tmp_path: Path):
        state = megatron_state("llama") | {"decoder.layers.0.mlp.gate_norm.weight": torch.zeros(2)}
        changes = {"model_type": "starcoder2", "architectures": ["Starcoder2ForCausalLM"]}
        message = refused_megatron(tmp_path, state, "llama", changes)
        assert_says(message, "no rule for decoder.layers.0.mlp.gate_norm.weight")


class TestHybridModels:
    def test_are_renumbered(self, tmp_path: Path):
        merge_megatron(tmp_path, hybrid(megatron_state("qwen3_moe")), "qwen3_moe")
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(published_state("qwen3_moe")))

    @pytest.mark.parametrize(("gone", "words"), [
        (("layers.3.",), "1 layer of the HybridModel is not in the checkpoint: 3"),
        (("layers.0.", "layers.1."), "2 layers of the HybridModel are not in the checkpoint: 0, 1"),
    ])  # fmt: skip
    def test_with_a_layer_gone(self, tmp_path: Path, gone: tuple[str, ...], words: str):
        message = refused_megatron(tmp_path, without(hybrid(megatron_state("llama")), *gone), "llama")
        assert_says(message, "1 problem", words, "2N and 2N + 1", "fix: copy the checkpoint again")

    @pytest.mark.parametrize(("old", "new"), [
        ("layers.3.mlp.", "layers.3.mixer."), ("layers.2.self_attention", "layers.2.mlp"), ("layers.3.", "layers.2."),
    ])  # fmt: skip
    def test_with_layers_of_another_kind(self, tmp_path: Path, old: str, new: str):
        state = {name.replace(old, new): tensor for name, tensor in hybrid(megatron_state("llama")).items()}
        message = refused_megatron(tmp_path, state, "llama")
        assert_says(message, "1 problem", "do not alternate between attention and MLP", f"layer {new[7]}", "Mamba",
                    "fix: convert")  # fmt: skip


class TestBaseModels:
    """A vision tower that training never had."""

    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        return save_tiny_model("qwen3_vl", tmp_path / "base", "bfloat16")

    def language(self) -> Tensors:
        return without(megatron_state("qwen3_vl"), "vision_model.")

    def expected(self) -> Any:
        tower = {n: t for n, t in published_state("qwen3_vl", "bfloat16").items() if n.startswith("model.visual.")}
        return bits_of_all(published_state("qwen3_vl") | tower)

    def test_fill_what_is_missing_with_their_own_bits(self, tmp_path: Path, base: Path):
        report = merge_megatron(tmp_path, self.language(), "qwen3_vl", base_model=base)
        assert_same(saved_bits(tmp_path / "out"), self.expected())
        fills = {fill.name: fill.origin for fill in report.plan.fills}
        assert fills == {name: str(base) for name in published_state("qwen3_vl") if name.startswith("model.visual.")}
        recorded = receipt_of(tmp_path / "out")["fills"]
        assert {fill["tensor"]: fill["from"] for fill in recorded} == fills
        assert {fill["reason"] for fill in recorded} == {"the checkpoint does not hold it"}
        assert [file.path for file in report.plan.base_files] == [base / "model.safetensors"]

    def test_are_cast_like_the_rest(self, tmp_path: Path, base: Path):
        merge_megatron(tmp_path, self.language(), "qwen3_vl", base_model=base, dtype="float16")
        assert {value[0] for value in saved_bits(tmp_path / "out").values()} == {"float16"}

    def test_fill_in_the_other_dialect(self, tmp_path: Path):
        base = save_tiny_model("gemma3_vision", tmp_path / "base", "bfloat16")
        state = without(megatron_state("gemma3_vision"), "vision_tower.", "multi_modal_projector.")
        report = merge_megatron(tmp_path, state, "gemma3_vision", base_model=base, dialect="transformers")
        other = memory_state("gemma3_vision", "bfloat16")
        want = {
            name: other[name] if "language_model" not in name else tensor
            for name, tensor in memory_state("gemma3_vision").items()
            if name != "lm_head.weight"
        }
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(want))
        assert {fill.name for fill in report.plan.fills} == {name for name in want if "language_model" not in name}

    @pytest.mark.parametrize("dialect", ["hub", "transformers"])
    def test_may_have_the_names_in_memory(self, tmp_path: Path, dialect: str):
        """As transformers saves what it was given under those names."""
        (tmp_path / "base").mkdir()
        save_file(memory_state("qwen2_5_vl", "bfloat16"), tmp_path / "base" / "model.safetensors")
        state = without(megatron_state("qwen2_5_vl"), "visual.")
        merge_megatron(tmp_path, state, "qwen2_5_vl", base_model=tmp_path / "base", dialect=dialect)
        made = published_state if dialect == "hub" else memory_state
        tower = {name: tensor for name, tensor in made("qwen2_5_vl", "bfloat16").items() if "visual." in name}
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(made("qwen2_5_vl") | tower))

    def test_fill_through_the_command_line(self, tmp_path: Path, base: Path):
        write_megatron(tmp_path / "ckpt", self.language(), "qwen3_vl")
        words = ["--local_dir", tmp_path / "ckpt", "--target_dir", tmp_path / "out", "--base_model", base]
        assert main(["merge", *map(str, words)]) == 0
        assert_same(saved_bits(tmp_path / "out"), self.expected())

    def test_fill_nothing_that_the_checkpoint_has(self, tmp_path: Path, base: Path):
        report = merge_megatron(tmp_path, megatron_state("qwen3_vl"), "qwen3_vl", base_model=base)
        assert (report.plan.fills, report.plan.base_files) == ((), ())
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(published_state("qwen3_vl")))

    @pytest.mark.parametrize(
        ("model", "gone", "words"),
        [
            ("llama", "layers.1.", "1 layer of the model is not in the checkpoint: 1"),
            ("llama", "layers.1.mlp.linear_fc2", "fills model.layers.1.mlp.down_proj.weight"),
            ("qwen3_moe", "experts.1.linear", "1 expert, in 2 layers, is not in the checkpoint: 1"),
            ("qwen3_vl", "vision_model.decoder.layers.0.", "fills model.visual.blocks.0.*"),
        ],
    )
    def test_fill_no_gaps_in_what_was_trained(self, tmp_path: Path, model: str, gone: str, words: str):
        """A layer that others of its kind are there without is lost, and another model's would be taken for it."""
        base = save_tiny_model(model, tmp_path / "base")
        state = without(singleton(megatron_state(model), plain=("vision_model.",)), gone)
        message = refused_megatron(tmp_path, state, model, base_model=base)
        assert_says(message, "1 problem", words, "fix:")
        assert "--base_model" not in message

    def test_that_have_not_what_is_missing(self, tmp_path: Path):
        base = save_tiny_model("llama", tmp_path / "base")
        message = refused_megatron(tmp_path, self.language(), "qwen3_vl", base_model=base)
        assert_says(message, "1 problem", "nothing in the checkpoint fills model.visual.*",
                    "fix:", "a base model fills only what training never had")  # fmt: skip

    @pytest.mark.parametrize("dialect", ["hub", "transformers"])
    def test_of_other_shapes_are_refused(self, tmp_path: Path, base: Path, dialect: str):
        vision = tiny_config("qwen3_vl").vision_config.to_dict() | {"intermediate_size": 30}
        message = refused_megatron(
            tmp_path, self.language(), "qwen3_vl", {"vision_config": vision}, base_model=base, dialect=dialect
        )
        assert_says(message, "model.visual.blocks.0.mlp.linear_fc1.weight has shape [24, 16] in the base model",
                    "has [30, 16]", str(base), "fix: pass the model that training started from")  # fmt: skip

    @pytest.mark.parametrize("kind", ["empty", "absent", "file"])
    def test_without_safetensors_are_refused(self, tmp_path: Path, kind: str):
        base = tmp_path / "base"
        if kind == "empty":
            base.mkdir()
        elif kind == "file":
            base.write_text("no directory")
        message = refusal(
            NotACheckpointError, merge_megatron, tmp_path, self.language(), "qwen3_vl", base_model=base
        )  # fmt: skip
        what = "no safetensors files in" if kind == "empty" else "no such directory"
        assert_says(
            message, f"there {'are' if kind == 'empty' else 'is'} {what}", str(base), "fix:", "--base_model DIR"
        )

    def test_that_change_after_planning_are_refused(self, tmp_path: Path, base: Path):
        write_megatron(tmp_path / "ckpt", self.language(), "qwen3_vl")
        plan = nbmerge.plan_merge(tmp_path / "ckpt", base_model=base)
        state = published_state("qwen3_vl", "bfloat16")
        state["model.visual.merger.norm.bias"] = state["model.visual.merger.norm.bias"] + 1
        save_file(state, base / "model.safetensors")
        message = refusal(InconsistentCheckpointError, nbmerge.merge, plan, tmp_path / "out")
        assert_says(message, "the base model changed since", "model.safetensors", str(base), "fix:")
        assert not (tmp_path / "out").exists()

    def test_are_part_of_what_a_plan_stands_for(self, tmp_path: Path, base: Path):
        write_megatron(tmp_path / "ckpt", self.language(), "qwen3_vl")
        plan = nbmerge.plan_merge(tmp_path / "ckpt", base_model=base)
        assert base / "model.safetensors" in [file.path for file in plan.sources]
        other = nbmerge.plan_merge(tmp_path / "ckpt", base_model=save_tiny_model("qwen3_vl", tmp_path / "other"))
        assert plan.digest != other.digest

    def test_fill_a_checkpoint_of_fsdp_too(self, tmp_path: Path, base: Path):
        from tests.support.models import write_model_world

        state = {name: tensor for name, tensor in memory_state("qwen3_vl").items() if "visual" not in name}
        write_model_world(tmp_path / "ckpt", "qwen3_vl", 2, state=state)
        refusal(PlanError, nbmerge.merge, tmp_path / "ckpt", tmp_path / "out")
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", base_model=base)
        assert_same(saved_bits(tmp_path / "out"), self.expected())


def test_a_value_heads_bias_is_zeros_whatever_the_base_model_has(tmp_path: Path):
    base = save_tiny_model("qwen2_value", tmp_path / "base")
    report = merge_megatron(tmp_path, megatron_state("qwen2_value"), "qwen2_value", base_model=base)
    assert [fill.origin for fill in report.plan.fills] == ["zeros"]
    assert saved_bits(tmp_path / "out")["score.bias"] == bits(torch.zeros(1))
