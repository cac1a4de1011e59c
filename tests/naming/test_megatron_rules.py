"""What happens to Megatron's tensors on their way: cut, trimmed, packed, told apart by shape, and what is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nbmerge
from nbmerge.expressions import Expr
from nbmerge.memory import checkpoint_of
from nbmerge.naming.megatron.rules import QKV, Halves, Misfit, Packed, Sizes, VisionQKV
from tests.support import examples
from tests.support.megatron import megatron_pieces
from tests.support.megatron_forms import singleton, with_mtp
from tests.support.megatron_layers import Tensors
from tests.support.megatron_models import (
    VOCABULARY,
    megatron_state,
    merge_megatron,
    refused_megatron,
    without,
    write_megatron,
)
from tests.support.megatron_names import to_megatron
from tests.support.messages import assert_says
from tests.support.models import kept_in_fp32, memory_state, published_state, tied_copies, tiny_config
from tests.support.results import assert_same, bits, bits_of, bits_of_all, receipt_of, saved_bits

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def stored(directory: Path, tensor: torch.Tensor) -> Expr:
    """The tensor as it lies in a file."""
    return checkpoint_of({"x": tensor}, directory, directory).tensors["x"].expr


class TestQueryKeyAndValue:
    rule = QKV("q", "k", "v")

    @given(
        groups=st.integers(1, 4), each=st.integers(1, 4), dim=st.integers(1, 5), hidden=st.integers(1, 5),
        bias=st.booleans(), gated=st.booleans(), said=st.booleans(),
    )  # fmt: skip
    @examples(40)
    def test_are_taken_out_of_their_groups(
        self, tmp_path: Path, groups: int, each: int, dim: int, hidden: int, bias: bool, gated: bool, said: bool
    ):
        """Worked out by indices: row r of the published query is row r of the fused tensor's query rows."""
        heads, rest = groups * each, () if bias else (hidden,)
        q, gate, k, v = (torch.randn(count, dim, *rest) for count in (heads, heads, groups, groups))
        fused = []
        for group in range(groups):
            mine = range(group * each, (group + 1) * each)
            fused += [q[head] for head in mine] + [gate[head] for head in mine if gated] + [k[group], v[group]]
        query = torch.stack([q, gate], 1) if gated else q
        config: dict[str, Any] = {"num_attention_heads": heads, "head_dim": dim, "num_key_value_heads": groups}
        if each == 1 and not said:
            del config["num_key_value_heads"]  # as many as heads
        if not said:
            config |= {"head_dim": None, "hidden_size": heads * dim}
        want = [tensor.reshape(-1, *rest) for tensor in (query, k, v)]
        sizes = Sizes(config, {"q": tuple(want[0].shape)})
        made = list(self.rule.apply(stored(tmp_path, torch.cat(fused)), ("q", "k", "v"), sizes, None))
        assert [each.name for each in made] == ["q", "k", "v"]
        assert [bits_of(each.expr) for each in made] == [bits(tensor) for tensor in want]

    def test_that_are_too_many_rows_do_not_fit(self, tmp_path: Path):
        sizes = Sizes({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 3}, {})
        with pytest.raises(Misfit, match="has 25 rows; 2 query groups of 2 query, one key and one value head of 3"):
            list(self.rule.apply(stored(tmp_path, torch.zeros(25, 2)), ("q", "k", "v"), sizes, None))

    def test_need_the_number_of_heads(self, tmp_path: Path):
        with pytest.raises(LookupError, match=r"config\.json has no num_attention_heads"):
            list(self.rule.apply(stored(tmp_path, torch.zeros(24, 2)), ("q", "k", "v"), Sizes({}, {}), None))

    @given(heads=st.integers(1, 4), dim=st.integers(1, 5), bias=st.booleans())
    @examples(15)
    def test_of_a_vision_tower_are_sorted_by_kind(self, tmp_path: Path, heads: int, dim: int, bias: bool):
        parts = torch.randn(3, heads, dim, *(() if bias else (2,)))
        by_head = torch.cat([parts[kind, head] for head in range(heads) for kind in range(3)])
        sizes = Sizes({"vision_config": {"num_heads": heads}}, {})
        (made,) = VisionQKV("qkv").apply(stored(tmp_path, by_head), ("qkv",), sizes, None)
        assert bits_of(made.expr) == bits(parts.reshape(by_head.shape))

    def test_of_a_vision_tower_need_rows_for_every_head(self, tmp_path: Path):
        sizes = Sizes({"vision_config": {"num_heads": 2}}, {})
        with pytest.raises(Misfit, match="has 13 rows, which are no query, key and value of 2 heads"):
            list(VisionQKV("qkv").apply(stored(tmp_path, torch.zeros(13, 2)), ("qkv",), sizes, None))

    def test_sizes_of_the_text_part_come_first(self):
        sizes = Sizes({"num_attention_heads": 9, "text_config": {"num_attention_heads": 4}, "vocab_size": 7}, {})
        assert (sizes.get("num_attention_heads"), sizes.get("vocab_size"), sizes.get("absent")) == (4, 7, None)


