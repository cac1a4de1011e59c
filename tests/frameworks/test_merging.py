"""Every layout of FSDP, as torch itself writes it, merges to exactly the model that was sharded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import nbmerge
from nbmerge.demo import DemoCheckpoint, differences_on_disk, differences_when_loaded
from nbmerge.demo.proof import raw_tensors
from nbmerge.errors import PlanError, UnsupportedCheckpointError
from tests.frameworks.recipes import RECIPES, REFUSED, UNMERGED
from tests.support.models import HAS_CONVERSIONS

Checkpoints = Mapping[str, DemoCheckpoint]

TIED = [name for name, recipe in RECIPES.items() if recipe.tied]
EXPERTS = [name for name, recipe in RECIPES.items() if recipe.arch == "qwen3_moe"]
BFLOAT16_CAST = ["fsdp2", "tp_4x2_uneven", "fsdp1_no_mesh", "mixture_of_experts_fsdp2"]


def merged(demo: DemoCheckpoint, target: Path, **options: object) -> Path:
    nbmerge.merge(demo.path, target, progress=False, **options)  # type: ignore[arg-type]
    return target


@pytest.mark.parametrize("name", RECIPES)
def test_the_files_equal_those_of_the_unsharded_model(checkpoints: Checkpoints, name: str, tmp_path: Path) -> None:
    target = merged(checkpoints[name], tmp_path / "merged")
    assert differences_on_disk(target, checkpoints[name].reference) == []


@pytest.mark.parametrize("name", RECIPES)
def test_the_loaded_model_equals_the_unsharded_one(checkpoints: Checkpoints, name: str, tmp_path: Path) -> None:
    target = merged(checkpoints[name], tmp_path / "merged")
    assert differences_when_loaded(target, checkpoints[name].state) == []


@pytest.mark.parametrize("name", TIED)
def test_a_tied_embedding_is_written_once(checkpoints: Checkpoints, name: str, tmp_path: Path) -> None:
    report = nbmerge.merge(checkpoints[name].path, tmp_path / "merged", progress=False)
    written = raw_tensors(tmp_path / "merged")
    assert "lm_head.weight" not in written
    assert "model.embed_tokens.weight" in written
    assert [(tie.name, tie.kept) for tie in report.plan.ties] == [("lm_head.weight", "model.embed_tokens.weight")]


@pytest.mark.parametrize("name", EXPERTS)
def test_fused_experts_are_published_one_by_one(checkpoints: Checkpoints, name: str, tmp_path: Path) -> None:
    if HAS_CONVERSIONS:
        index = nbmerge.open_checkpoint(checkpoints[name].path, progress=False)
        assert index["model.layers.0.mlp.experts.gate_up_proj"].shape == (6, 20, 18)
    written = raw_tensors(merged(checkpoints[name], tmp_path / "merged"))
    for expert in range(6):
        assert written[f"model.layers.0.mlp.experts.{expert}.gate_proj.weight"][1] == (10, 18)
        assert written[f"model.layers.0.mlp.experts.{expert}.down_proj.weight"][1] == (18, 10)


@pytest.mark.parametrize("name", BFLOAT16_CAST)
def test_a_cast_rounds_as_torch_does(checkpoints: Checkpoints, name: str, tmp_path: Path) -> None:
    written = raw_tensors(merged(checkpoints[name], tmp_path / "merged", dtype="bfloat16"))
    published = raw_tensors(checkpoints[name].reference)
    assert written.keys() == published.keys()
    for tensor, (_, shape, data) in published.items():
        rounded = torch.frombuffer(bytearray(data), dtype=torch.float32).to(torch.bfloat16)
        assert written[tensor] == ("BF16", shape, rounded.view(torch.uint8).numpy().tobytes())


def test_small_files_hold_the_same_tensors_as_one_large_file(checkpoints: Checkpoints, tmp_path: Path) -> None:
    demo = checkpoints["tp_4x2_uneven"]
    target = merged(demo, tmp_path / "merged", max_shard_size="20KB")
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3
    assert {path.name for path in target.glob("*.safetensors")} == files
    assert differences_on_disk(target, demo.reference) == []
    assert differences_when_loaded(target, demo.state) == []


def test_the_tokenizer_and_the_generation_config_come_along(checkpoints: Checkpoints, tmp_path: Path) -> None:
    demo = checkpoints["fsdp2"]
    target = merged(demo, tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        assert (target / name).read_bytes() == (demo.path / "huggingface" / name).read_bytes()


@pytest.mark.parametrize("name", UNMERGED)
def test_buffers_that_the_class_does_not_know_stop_the_merge(
    checkpoints: Checkpoints, name: str, tmp_path: Path
) -> None:
    with pytest.raises(PlanError) as caught:
        merged(checkpoints[name], tmp_path / "merged")
    assert {"steps_seen", "tokens_seen"} == {problem.what.split()[3] for problem in caught.value.problems}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", REFUSED)
def test_flat_parameters_are_refused_with_the_setting_that_helps(
    checkpoints: Checkpoints, name: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="LOCAL_STATE_DICT") as caught:
        merged(checkpoints[name], tmp_path / "merged")
    assert "SHARDED_STATE_DICT" in str(caught.value)
    assert "flat" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
