"""Forms of single families: norms after attention and MLP in a HybridModel, packed experts that are square."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nbmerge.dtypes import BY_NAME
from nbmerge.expressions import Stored
from nbmerge.geometry import contiguous_strides
from nbmerge.naming.megatron.rules import Packed, Sizes
from tests.support.megatron_forms import hybrid
from tests.support.megatron_models import megatron_state, merge_megatron, refused_megatron
from tests.support.messages import assert_says
from tests.support.models import published_state
from tests.support.results import assert_same, bits_of_all, saved_bits


class TestHybridModels:
    @pytest.mark.parametrize(("family", "form"), [("glm4", "bridge"), ("gemma2", "mbridge"), ("gemma3", "mbridge"),
                                                  ("gemma2", "bridge")])  # fmt: skip
    def test_with_norms_after_attention_and_mlp(self, tmp_path: Path, family: str, form: str):
        merge_megatron(tmp_path, hybrid(megatron_state(family, form=form)), family)
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(published_state(family)))

    def test_a_norm_of_the_other_half_is_refused(self, tmp_path: Path):
        tensors = hybrid(megatron_state("glm4"))
        tensors["decoder.layers.0.post_mlp_layernorm.weight"] = torch.zeros(16)
        assert_says(refused_megatron(tmp_path, tensors, "glm4"), "do not alternate between attention and MLP")


class TestSquareExperts:
    """[n, n] is turned where the projection beside it is."""

    @pytest.mark.parametrize("turned", [False, True])
    @pytest.mark.parametrize(("rule", "beside", "square"), [
        (Packed("experts.up", None, beside="down"), "experts.down", (8, 4)),
        (Packed("experts.down", None, beside="up"), "experts.up", (16, 8)),
    ], ids=["up", "down"])  # fmt: skip
    def test_are_turned_as_the_other_projection_is(
        self, rule: Packed, beside: str, square: tuple[int, int], turned: bool
    ):
        expr = Stored("f", 0, (8, 8), contiguous_strides((8, 8)), BY_NAME["float32"])
        shape = square[::-1] if turned else square
        sizes = Sizes({}, {rule.to: (3, 8, 8), beside: (3, *shape)})
        (made,) = rule.apply(expr, (rule.to,), sizes, 0)
        assert (made.expr == expr) is not turned

    def test_stay_as_they_are_where_nothing_tells(self):
        expr = Stored("f", 0, (8, 8), contiguous_strides((8, 8)), BY_NAME["float32"])
        rule = Packed("experts.up", None)
        (made,) = rule.apply(expr, ("experts.up",), Sizes({}, {"experts.up": (3, 8, 8)}), 0)
        assert made.expr == expr