class TestGateAndUp:
    def test_are_the_halves_of_the_whole_tensor(self, tmp_path: Path):
        gate, up = torch.randn(5, 3), torch.randn(5, 3)
        made = list(Halves("g", "u").apply(stored(tmp_path, torch.cat([gate, up])), ("g", "u"), Sizes({}, {}), None))
        assert [bits_of(each.expr) for each in made] == [bits(gate), bits(up)]

    @given(width=st.integers(1, 5), hidden=st.integers(1, 4), bias=st.booleans())
    @examples(15)
    def test_are_published_in_turns_and_transposed_by_gpt_oss(
        self, tmp_path: Path, width: int, hidden: int, bias: bool
    ):
        gate, up = (torch.randn(width, *(() if bias else (hidden,))) for _ in range(2))
        rule = Packed("x", transposed=True, interleaved=True)
        (made,) = rule.apply(stored(tmp_path, torch.cat([gate, up])), ("x",), Sizes({}, {}), 3)
        want = torch.empty(2 * width) if bias else torch.empty(hidden, 2 * width)
        want[..., 0::2], want[..., 1::2] = gate.T if not bias else gate, up.T if not bias else up
        assert (bits_of(made.expr), made.place) == (bits(want), 3)

    def test_of_odd_rows_are_refused(self, tmp_path: Path):
        state = megatron_state("llama")
        state["decoder.layers.1.mlp.linear_fc1.weight"] = torch.zeros(47, 16)
        message = refused_megatron(tmp_path, state, "llama")
        assert_says(message, "decoder.layers.1.mlp.linear_fc1.weight has 47 rows, which are no two halves", "fix:")
        assert_says(message, "1 problem")

    def test_of_odd_rows_in_packed_experts_are_refused(self, tmp_path: Path):
        state = megatron_state("gpt_oss")
        name = "decoder.layers.0.mlp.experts.experts.linear_fc1.weight"
        state[name] = state[name][:, :-1].contiguous()
        assert_says(refused_megatron(tmp_path, state, "gpt_oss"), name, "has 47 rows, which are no two halves", "fix:")

    @pytest.mark.parametrize("hub", [True, False], ids=["hub", "transformers 5"])
    def test_of_packed_experts_are_turned_as_the_class_has_them(self, tmp_path: Path, hub: bool):
        """transformers 4 and the hub have [E, H, 2F] for Qwen3-VL-MoE, transformers 5 has [E, 2F, H]."""
        tensor = torch.randn(6, 5)
        want = tensor.T if hub else tensor
        sizes = Sizes({}, {"x": (4, *want.shape)})
        (made,) = Packed("x", transposed=None).apply(stored(tmp_path, tensor), ("x",), sizes, 0)
        assert bits_of(made.expr) == bits(want)


