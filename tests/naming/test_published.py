"""A merge writes what the model's own `save_pretrained` writes, name by name and bit by bit."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

import nbmerge
from nbmerge import ConfigError, PlanError
from nbmerge.dtypes import BY_NAME
from nbmerge.expressions import Input
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.published import name_tensors
from tests.support.messages import assert_says, refusal
from tests.support.models import (
    FAMILIES,
    HAS_CONVERSIONS,
    kept_in_fp32,
    memory_state,
    tiny_model,
    write_config,
    write_model_world,
)
from tests.support.results import assert_same, bits, bits_of_all, receipt_of, saved_bits
from tests.support.worlds import write_ranks

of_transformers_5 = pytest.mark.skipif(not HAS_CONVERSIONS, reason="transformers 4 has no such names")

LEFT_OUT = {"qwen2_tied": {"lm_head.weight"}, "gemma3": {"lm_head.weight"}, "qwen3_vl": {"lm_head.weight"}}


def hub_state(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def untied(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in memory_state(name).items() if key not in LEFT_OUT.get(name, ())}


def loads_without_a_word(directory: Path) -> dict[str, object]:
    """transformers' own report of loading the merged directory."""
    import transformers

    architecture = json.loads((directory / "config.json").read_text())["architectures"][0]
    _, info = getattr(transformers, architecture).from_pretrained(directory, output_loading_info=True)
    return {key: value for key, value in info.items() if value}


class TestEveryFamily:
    @pytest.mark.parametrize("world_size", [1, 3])
    @pytest.mark.parametrize("name", FAMILIES)
    def test_is_written_as_save_pretrained_writes_it(self, tmp_path: Path, tiny_model_dir, name: str, world_size: int):
        report = nbmerge.merge(write_model_world(tmp_path / "ckpt", name, world_size), tmp_path / "out")
        assert_same(saved_bits(tmp_path / "out"), saved_bits(tiny_model_dir(name)))
        assert report.plan.dialect == "transformers" or report.plan.renamed == 0
        assert report.plan.model_class == type(tiny_model(name)).__name__

    @pytest.mark.parametrize("name", FAMILIES)
    def test_loads_into_its_class_with_nothing_missing_and_nothing_extra(self, tmp_path: Path, name: str):
        nbmerge.merge(write_model_world(tmp_path / "ckpt", name), tmp_path / "out")
        assert loads_without_a_word(tmp_path / "out") == {}

    @pytest.mark.parametrize("name", FAMILIES)
    def test_shards_that_hold_hub_names_pass_unchanged(self, tmp_path: Path, tiny_model_dir, name: str):
        """As transformers 4 had them in memory."""
        state = hub_state(tiny_model_dir(name))
        write_model_world(tmp_path / "ckpt", name, 2, state=state)
        report = nbmerge.merge(tmp_path / "ckpt", tmp_path / "out")
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(state))
        assert report.plan.renamed == 0

    @pytest.mark.parametrize("source", ["memory", "hub"])
    @pytest.mark.parametrize("name", FAMILIES)
    def test_can_be_written_with_the_names_in_memory(self, tmp_path: Path, tiny_model_dir, name: str, source: str):
        state = memory_state(name) if source == "memory" else hub_state(tiny_model_dir(name))
        write_model_world(tmp_path / "ckpt", name, 2, state=state)
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", dialect="transformers")
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(untied(name)))
        assert receipt_of(tmp_path / "out")["options"] == {"dialect": "transformers"}

    @pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
    def test_experts_of_bfloat16_keep_their_bits(self, tmp_path: Path, name: str):
        from tests.support.models import save_tiny_model

        nbmerge.merge(write_model_world(tmp_path / "ckpt", name, 2, "bfloat16"), tmp_path / "out")
        assert_same(saved_bits(tmp_path / "out"), saved_bits(save_tiny_model(name, tmp_path / "reference", "bfloat16")))

    @of_transformers_5
    @pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
    def test_no_fused_tensor_has_to_be_in_memory(self, tmp_path: Path, name: str):
        plan = nbmerge.plan_merge(write_model_world(tmp_path / "ckpt", name))
        assert plan.renamed and plan.execution.computed_bytes == 0
        assert plan.execution.copied_bytes == plan.data_bytes


