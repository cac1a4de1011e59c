"""The Megatron family that CONTRIBUTING.md shows works as it is printed there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nbmerge.expressions import Expr
from nbmerge.memory import checkpoint_of
from nbmerge.naming.megatron.canonical import canonical
from nbmerge.naming.megatron.families import FAMILIES
from nbmerge.naming.megatron.family import Family
from nbmerge.naming.megatron.rename import Renamed, apply
from nbmerge.naming.megatron.rules import Sizes
from tests.support.guide import example
from tests.support.results import bits, bits_of

_CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2, "hidden_size": 6}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_readme_says_on_what_each_family_was_proven(family: Family) -> None:
    lines = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").splitlines()
    for model_type in family.model_types:
        (proof,) = (
            line.split("|")[2] for line in lines if line.startswith("|") and f"`{model_type}`" in line.split("|")[1]
        )
        assert ("the documented form only" in proof) != family.proven


def test_the_family_of_the_guide_names_every_tensor(tmp_path) -> None:
    family = example("NEWMODEL")
    assert isinstance(family, Family)
    latent, qkv = torch.randn(2, 5, 3), torch.randn(2, 2 * 4 * 2, 6)
    tensors = {
        "module.decoder.layers.mlp.latent_proj.weight": latent,
        "module.decoder.layers.self_attention.linear_qkv.weight": qkv,
        "module.decoder.layers.mlp.shared_experts.linear_fc1.weight": torch.randn(2, 8, 6),
        "module.decoder.layers.mlp.experts.experts.linear_fc2.weight": torch.randn(2, 3, 6, 4),
    }
    index = checkpoint_of(tensors, tmp_path, tmp_path)
    work = Renamed()
    exprs: dict[str, Expr] = {name: tensor.expr for name, tensor in index.tensors.items()}
    apply(family, canonical(exprs), Sizes(_CONFIG, {}), work)
    assert work.problems == []
    assert set(work.tensors) == {
        f"model.layers.{layer}.{name}.weight"
        for layer in range(2)
        for name in ("mlp.latent_proj", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj",
                     "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                     *(f"mlp.experts.{e}.down_proj" for e in range(3)))
    }  # fmt: skip
    assert bits_of(work.tensors["model.layers.1.mlp.latent_proj.weight"]) == bits(latent[1].T)
