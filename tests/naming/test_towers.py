"""A vision tower that another transformers named is the same tower."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nbmerge
from nbmerge.naming.towers import respelled
from tests.support.models import HAS_CONVERSIONS, memory_state, published_state, write_config, write_model_world
from tests.support.results import assert_same, bits_of_all, saved_bits

VISION = "gemma3_vision"
BARE, LONG = "vision_tower.", "vision_tower.vision_model."
HERE, ELSEWHERE = (BARE, LONG) if HAS_CONVERSIONS else (LONG, BARE)


def of_the_other_version(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as transformers 4 names them under 5, and the other way round."""
    return {name.replace(HERE, ELSEWHERE): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("state", [memory_state, published_state])
def test_shards_of_the_other_version_are_merged(tmp_path: Path, state):
    write_model_world(tmp_path / "ckpt", VISION, state=of_the_other_version(state(VISION)))
    nbmerge.merge(tmp_path / "ckpt", tmp_path / "out")
    assert_same(saved_bits(tmp_path / "out"), bits_of_all(published_state(VISION)))


def test_a_base_model_of_the_other_version_fills_the_tower(tmp_path: Path):
    language = {name: tensor for name, tensor in memory_state(VISION).items() if HERE not in name}
    write_model_world(tmp_path / "ckpt", VISION, state=language)
    base = write_config(tmp_path / "base", VISION)
    save_file(of_the_other_version(published_state(VISION)), base / "model.safetensors")
    plan = nbmerge.plan_merge(tmp_path / "ckpt", base_model=base)
    assert plan.problems == ()
    assert {fill.name for fill in plan.fills} == {name for name in published_state(VISION) if HERE in name}


class TestRespelled:
    @pytest.mark.parametrize(
        ("known", "name", "expected"),
        [
            (["tower.norm"], "tower.vision_model.norm", "tower.norm"),
            (["tower.vision_model.norm"], "tower.norm", "tower.vision_model.norm"),
            (["vision_model.norm"], "vision_model.norm", "vision_model.norm"),
            (["tower.norm", "tower.vision_model.norm"], "tower.norm", "tower.norm"),
            (["tower.norm"], "tower.vision_model.bias", "tower.vision_model.bias"),
            (["a.norm", "a.vision_model.norm"], "vision_model.a.norm", "vision_model.a.norm"),
        ],
    )
    def test_a_name_becomes_the_only_one_that_the_model_has_for_it(self, known: list[str], name: str, expected: str):
        assert respelled({name: 1}, known) == {expected: 1}

    def test_two_tensors_never_become_one(self):
        assert respelled({"t.vision_model.norm": 1, "t.norm": 2}, ["t.norm"]) == {"t.vision_model.norm": 1, "t.norm": 2}
        twice = {"vision_model.t.norm": 1, "t.vision_model.norm": 2}
        assert respelled(twice, ["t.norm"]) == {"t.norm": 1, "t.vision_model.norm": 2}