class TestTiedWeights:
    def test_the_copy_is_left_out_and_the_tie_recorded(self, tmp_path: Path):
        nbmerge.merge(write_model_world(tmp_path / "ckpt", "qwen2_tied"), tmp_path / "out")
        assert "lm_head.weight" not in saved_bits(tmp_path / "out")
        assert receipt_of(tmp_path / "out")["ties"] == [
            {"tensor": "lm_head.weight", "kept": "model.embed_tokens.weight"}
        ]

    def test_that_differ_are_refused_with_both_ways_out(self, tmp_path: Path):
        state = memory_state("qwen2_tied")
        state["lm_head.weight"][3, 2] += 1
        write_model_world(tmp_path / "ckpt", "qwen2_tied", state=state)
        message = refusal(PlanError, nbmerge.merge, tmp_path / "ckpt", tmp_path / "out")
        assert_says(
            message, "lm_head.weight is tied to model.embed_tokens.weight", "first at [3, 2]", "tie_word_embeddings",
            "fix:",
        )  # fmt: skip
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("missing", [False, True], ids=["both stored", "only one stored"])
    def test_of_another_shape_are_not_lost_silently(self, tmp_path: Path, missing: bool):
        state = memory_state("qwen2_tied")
        state["lm_head.weight"] = state["lm_head.weight"][:5]
        if missing:
            del state["model.embed_tokens.weight"]
        write_model_world(tmp_path / "ckpt", "qwen2_tied", state=state)
        message = refusal(PlanError, nbmerge.merge, tmp_path / "ckpt", tmp_path / "out")
        assert_says(message, "lm_head.weight has shape [5, 16]", "has [37, 16]", "fix:")

    def test_of_another_dtype_are_not_lost_silently(self, tmp_path: Path):
        state = memory_state("qwen2_tied", "bfloat16")
        state["lm_head.weight"] = state["lm_head.weight"].float() + 1
        write_model_world(tmp_path / "ckpt", "qwen2_tied", state=state)
        message = refusal(PlanError, nbmerge.merge, tmp_path / "ckpt", tmp_path / "out")
        assert_says(message, "lm_head.weight is tied to model.embed_tokens.weight", "float32 where that is bfloat16",
                    "tie_word_embeddings")  # fmt: skip

    def test_that_differ_are_both_written_when_the_config_says_untied(self, tmp_path: Path):
        state = memory_state("qwen2_tied")
        state["lm_head.weight"][3, 2] += 1
        write_model_world(tmp_path / "ckpt", "qwen2_tied", state=state)
        write_config(tmp_path / "ckpt" / "huggingface", "qwen2_tied", tie_word_embeddings=False)
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out")
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(state))

    def test_of_which_only_the_other_is_stored_fill_the_one_that_is_written(self, tmp_path: Path, tiny_model_dir):
        state = memory_state("qwen2_tied")
        del state["model.embed_tokens.weight"]
        write_model_world(tmp_path / "ckpt", "qwen2_tied", state=state)
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out")
        assert_same(saved_bits(tmp_path / "out"), saved_bits(tiny_model_dir("qwen2_tied")))

    def test_of_which_only_the_written_one_is_stored_are_complete(self, tmp_path: Path, tiny_model_dir):
        write_model_world(tmp_path / "ckpt", "qwen2_tied", state=untied("qwen2_tied"))
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out")
        assert_same(saved_bits(tmp_path / "out"), saved_bits(tiny_model_dir("qwen2_tied")))

    def test_the_user_can_tie_what_the_config_does_not(self, tmp_path: Path):
        state = memory_state("qwen2_tied")
        write_model_world(tmp_path / "ckpt", "qwen2_tied", state=state)
        write_config(tmp_path / "ckpt" / "huggingface", "qwen2_tied", tie_word_embeddings=False)
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", tie_word_embedding=True)
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(untied("qwen2_tied")))
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
        edit = receipt_of(tmp_path / "out")["config_edits"]["tie_word_embeddings"]
        assert edit == {"from": False, "to": True}