class TestVocabulary:
    def test_rows_of_padding_are_cut_and_recorded(self, tmp_path: Path):
        plan = merge_megatron(tmp_path, megatron_state("llama"), "llama").plan
        want = {"model.embed_tokens.weight": EMBEDDING, "lm_head.weight": OUTPUT}
        assert {trim.name: trim.source for trim in plan.trims} == want
        assert {(trim.rows, trim.kept) for trim in plan.trims} == {(VOCABULARY, 37)}
        recorded = {trim["tensor"]: trim for trim in receipt_of(tmp_path / "out")["trims"]}
        for name, source in want.items():
            assert recorded[name] == {"tensor": name, "source": source, "rows": VOCABULARY, "kept": 37}

    def test_without_padding_is_left_alone(self, tmp_path: Path):
        state = to_megatron("llama", published_state("llama"), tiny_config("llama"))
        assert merge_megatron(tmp_path, state, "llama").plan.trims == ()
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(published_state("llama")))

    def test_smaller_than_the_configs_is_refused(self, tmp_path: Path):
        message = refused_megatron(tmp_path, megatron_state("llama"), "llama", changes={"vocab_size": VOCABULARY + 1})
        assert_says(message, "model.embed_tokens.weight has shape [40, 16]", "LlamaForCausalLM has [41, 16]",
                    EMBEDDING, "fix: pass the config that training used")  # fmt: skip

    def test_that_is_another_models_is_no_padding(self, tmp_path: Path):
        state = megatron_state("qwen2_tied")
        state[EMBEDDING] = torch.zeros(20_000, 16)
        message = refused_megatron(tmp_path, state, "qwen2_tied")
        assert_says(message, f"{EMBEDDING} has 20,000 rows", "of 37 tokens, 19,963 rows are too many for padding",
                    "fix: pass the config")  # fmt: skip


class TestTiedEmbeddings:
    """The last of several pipeline stages has a copy of the table, with padding of its own."""

    def copied(self) -> Tensors:
        state = megatron_state("qwen2_tied")
        state[OUTPUT] = state[EMBEDDING].clone()
        return state

    def assert_is_the_model(self, directory: Path) -> None:
        assert_same(saved_bits(directory / "out"), bits_of_all(published_state("qwen2_tied")))

    def test_without_a_copy(self, tmp_path: Path):
        merge_megatron(tmp_path, megatron_state("qwen2_tied"), "qwen2_tied")
        self.assert_is_the_model(tmp_path)

    def test_with_a_copy(self, tmp_path: Path):
        report = merge_megatron(tmp_path, self.copied(), "qwen2_tied")
        self.assert_is_the_model(tmp_path)
        assert [(tie.name, tie.kept) for tie in report.plan.ties] == [("lm_head.weight", "model.embed_tokens.weight")]
        assert [trim.name for trim in report.plan.trims] == ["model.embed_tokens.weight"]
        assert "lm_head.weight" in receipt_of(tmp_path / "out")["compared"]

    def test_with_a_copy_whose_padding_differs(self, tmp_path: Path):
        state = self.copied()
        state[OUTPUT][-1] += 1
        merge_megatron(tmp_path, state, "qwen2_tied")
        self.assert_is_the_model(tmp_path)

    def test_with_the_copy_alone(self, tmp_path: Path):
        report = merge_megatron(tmp_path, without(self.copied(), EMBEDDING), "qwen2_tied")
        self.assert_is_the_model(tmp_path)
        assert [trim.source for trim in report.plan.trims] == [OUTPUT]

    def test_with_a_copy_that_differs_are_refused(self, tmp_path: Path):
        state = self.copied()
        state[OUTPUT][3, 2] += 1
        message = refused_megatron(tmp_path, state, "qwen2_tied")
        assert_says(message, "lm_head.weight is tied to model.embed_tokens.weight, and holds other values",
                    "first at [3, 2]", "fix: set tie_word_embeddings to false")  # fmt: skip

    def test_of_a_model_that_sees(self, tmp_path: Path):
        state = megatron_state("qwen3_vl")
        state[f"language_model.{OUTPUT}"] = state[f"language_model.{EMBEDDING}"].clone()
        merge_megatron(tmp_path, state, "qwen3_vl")
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(published_state("qwen3_vl")))

    def test_under_an_untied_config_need_a_word(self, tmp_path: Path):
        message = refused_megatron(tmp_path, megatron_state("qwen2_tied"), "qwen2")
        assert_says(message, "no tensor of the checkpoint fills lm_head.weight", OUTPUT, "fix:", "--tie_word_embedding")
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", tie_word_embedding=True)
        assert sorted(saved_bits(tmp_path / "out")) == sorted(published_state("qwen2_tied"))


