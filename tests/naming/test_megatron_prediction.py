"""Layers that predict further tokens are written whole or not at all: no model class would miss a part of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.megatron_forms import padded, with_mtp
from tests.support.megatron_layers import Tensors
from tests.support.megatron_models import VOCABULARY, merge_megatron, refused_megatron, without
from tests.support.megatron_names import to_megatron
from tests.support.messages import assert_says
from tests.support.models import published_state, tiny_config
from tests.support.results import assert_same, bits_of_all, saved_bits

LAYER = "mtp.layers.1."


def model(family: str = "deepseek_v3", count: int = 2) -> tuple[Tensors, Tensors]:
    """What is published, and Megatron's tensors of it."""
    published, config = with_mtp(published_state(family), tiny_config(family), count)
    return published, padded(to_megatron(family, published, config), VOCABULARY)


def said(count: Any) -> dict[str, Any]:
    return {"num_nextn_predict_layers": count}


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
class TestPartsThatAreMissing:
    @pytest.mark.parametrize(("gone", "lacks"), [
        ("enorm.weight", "enorm.weight"), ("hnorm.weight", "hnorm.weight"), ("eh_proj.weight", "eh_proj.weight"),
        ("final_layernorm.weight", "shared_head.norm.weight"),
        ("transformer_layer.self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
        ("transformer_layer.mlp.router.weight", "mlp.gate.weight"),
        ("transformer_layer.mlp.router.expert_bias", "mlp.gate.e_score_correction_bias"),
        ("transformer_layer.mlp.shared_experts.linear_fc2.weight", "mlp.shared_experts.down_proj.weight"),
    ])  # fmt: skip
    def test_one_tensor(self, tmp_path: Path, family: str, gone: str, lacks: str):
        _, tensors = model(family)
        message = refused_megatron(tmp_path, without(tensors, LAYER + gone), family, said(2))
        assert_says(message, "1 problem", "layer 3 lacks 1 of its", lacks, "mtp.layers.1.* → model.layers.3.*",
                    "predicts further tokens", "fix: copy the checkpoint again")  # fmt: skip

    def test_a_projection_of_all_experts(self, tmp_path: Path, family: str):
        _, tensors = model(family)
        words = f"{LAYER}transformer_layer.mlp.experts.experts.linear_fc2"
        message = refused_megatron(tmp_path, without(tensors, words), family, said(2))
        assert_says(message, "layer 3 lacks 4 of its", "mlp.experts.0.down_proj.weight")

    def test_an_expert(self, tmp_path: Path, family: str):
        _, tensors = model(family)
        name = f"{LAYER}transformer_layer.mlp.experts.experts.linear_fc1.weight"
        message = refused_megatron(tmp_path, {**tensors, name: tensors[name][:3].clone()}, family, said(2))
        assert_says(message, "layer 3 lacks 2 of its", "mlp.experts.3.gate_proj.weight")

    def test_the_whole_mlp(self, tmp_path: Path, family: str):
        _, tensors = model(family)
        message = refused_megatron(tmp_path, without(tensors, f"{LAYER}transformer_layer.mlp."), family, said(2))
        assert_says(message, "1 problem", "layer 3 lacks 17 of its", "mlp.experts.0.gate_proj.weight")

    @pytest.mark.parametrize("number", [0, 1])
    def test_a_whole_layer(self, tmp_path: Path, family: str, number: int):
        _, tensors = model(family)
        message = refused_megatron(tmp_path, without(tensors, f"mtp.layers.{number}."), family, said(2))
        assert_says(message, f"of 2 layers that predict further tokens, the checkpoint lacks {number}",
                    "the model's config has num_nextn_predict_layers 2")  # fmt: skip


class TestWhatDoesNotFit:
    def test_a_shape(self, tmp_path: Path):
        _, tensors = model()
        for name, shape in (
            ("eh_proj.weight", [16, 16]),
            ("transformer_layer.self_attention.linear_proj.weight", [16, 8]),
        ):
            cut = {**tensors, LAYER + name: tensors[LAYER + name][:, : shape[1]].clone()}
            message = refused_megatron(tmp_path / name, cut, "deepseek_v3", said(2))
            assert_says(message, "1 problem", f"of layer 3 has shape {shape}", "in other layers it has [16, ", "fix:")

    def test_a_tensor_of_another_kind_of_layer(self, tmp_path: Path):
        _, tensors = model()
        more = {f"{LAYER}transformer_layer.mlp.linear_fc2.weight": torch.zeros(16, 24)}
        message = refused_megatron(tmp_path, tensors | more, "deepseek_v3", said(2))
        assert_says(message, "layer 3 has 1 tensor that no layer of its kind has: mlp.down_proj.weight")

    def test_more_layers_than_the_config_has(self, tmp_path: Path):
        _, tensors = model()
        message = refused_megatron(tmp_path, tensors, "deepseek_v3", said(1))
        assert_says(message, "the checkpoint has 2 layers that predict further tokens, and the model 1",
                    "set num_nextn_predict_layers to 2")  # fmt: skip

    def test_a_layer_whose_rule_does_not_apply_is_told_once(self, tmp_path: Path):
        _, tensors = model()
        name = f"{LAYER}transformer_layer.mlp.shared_experts.linear_fc1.weight"
        message = refused_megatron(tmp_path, {**tensors, name: tensors[name][:-1].clone()}, "deepseek_v3", said(2))
        assert_says(message, "1 problem", "no two halves")


class TestWhatIsAccepted:
    @pytest.mark.parametrize(("config", "count"), [({}, 1), (said(0), 2), (said(None), 2), (said(2), 2)])
    def test_layers_that_the_config_does_not_count(self, tmp_path: Path, config: dict[str, Any], count: int):
        published, tensors = model(count=count)
        merge_megatron(tmp_path, tensors, "deepseek_v3", config)
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(published))

    def test_a_run_that_trained_none_of_them(self, tmp_path: Path):
        published = published_state("deepseek_v3")
        tensors = padded(to_megatron("deepseek_v3", published, tiny_config("deepseek_v3")), VOCABULARY)
        merge_megatron(tmp_path, tensors, "deepseek_v3", said(1))
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(published))

    def test_a_dense_layer_after_layers_of_experts(self, tmp_path: Path):
        """The first decoder layer is dense: a further one may be of its kind."""
        published, config = with_mtp(published_state("deepseek_v3"), tiny_config("deepseek_v3"))
        dense = {n.replace("layers.0.", "layers.2."): t.clone() for n, t in published.items() if "layers.0.mlp." in n}
        published = without(published, "layers.2.mlp.") | dense
        merge_megatron(
            tmp_path, padded(to_megatron("deepseek_v3", published, config), VOCABULARY), "deepseek_v3", said(1)
        )
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(published))
