"""A vision tower that another transformers named is the same tower."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

import nbmerge
from nbmerge.naming.towers import respelled
from tests.support.adapters import adapted, save_adapter_config, write_world
from tests.support.models import HAS_CONVERSIONS, memory_state, published_state, write_config, write_model_world
from tests.support.results import assert_same, bits_of_all, saved_bits

VISION = "gemma3_vision"
BARE, LONG = "vision_tower.", "vision_tower.vision_model."
PATTERNS = ("alpha_pattern", "rank_pattern")
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


def saved_model(directory: Path, state: Mapping[str, torch.Tensor]) -> Path:
    write_config(directory, VISION)
    save_file(dict(state), directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("state", [memory_state, published_state])
@pytest.mark.parametrize("is_turned", [False, True])
def test_a_comparison_pairs_the_towers_of_both_versions(tmp_path: Path, state, is_turned: bool):
    a = published_state(VISION)
    b = {name: tensor.clone() for name, tensor in of_the_other_version(state(VISION)).items()}
    name = next(name for name in b if name.endswith("vision_model.post_layernorm.bias") or "tower.post_" in name)
    b[name] += 1
    b.pop("lm_head.weight", None)
    sides = [saved_model(tmp_path / "a", a), saved_model(tmp_path / "b", b)]
    diff = nbmerge.diff(*(reversed(sides) if is_turned else sides))
    assert len(diff.tensors) == len(a) and not diff.unmatched and not diff.mismatched
    assert len(diff.changed) == 1
    assert sum("of a vision tower as another transformers spells them" in note for note in diff.notes) == 1


def test_a_comparison_without_any_config_pairs_them_too(tmp_path: Path):
    for side, state in (("a", published_state(VISION)), ("b", of_the_other_version(published_state(VISION)))):
        (tmp_path / side).mkdir()
        save_file(state, tmp_path / side / "model.safetensors")
    diff = nbmerge.diff(tmp_path / "a", tmp_path / "b")
    assert diff.is_empty and len(diff.tensors) == len(published_state(VISION))


class TestAdapters:
    """LoRA on a vision tower that trained under the names of another version."""

    MADE: ClassVar[dict[str, Any]] = {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["post_layernorm"]}

    @pytest.mark.parametrize("lora", ["fold", "split", "adapter"])
    def test_is_merged_as_under_its_own_names(self, tmp_path: Path, lora: str):
        made = adapted(VISION, **self.MADE)
        outs = []
        for name, state in (("own", made.state()), ("other", of_the_other_version(made.state()))):
            save_adapter_config(made, write_world(tmp_path / name, made, state))
            nbmerge.merge(tmp_path / name, tmp_path / f"{name}_out", lora=lora)
            outs.append(tmp_path / f"{name}_out")
        if lora != "adapter":
            assert_same(saved_bits(outs[1]), made.folded() if lora == "fold" else made.base())
        if lora != "fold":
            own, other = (out / "lora_adapter" for out in outs)
            assert_same(saved_bits(other), made.adapter())
            assert (other / "adapter_config.json").read_text() == (own / "adapter_config.json").read_text()

    def test_alone_is_folded_into_a_base_model_of_this_version(self, tmp_path: Path):
        made = adapted(VISION, **self.MADE)
        save_adapter_config(made, write_world(tmp_path / "ckpt", made, of_the_other_version(made.adapter_state())))
        base = saved_model(tmp_path / "base", published_state(VISION))
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", lora="fold", base_model=base)
        assert_same(saved_bits(tmp_path / "out"), made.folded())

    def test_keeps_the_scale_that_a_pattern_of_its_own_names_gives_a_layer(self, tmp_path: Path):
        layer = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj".replace(LONG, HERE)
        made = adapted(VISION, target_modules=["q_proj"], alpha_pattern={layer: 40}, rank_pattern={layer: 2})
        ckpt = write_world(tmp_path / "ckpt", made, of_the_other_version(made.state()))
        config = json.loads((save_adapter_config(made, ckpt) / "adapter_config.json").read_text())
        patterns = {key: {layer.replace(HERE, ELSEWHERE): config[key][layer]} for key in PATTERNS}
        (ckpt / "adapter_config.json").write_text(json.dumps({**config, **patterns}))
        nbmerge.merge(ckpt, tmp_path / "folded", lora="fold")
        assert_same(saved_bits(tmp_path / "folded"), made.folded())
        nbmerge.merge(ckpt, tmp_path / "split", lora="split")
        written = json.loads((tmp_path / "split" / "lora_adapter" / "adapter_config.json").read_text())
        assert [{name.endswith(layer) for name in written[key]} for key in PATTERNS] == [{True}, {True}]
        assert [list(written[key].values()) for key in PATTERNS] == [[40], [2]]


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