class TestValueModels:
    def test_a_critic_is_written_for_token_classification_whatever_the_config_names(self, tmp_path: Path):
        write_model_world(tmp_path / "ckpt", "qwen2_value")
        write_config(tmp_path / "ckpt" / "huggingface", "qwen2", architectures=["Qwen2ForCausalLM"])
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", is_value_model=True)
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(memory_state("qwen2_value")))
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["architectures"] == ["Qwen2ForTokenClassification"]
        assert loads_without_a_word(tmp_path / "out") == {}

    def test_a_critic_that_is_not_said_to_be_one_is_refused(self, tmp_path: Path):
        write_model_world(tmp_path / "ckpt", "qwen2_value")
        write_config(tmp_path / "ckpt" / "huggingface", "qwen2")
        message = refusal(PlanError, nbmerge.merge, tmp_path / "ckpt", tmp_path / "out")
        assert_says(message, "score.weight", "lm_head.weight", "Qwen2ForCausalLM")


class TestWrappersPrefixes:
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda name: f"module.{name}",
            lambda name: f"_orig_mod.{name}",
            lambda name: f"_fsdp_wrapped_module.{name}",
            lambda name: f"module._orig_mod.{name}".replace("layers.", "layers._fsdp_wrapped_module."),
            lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
            lambda name: name.replace("mlp.", "mlp._orig_mod.").replace("layers.1.", "layers.1._fsdp_wrapped_module."),
        ],
        ids=["ddp", "compile", "fsdp", "all in front", "checkpointing", "inside"],
    )
    def test_are_taken_off(self, tmp_path: Path, wrap):
        state = memory_state("llama")
        write_model_world(tmp_path / "ckpt", "llama", state={wrap(name): value for name, value in state.items()})
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out")
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(state))

    def test_under_which_two_tensors_have_one_name_are_refused(self, tmp_path: Path):
        state = memory_state("llama")
        state["_orig_mod.model.norm.weight"] = state["model.norm.weight"] + 1
        write_model_world(tmp_path / "ckpt", "llama", state=state)
        message = refusal(PlanError, nbmerge.merge, tmp_path / "ckpt", tmp_path / "out")
        assert_says(message, "model.norm.weight and _orig_mod.model.norm.weight", "fix:", "unwrapped model")


