"""What a run recorded of its model must not contradict config.json, where no shape would show it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

import nbmerge
from nbmerge.layout import Stated
from nbmerge.naming.megatron.families import FAMILIES, family_of
from nbmerge.naming.megatron.family import Family
from nbmerge.naming.megatron.rules import Sizes
from nbmerge.naming.megatron.stated import other_forms, other_sizes
from tests.support.megatron_models import megatron_state, write_megatron
from tests.support.messages import assert_says, refusal
from tests.support.models import published_state, tiny_config
from tests.support.results import assert_same, bits_of_all, saved_bits

LLAMA = {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 4, "hidden_size": 16, "num_layers": 2,
         "ffn_hidden_size": 24, "num_moe_experts": None, "multi_latent_attention": False, "qk_layernorm": False,
         "layernorm_zero_centered_gamma": False, "rotary_interleaved": False}  # fmt: skip
OTHER_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # tensors of the same shapes


def checkpoint(directory: Path, said: dict[str, Any], model: str = "llama", family: str = "", **config: Any) -> Path:
    write_megatron(directory / "ckpt", megatron_state(model, family), model, **config)
    (directory / "ckpt" / "transformer_config.json").write_text(json.dumps(said))
    return directory / "ckpt"


def refused(directory: Path, *args: Any, **config: Any) -> str:
    path = checkpoint(directory, *args, **config)
    message = refusal(nbmerge.PlanError, nbmerge.merge, path, directory / "out", progress=False)
    assert not (directory / "out").exists()
    return message


def merged(directory: Path, said: dict[str, Any], model: str = "llama", **config: Any) -> None:
    nbmerge.merge(checkpoint(directory, said, model, **config), directory / "out", progress=False)
    assert_same(saved_bits(directory / "out"), bits_of_all(published_state(model)))


def sizes_problem(said: dict[str, Any], model: str, *, is_wrong: bool = False) -> str:
    """What is said of a model's config beside what a run recorded; nothing where they agree."""
    config = tiny_config(model).to_dict()
    published = {name: tuple(tensor.shape) for name, tensor in published_state(model).items()}
    family = family_of(config["model_type"])
    assert family is not None
    problems = other_sizes(Stated(said, "run.json"), Sizes(config, published), family, is_wrong=is_wrong)
    return "\n".join(line for problem in problems for line in problem.lines())


class TestAttentionHeads:
    def test_a_config_with_other_heads_and_the_same_shapes_is_refused(self, tmp_path: Path):
        message = refused(tmp_path, LLAMA, **OTHER_HEADS)
        assert_says(message, "1 problem", "num_attention_heads is 4 in the run, 2 in config.json",
                    "num_query_groups is 2 in the run, num_key_value_heads 1 in config.json",
                    "kv_channels is 4 in the run, head_dim 8 in config.json", "transformer_config.json; config.json",
                    "their shapes are the same", "fix: pass the config that training used")  # fmt: skip

    def test_a_run_that_says_nothing_is_taken_at_its_config(self, tmp_path: Path):
        nbmerge.merge(checkpoint(tmp_path, {}, **OTHER_HEADS), tmp_path / "out", progress=False)

    def test_the_config_of_the_run_is_merged(self, tmp_path: Path):
        merged(tmp_path, LLAMA)

    @pytest.mark.parametrize("said", [
        {"num_attention_heads": 4, "num_query_groups": 1, "group_query_attention": False},  # megatron's default is 1
        {"num_attention_heads": 4, "num_query_groups": None},
        {"num_attention_heads": 4, "num_query_groups": 4, "group_query_attention": True},
        {"num_attention_heads": 4},
    ])  # fmt: skip
    def test_groups_default_to_heads(self, said: dict[str, Any]):
        groups = said.get("num_query_groups", "none")
        told = sizes_problem(said, "qwen2")  # two groups of four heads
        assert ("num_query_groups is 4 in the run, num_key_value_heads 2" in told) == (groups != "none")

    def test_a_config_without_groups_has_as_many_as_heads(self):
        config, published = {"num_attention_heads": 4, "hidden_size": 16}, {"model.norm.weight": (16,)}
        family = family_of("llama")
        assert family is not None
        for said, count in (({"num_query_groups": 4}, 0), ({"num_query_groups": 2}, 1)):
            assert len(other_sizes(Stated(said), Sizes(config, published), family, is_wrong=False)) == count

    @pytest.mark.parametrize("value", [None, "four", 4.0, True, 0, -1, [4], {}])
    def test_what_is_no_number_of_heads_is_not_compared(self, value: Any):
        said = {"num_attention_heads": value, "num_query_groups": 2, "kv_channels": value, "hidden_size": value}
        assert sizes_problem(said, "llama") == ""

    def test_channels_that_are_not_set_are_not_guessed(self):
        """hidden / heads is 4; Qwen3's heads of the tests are wider, and Megatron-LM's arguments may not say so."""
        assert sizes_problem({"num_attention_heads": 4, "hidden_size": 16}, "gemma3") == ""

    def test_latent_attention_has_no_groups(self):
        said = {"num_attention_heads": 4, "num_query_groups": 1, "kv_channels": 16, "multi_latent_attention": True}
        assert sizes_problem(said, "deepseek_v3") == ""
        assert_says(sizes_problem({"num_attention_heads": 8}, "deepseek_v3"), "num_attention_heads is 8 in the run")

    def test_the_language_models_config_is_meant(self):
        assert sizes_problem({**LLAMA, "kv_channels": None}, "qwen2_5_vl") == ""
        assert_says(sizes_problem({"num_attention_heads": 16}, "qwen2_5_vl"), "4 in config.json")