class TestValueHeads:
    @pytest.mark.parametrize("config_of", ["qwen2_value", "qwen2"], ids=["its own config", "is_value_model"])
    def test_are_told_by_their_shape(self, tmp_path: Path, config_of: str):
        options = {} if config_of == "qwen2_value" else {"is_value_model": True}
        report = merge_megatron(tmp_path, megatron_state("qwen2_value"), config_of, **options)
        want = published_state("qwen2_value") | {"score.bias": torch.zeros(1)}
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(want))
        assert [(fill.name, fill.origin) for fill in report.plan.fills] == [("score.bias", "zeros")]
        (fill,) = receipt_of(tmp_path / "out")["fills"]
        assert (fill["tensor"], fill["from"]) == ("score.bias", "zeros")
        assert_says(fill["reason"], "has no bias")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["architectures"] == ["Qwen2ForTokenClassification"]

    def test_keep_a_bias_that_they_have(self, tmp_path: Path):
        state = megatron_state("qwen2_value") | {"output_layer.bias": torch.tensor([0.25])}
        assert merge_megatron(tmp_path, state, "qwen2_value").plan.fills == ()
        assert saved_bits(tmp_path / "out")["score.bias"] == bits(torch.tensor([0.25]))

    def test_have_a_bias_of_their_own_dtype(self, tmp_path: Path):
        merge_megatron(tmp_path, megatron_state("qwen2_value", dtype="bfloat16"), "qwen2_value")
        assert {value[0] for value in saved_bits(tmp_path / "out").values()} == {"bfloat16"}

    def test_on_every_tensor_parallel_rank(self, tmp_path: Path):
        from nbmerge.demo.megatron.pieces import ParallelSizes

        pieces = megatron_pieces(ParallelSizes(layers=2, tp=2, pp=2))
        write_megatron(tmp_path / "ckpt", megatron_state("qwen2_value"), "qwen2_value", pieces=pieces)
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out")
        assert saved_bits(tmp_path / "out")["score.weight"] == bits(published_state("qwen2_value")["score.weight"])

    def test_of_several_labels(self, tmp_path: Path):
        """A classifier's head, which has as many rows as its class has labels."""
        state, head = megatron_state("qwen2_value"), torch.randn(3, 16)
        labels = {str(n): f"label {n}" for n in range(3)}
        changes = {"id2label": labels, "label2id": {label: int(n) for n, label in labels.items()}, "num_labels": 3}
        merge_megatron(tmp_path, state | {OUTPUT: head}, "qwen2_value", changes)
        assert saved_bits(tmp_path / "out")["score.weight"] == bits(head)

    @pytest.mark.parametrize("config_of", ["qwen2", "qwen2_tied"])
    def test_under_the_config_of_a_language_model_are_refused(self, tmp_path: Path, config_of: str):
        message = refused_megatron(tmp_path, megatron_state("qwen2_value"), config_of)
        assert_says(message, "1 problem", "the checkpoint is a critic's", "one row, and Qwen2ForCausalLM", OUTPUT,
                    "fix: pass --is_value_model")  # fmt: skip

    @pytest.mark.parametrize(
        ("model", "words"),
        [("qwen2", "its output layer has 40 rows"), ("qwen2_tied", "it has no output layer at all")],
    )
    @pytest.mark.parametrize("config_of", ["qwen2_value", "qwen2"], ids=["a critic's config", "is_value_model"])
    def test_of_which_a_language_model_has_none(self, tmp_path: Path, model: str, words: str, config_of: str):
        options = {} if config_of == "qwen2_value" else {"is_value_model": True}
        message = refused_megatron(tmp_path, megatron_state(model), config_of, **options)
        assert_says(message, "1 problem", "Qwen2ForTokenClassification predicts values", words,
                    "fix: leave --is_value_model out")  # fmt: skip


class TestLatentAttention:
    """DeepSeek's, whose queries are projected through a low rank or directly."""

    def test_with_a_low_rank_under_a_config_without_one_is_refused(self, tmp_path: Path):
        message = refused_megatron(tmp_path, megatron_state("deepseek_v3"), "deepseek_v3_direct")
        assert_says(message, "no tensor of the checkpoint fills model.layers.0.self_attn.q_proj.weight and 1 more",
                    "self_attention.linear_q_down_proj.weight becomes model.layers.0.self_attn.q_a_proj.weight",
                    "fix:")  # fmt: skip

    def test_without_a_low_rank_under_a_config_with_one_is_refused(self, tmp_path: Path):
        message = refused_megatron(tmp_path, megatron_state("deepseek_v3_direct", "deepseek_v3"), "deepseek_v3")
        assert_says(message, "fills model.layers.0.self_attn.q_a_proj.weight", "linear_q_down_proj.weight",
                    "linear_q_proj.weight becomes model.layers.0.self_attn.q_proj.weight", "fix:")  # fmt: skip

    def test_of_kimi_has_deepseeks_table(self):
        from nbmerge.naming.megatron.families import family_of

        assert family_of("kimi_k2") is family_of("deepseek_v3") is not None