class TestWhatIsNoWeightOfTheModel:
    @pytest.mark.parametrize(
        "name", ["model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq", "h.0.attn.masked_bias"]
    )
    def test_a_buffer_that_is_computed_on_loading_is_dropped_and_recorded(self, tmp_path: Path, name: str):
        state = {**memory_state("llama"), name: torch.ones(2)}
        write_model_world(tmp_path / "ckpt", "llama", state=state)
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out")
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(memory_state("llama")))
        (drop,) = receipt_of(tmp_path / "out")["drops"]
        assert drop["tensor"] == name and "computes" in drop["reason"]

    @of_transformers_5
    def test_a_tensor_that_the_class_knows_and_does_not_load_is_kept_and_recorded(self, tmp_path: Path):
        """DeepSeek-V3's multi-token prediction."""
        extra = {"model.layers.61.eh_proj.weight": torch.randn(4, 3)}
        write_model_world(tmp_path / "ckpt", "deepseek_v3", state={**memory_state("deepseek_v3"), **extra})
        report = nbmerge.merge(tmp_path / "ckpt", tmp_path / "out")
        assert saved_bits(tmp_path / "out")["model.layers.61.eh_proj.weight"] == bits(*extra.values())
        assert receipt_of(tmp_path / "out")["unloaded"] == list(extra)
        assert report.verification.unloaded == 1

    @of_transformers_5
    def test_a_layer_after_the_last_is_kept_where_the_config_says_that_it_predicts_further_tokens(self, tmp_path: Path):
        state = memory_state("deepseek_v3")
        number = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("model.layers."))
        layer = {f"model.layers.{number}.{end}": torch.randn(4, 3) for end in ("eh_proj.weight", "mlp.up_proj.weight")}
        write_model_world(tmp_path / "ckpt", "deepseek_v3", state={**state, **layer})
        path = tmp_path / "ckpt" / "huggingface" / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out")
        assert receipt_of(tmp_path / "out")["unloaded"] == list(layer)
        nbmerge.merge(tmp_path / "out", tmp_path / "again")  # a published directory with such a layer, cut anew
        assert_same(saved_bits(tmp_path / "again"), saved_bits(tmp_path / "out"))
        path.write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
        message = refusal(PlanError, nbmerge.merge, tmp_path / "ckpt", tmp_path / "none")
        assert_says(message, f"no rule takes model.layers.{number}.eh_proj.weight")

    def test_a_tensor_that_no_rule_takes_is_never_lost_silently(self, tmp_path: Path):
        state = {**memory_state("llama"), "model.layers.0.mlp.gate_projj.weight": torch.ones(2, 3)}
        write_model_world(tmp_path / "ckpt", "llama", state=state)
        message = refusal(PlanError, nbmerge.merge, tmp_path / "ckpt", tmp_path / "out")
        assert_says(
            message, "no rule takes model.layers.0.mlp.gate_projj.weight of shape [2, 3]", "LlamaForCausalLM",
            "model.layers.0.mlp.gate_proj.weight", "--hf_model_config_path",
        )  # fmt: skip

    @pytest.mark.parametrize("name", ["base_model.model.lm_head.lora_A.default.weight", "lm_head.base_layer.weight"])
    def test_an_adapter_is_refused_in_an_honest_sentence(self, tmp_path: Path, name: str):
        write_model_world(tmp_path / "ckpt", "llama", state={**memory_state("llama"), name: torch.ones(2, 3)})
        message = refusal(PlanError, nbmerge.merge, tmp_path / "ckpt", tmp_path / "out")
        assert_says(message, "LoRA", name, "fix:")

    @pytest.mark.parametrize("name", ["../../escape.weight", "<script>alert(1)</script>", "a\nb", "__metadata__"])
    def test_a_hostile_name_is_told_and_nothing_is_written(self, tmp_path: Path, name: str):
        write_model_world(tmp_path / "ckpt", "llama", state={**memory_state("llama"), name: torch.ones(2)})
        before = sorted(tmp_path.rglob("*"))
        message = refusal(PlanError, nbmerge.merge, tmp_path / "ckpt", tmp_path / "out")
        assert_says(message, "no rule takes " + name.replace("\n", "\\n"))
        assert sorted(tmp_path.rglob("*")) == before