class TestSizesThatShapesShow:
    SAID: ClassVar = {"hidden_size": 32, "num_layers": 3, "ffn_hidden_size": 99, "qk_layernorm": True}

    def test_are_told_where_anything_is_wrong(self, tmp_path: Path):
        message = refused(tmp_path, {**LLAMA, "num_layers": 3, "hidden_size": 16}, num_hidden_layers=3)
        assert "contradicts what the run recorded" not in message
        message = refused(tmp_path / "other", LLAMA, num_hidden_layers=3)
        assert_says(message, "num_layers is 2 in the run, num_hidden_layers 3 in config.json", "is of another model")

    def test_are_no_contradiction_where_all_shapes_fit(self, tmp_path: Path):
        assert sizes_problem(self.SAID, "llama") == ""
        merged(tmp_path, {**LLAMA, **self.SAID})

    def test_are_all_named(self):
        told = sizes_problem(self.SAID, "llama", is_wrong=True)
        assert_says(told, "hidden_size is 32 in the run, 16 in config.json", "num_layers is 3",
                    "ffn_hidden_size is 99 in the run, intermediate_size 24", "qk_layernorm is 1")  # fmt: skip

    def test_layers_of_a_hybrid_model_count_twice(self):
        assert sizes_problem({"num_layers": 4}, "llama", is_wrong=True) == ""

    def test_of_experts(self):
        said = {"num_experts": 8, "moe_ffn_hidden_size": 7, "ffn_hidden_size": 6}
        assert_says(sizes_problem(said, "qwen3_moe", is_wrong=True), "num_experts is 8 in the run",
                    "moe_ffn_hidden_size is 7 in the run, moe_intermediate_size 6 in config.json")  # fmt: skip
        assert "; ffn_hidden_size" not in sizes_problem(said, "qwen3_moe", is_wrong=True)  # no dense layers
        assert_says(sizes_problem({**said, "num_moe_experts": 3}, "mixtral", is_wrong=True),
                    "moe_ffn_hidden_size is 7 in the run, intermediate_size 24")  # fmt: skip
        assert sizes_problem({"moe_ffn_hidden_size": 176, "num_experts": None}, "llama", is_wrong=True) == ""

    def test_of_latent_attention(self):
        said = {"kv_lora_rank": 9, "qk_head_dim": 4, "qk_pos_emb_head_dim": 5, "v_head_dim": 4, "q_lora_rank": None}
        told = sizes_problem(said, "deepseek_v3", is_wrong=True)
        assert_says(told, "kv_lora_rank is 9 in the run, 8 in config.json",
                    "qk_pos_emb_head_dim is 5 in the run, qk_rope_head_dim 4")  # fmt: skip
        assert "v_head_dim" not in told and "q_lora_rank" not in told
        assert "kv_lora_rank" not in sizes_problem({"kv_lora_rank": 32}, "llama", is_wrong=True)  # an unused default


class TestOtherForms:
    @pytest.mark.parametrize("name", ["layernorm_zero_centered_gamma", "apply_layernorm_1p"])
    def test_norms_less_1_of_a_family_that_has_none(self, tmp_path: Path, name: str):
        message = refused(tmp_path, {name: True})
        assert_says(message, "1 problem", "norms are stored less 1, and llama publishes them as they are",
                    "transformer_config.json", "1 + weight", "with that option off")  # fmt: skip

    def test_norms_of_gemma(self, tmp_path: Path):
        merged(tmp_path / "said", {"layernorm_zero_centered_gamma": True}, "gemma")
        merged(tmp_path / "unsaid", {"layernorm_zero_centered_gamma": None}, "gemma")
        message = refused(tmp_path, {"layernorm_zero_centered_gamma": False}, "gemma")
        assert_says(message, "without being less 1, and gemma publishes them less 1", "with that option on")

    def test_either_name_is_enough(self, tmp_path: Path):
        merged(tmp_path, {"layernorm_zero_centered_gamma": True, "apply_layernorm_1p": False}, "gemma2")

    def test_rotary_channels_side_by_side(self, tmp_path: Path):
        message = refused(tmp_path, {"rotary_interleaved": True})
        assert_says(message, "1 problem", "rotary embeddings turn neighbouring channels in the run",
                    "one half with those of the other in llama", "rotary_interleaved=True", "option off")  # fmt: skip

    def test_rotary_channels_of_glm_4(self, tmp_path: Path):
        merged(tmp_path / "said", {"rotary_interleaved": True}, "glm4")
        message = refused(tmp_path, {"rotary_interleaved": False}, "glm4")
        assert_says(message, "channels of one half", "neighbouring channels in glm4", "with that option on")

    @pytest.mark.parametrize("interleaved", [True, False])
    def test_rotary_channels_of_latent_attention_have_an_option_of_their_own(self, interleaved: bool):
        family = family_of("deepseek_v3")
        assert family is not None
        assert other_forms(Stated({"rotary_interleaved": interleaved}), family) == []

    @pytest.mark.parametrize("name", ["moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size"])
    def test_gate_and_up_in_alternating_blocks(self, tmp_path: Path, name: str):
        message = refused(tmp_path, {name: 32}, "qwen3_moe")
        assert_says(message, "1 problem", "alternating blocks", f"{name}=32", "mix gate and up", "option off")
        merged(tmp_path / "off", {name: None}, "qwen3_moe")

    @pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
    def test_a_run_that_says_nothing_is_never_of_another_form(self, family: Family):
        assert other_forms(Stated({}), family) == []