class TestTheRoutersBias:
    @pytest.mark.parametrize("model", ["deepseek_v3", "glm4_moe"])
    @pytest.mark.parametrize("dtype", [None, "bfloat16"])
    def test_stays_fp32_beside_weights_of_16_bits(self, tmp_path: Path, model: str, dtype: str | None):
        state = megatron_state(model, dtype="bfloat16" if dtype is None else "float32")
        bias = "decoder.layers.1.mlp.router.expert_bias"
        state[bias] = torch.randn(4) / 3  # no 16-bit numbers
        merge_megatron(tmp_path, state, model, dtype=dtype)
        got = saved_bits(tmp_path / "out")
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        assert got[name] == bits(state[bias])
        kept = {name} if dtype is None else kept_in_fp32(model, got)
        assert {key for key, value in got.items() if value[0] != "bfloat16"} == kept

    def test_of_a_layer_of_multi_token_prediction_stays_fp32_too(self, tmp_path: Path):
        published, config = with_mtp(published_state("deepseek_v3"), tiny_config("deepseek_v3"))
        state = to_megatron("deepseek_v3", published, config)
        merge_megatron(tmp_path, state, "deepseek_v3", dtype="bfloat16")
        name = "model.layers.2.mlp.gate.e_score_correction_bias"
        assert saved_bits(tmp_path / "out")[name] == bits(published[name])


class TestMultiTokenPrediction:
    @pytest.mark.parametrize(("model", "count"), [("deepseek_v3", 1), ("deepseek_v3", 2), ("glm4_moe", 1)])
    @pytest.mark.parametrize("module", ["transformer_layer", "mtp_model_layer"])
    def test_layers_are_written_listed_and_not_loaded(self, tmp_path: Path, model: str, count: int, module: str):
        published, config = with_mtp(published_state(model), tiny_config(model), count)
        state = {
            name.replace(".transformer_layer.", f".{module}."): tensor
            for name, tensor in to_megatron(model, published, config).items()
        }
        report = merge_megatron(tmp_path, state, model, changes={"num_nextn_predict_layers": count})
        beyond = {name for name in published if name not in published_state(model)}
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(published))
        assert set(report.plan.unloaded) == beyond == set(receipt_of(tmp_path / "out")["unloaded"])

    def test_layers_have_copies_of_the_trimmed_tables(self, tmp_path: Path):
        published, config = with_mtp(published_state("deepseek_v3"), tiny_config("deepseek_v3"))
        state = to_megatron("deepseek_v3", published, config)
        state |= {name: torch.cat([state[name], torch.randn(3, 16)]) for name in (EMBEDDING, OUTPUT)}
        merge_megatron(tmp_path, state, "deepseek_v3", changes={"num_nextn_predict_layers": 1})
        got = saved_bits(tmp_path / "out")
        assert got["model.layers.2.embed_tokens.weight"] == got["model.embed_tokens.weight"]
        assert got["model.layers.2.shared_head.head.weight"] == got["lm_head.weight"]

    def test_layers_keep_their_published_names_in_the_other_dialect(self, tmp_path: Path):
        published, config = with_mtp(published_state("glm4_moe"), tiny_config("glm4_moe"))
        merge_megatron(tmp_path, to_megatron("glm4_moe", published, config), "glm4_moe", dialect="transformers")
        beyond = {name: value for name, value in published.items() if name not in published_state("glm4_moe")}
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(memory_state("glm4_moe") | beyond))


MODELS = (
    "llama", "qwen2_tied", "qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3", "gemma2",
    "gemma3_vision", "glm4", "glm4_moe", "gpt_oss", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe",
)  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_the_other_dialect_is_the_models_state_in_memory(tmp_path: Path, model: str):
    """Experts packed, names without the hub's history; tied copies are left out there too."""
    state = singleton(megatron_state(model), plain=("vision_model.",))
    merge_megatron(tmp_path, state, model, dialect="transformers")
    left_out = tied_copies(model)
    want = {name: tensor for name, tensor in memory_state(model).items() if name not in left_out}
    assert_same(saved_bits(tmp_path / "out"), bits_of_all(want))