class TestConfigs:
    def test_a_config_of_another_model_is_told_with_all_that_does_not_fit(self, tmp_path: Path):
        write_model_world(tmp_path / "ckpt", "llama")
        write_config(tmp_path / "ckpt" / "huggingface", "qwen2")
        with pytest.raises(PlanError) as caught:
            nbmerge.merge(tmp_path / "ckpt", tmp_path / "out")
        first, *missing = [problem.what for problem in caught.value.problems]
        assert_says(first, "another family", "lacks biases of query, key and value", "as those of Llama")
        assert len(missing) == 3, "the biases of q, k and v"
        assert all(" … and 1 more like it" in what for what in missing), "in two layers"
        assert_says(str(caught.value), "4 problems", "self_attn.q_proj.bias", "Qwen2ForCausalLM", "fix:")

    def test_a_config_of_another_large_model_is_told_soon(self):
        """18,000 experts' names compared with 18,000 others would take hours."""
        float32 = BY_NAME["float32"]
        ours = {f"model.layers.{i}.self_attn.q_proj.weight": (2, 2) for i in range(2000)}
        facts = ModelFacts("X", ours, {n: Input(n, s, float32) for n, s in ours.items()}, {}, {}, frozenset(), (), ())
        theirs = {f"transformer.h.{i}.attn.c_attn.weight": Input("x", (2, 2), float32) for i in range(2000)}
        start = time.monotonic()
        named = name_tensors(theirs, facts)
        assert time.monotonic() - start < 20
        extra, absent = (problem.what for problem in named.problems)
        assert_says(extra, "no rule takes transformer.h.0.attn.c_attn.weight", "and 1,999 more like it")
        assert_says(absent, "no tensor of the checkpoint fills model.layers.0", "and 1,999 more like it")
        assert len(named.mismatches) == 4000, "every one of both is kept"

    def test_shapes_that_do_not_match_are_told_with_both(self, tmp_path: Path):
        write_model_world(tmp_path / "ckpt", "llama")
        write_config(tmp_path / "ckpt" / "huggingface", "llama", vocab_size=41)
        message = refusal(PlanError, nbmerge.merge, tmp_path / "ckpt", tmp_path / "out")
        assert_says(
            message, "2 problems", "lm_head.weight has shape [37, 16]", "has [41, 16]", "vocabulary was resized",
            "--hf_model_config_path",
        )  # fmt: skip

    @of_transformers_5
    def test_a_tensor_that_is_missing_is_told(self, tmp_path: Path):
        state = memory_state("qwen3_moe")
        del state["model.layers.1.mlp.experts.gate_up_proj"]
        write_model_world(tmp_path / "ckpt", "qwen3_moe", state=state)
        message = refusal(PlanError, nbmerge.merge, tmp_path / "ckpt", tmp_path / "out")
        assert_says(message, "1 problem", "model.layers.1.mlp.experts.0.gate_proj.weight and 5 more",
                    "model.layers.1.mlp.experts.gate_up_proj")  # fmt: skip

    def test_no_config_at_all(self, tmp_path: Path):
        write_ranks(tmp_path / "ckpt", [memory_state("llama")])
        message = refusal(ConfigError, nbmerge.merge, tmp_path / "ckpt", tmp_path / "out")
        assert_says(message, "no huggingface/config.json", str(tmp_path / "ckpt"), "--hf_model_config_path")

    def test_a_config_elsewhere(self, tmp_path: Path):
        write_ranks(tmp_path / "ckpt", [memory_state("llama")])
        write_config(tmp_path / "base", "llama")
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", hf_model_config_path=tmp_path / "base")
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(memory_state("llama")))

    def test_a_directory_without_a_config(self, tmp_path: Path):
        write_ranks(tmp_path / "ckpt", [memory_state("llama")])
        message = refusal(
            ConfigError, nbmerge.merge, tmp_path / "ckpt", tmp_path / "out", hf_model_config_path=tmp_path
        )
        assert_says(message, "no config.json", str(tmp_path), "fix:")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", ["config.json is no JSON"]),
            (b"\xff\xfe{", ["config.json is no JSON"]),
            (b"[1]", ["is no JSON object"]),
            (b"{}", ["config.json"]),
            (b'{"model_type": "llama"}', None),
            (b'{"model_type": "no_such_type", "architectures": ["NoSuchModel"]}', ["no_such_type"]),
            (
                b'{"model_type": "llama", "architectures": ["LlamaForCausalLN"]}',
                ["LlamaForCausalLN", "LlamaForCausalLM"],
            ),
            (
                b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": "wide"}',
                ["no model can be made"],
            ),
            (b'{"model_type": "llama", "architectures": ["AdamW"]}', ["AdamW"]),
            (b'{"model_type": "llama", "architectures": "LlamaForCausalLM"}', None),
        ],
        ids=lambda value: value[:70].decode("latin1") if isinstance(value, bytes) else "",
    )
    def test_a_config_of_which_no_model_can_be_made(self, tmp_path: Path, content: bytes, words: list[str] | None):
        write_ranks(tmp_path / "ckpt", [memory_state("llama")])
        (tmp_path / "ckpt" / "huggingface").mkdir()
        (tmp_path / "ckpt" / "huggingface" / "config.json").write_bytes(content)
        with pytest.raises((ConfigError, PlanError)) as caught:
            nbmerge.merge(tmp_path / "ckpt", tmp_path / "out")
        if words:
            assert_says(str(caught.value), str(tmp_path / "ckpt" / "huggingface"), *words)

    def test_a_quantised_config_is_written_without_its_quantisation(self, tmp_path: Path):
        write_model_world(tmp_path / "ckpt", "llama")
        quantisation = {"quant_method": "fp8", "activation_scheme": "dynamic"}
        write_config(tmp_path / "ckpt" / "huggingface", "llama", quantization_config=quantisation)
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out")
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
        assert receipt_of(tmp_path / "out")["config_edits"]["quantization_config"] == {"from": quantisation, "to": None}


class TestDtypes:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
    def test_a_cast_equals_torchs_own(self, tmp_path: Path, dtype: str):
        state = memory_state("llama")
        write_model_world(tmp_path / "ckpt", "llama", 3, state=state)
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", dtype=dtype)
        want = {name: bits(value.to(getattr(torch, dtype))) for name, value in state.items()}
        assert_same(saved_bits(tmp_path / "out"), want)
        receipt = receipt_of(tmp_path / "out")
        assert len(receipt["casts"]) == len(state)
        assert receipt["casts"][0] == {"tensor": receipt["casts"][0]["tensor"], "from": "float32", "to": dtype}
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype

    def test_experts_are_cut_and_cast(self, tmp_path: Path, tiny_model_dir):
        write_model_world(tmp_path / "ckpt", "qwen3_moe", 2)
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", dtype="bf16")
        want = {name: bits(value.bfloat16()) for name, value in hub_state(tiny_model_dir("qwen3_moe")).items()}
        assert_same(saved_bits(tmp_path / "out"), want)

    def test_what_the_model_class_keeps_in_fp32_is_spared(self, tmp_path: Path):
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        state = memory_state("deepseek_v3")
        assert state[name].dtype == torch.float32
        nbmerge.merge(write_model_world(tmp_path / "ckpt", "deepseek_v3"), tmp_path / "out", dtype="bfloat16")
        got = saved_bits(tmp_path / "out")
        assert got[name] == bits(state[name])
        assert {key for key, value in got.items() if value[0] != "bfloat16"} == kept_in_fp32("deepseek_v3", got)

    @of_transformers_5
    def test_integers_are_spared(self, tmp_path: Path):
        state = memory_state("deepseek_v3")
        extra = {"model.layers.61.steps": torch.arange(3)}
        write_model_world(tmp_path / "ckpt", "deepseek_v3", state={**state, **extra})
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", dtype="bfloat16")
        assert saved_bits(tmp_path / "out")["model.layers.61.steps"] == bits(torch.arange(3))

    def test_without_the_option_every_tensor_keeps_its_own_dtype_whatever_the_config_says(self, tmp_path: Path):
        state = memory_state("llama", "bfloat16")
        state["model.norm.weight"] = state["model.norm.weight"].float()
        write_model_world(tmp_path / "ckpt", "llama", state=state)
        write_config(tmp_path / "ckpt" / "huggingface", "llama", dtype="float16")
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out")
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(state))
        assert receipt_of(tmp_path / "out")["casts"] == []
        assert receipt_of(tmp_path / "out")["config_edits"]["dtype"] == {"from": "float16", "to": "bfloat16"}
