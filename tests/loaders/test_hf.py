"""Hugging Face directories as sources: re-sharded, cast, converted, and refused in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nbmerge
from nbmerge import AmbiguousCheckpointError, CorruptFileError, IncompleteCheckpointError, TargetError, open_checkpoint
from nbmerge.errors import UnsupportedCheckpointError
from tests.support.messages import assert_says, refusal
from tests.support.models import memory_state, published_state, tiny_model, write_config
from tests.support.results import assert_same, bits_of, bits_of_all, saved_bits


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model in several safetensors files with an index."""
    tiny_model("llama").save_pretrained(tmp_path / "model", max_shard_size="5KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    return tmp_path / "model"


def save_bin(directory: Path, state: object, name: str = "pytorch_model.bin") -> Path:
    write_config(directory, "llama")
    torch.save(state, directory / name)
    return directory


@pytest.mark.parametrize("size", ["1KB", "5KB", "1MB"])
def test_every_tensor_is_bit_equal_whatever_the_shard_size(sharded: Path, out: Path, size: str):
    nbmerge.merge(sharded, out, max_shard_size=size)
    assert_same(saved_bits(out), bits_of_all(published_state("llama")))


def test_a_bin_file_becomes_safetensors(tmp_path: Path, out: Path):
    nbmerge.merge(save_bin(tmp_path / "m", memory_state("llama")), out)
    assert_same(saved_bits(out), bits_of_all(published_state("llama")))


@pytest.mark.parametrize("root", ["model", "module", "state_dict"])
def test_a_state_dict_under_a_trainers_key(tmp_path: Path, root: str):
    save_bin(tmp_path, {root: {"w": torch.arange(6.0)}, "step": 3}, "pytorch_model_fsdp.bin")
    opened = open_checkpoint(tmp_path)
    assert bits_of(opened["w"].expr) == bits_of_all({"w": torch.arange(6.0)})["w"]
    assert root in " ".join(opened.notes)


def test_views_of_larger_storages_and_turned_tensors(tmp_path: Path):
    base = torch.arange(60.0)
    state = {"view": base[7:19].view(3, 4), "turned": base.view(6, 10).t()}
    opened = open_checkpoint(save_bin(tmp_path, state))
    assert {name: bits_of(opened[name].expr) for name in state} == bits_of_all(state)


def test_safetensors_are_taken_and_the_rest_is_told(sharded: Path):
    torch.save({"other": torch.ones(1)}, sharded / "pytorch_model.bin")
    save_file({"tok": torch.ones(1)}, sharded / "consolidated.safetensors")
    opened = open_checkpoint(sharded)
    assert "other" not in opened
    assert "tok" not in opened
    assert_says(" ".join(opened.notes), "left alone", "pytorch_model.bin", "consolidated.safetensors")


def test_missing_shards_are_all_named(sharded: Path):
    gone = sorted(sharded.glob("model-*.safetensors"))[1:3]
    for path in gone:
        path.unlink()
    assert_says(refusal(IncompleteCheckpointError, open_checkpoint, sharded), *(path.name for path in gone), "fix:")


def rewrite_index(directory: Path, change) -> None:
    path = directory / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/passwd", ""])
def test_an_index_that_names_a_file_elsewhere(sharded: Path, file: str):
    rewrite_index(sharded, lambda said: said.update({"model.norm.weight": file}))
    assert_says(refusal(CorruptFileError, open_checkpoint, sharded), "outside its directory", "fix:")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(sharded: Path, content: str):
    (sharded / "model.safetensors.index.json").write_text(content)
    assert_says(refusal(CorruptFileError, open_checkpoint, sharded), "the index cannot be read", "index.json")


def test_a_tensor_that_is_not_where_the_index_says(sharded: Path):
    rewrite_index(sharded, lambda said: said.update(ghost=said["model.norm.weight"]))
    assert_says(refusal(IncompleteCheckpointError, open_checkpoint, sharded), "ghost is not in", "no file")


def test_a_tensor_in_no_index_is_taken_and_told(sharded: Path):
    rewrite_index(sharded, lambda said: said.pop("model.norm.weight"))
    opened = open_checkpoint(sharded)
    assert "model.norm.weight" in opened
    assert_says(" ".join(opened.notes), "1 tensor", "does not say", "model.norm.weight")


def test_two_sets_of_safetensors_are_ambiguous(sharded: Path):
    save_file({"a": torch.ones(1)}, sharded / "model.safetensors")
    assert_says(refusal(AmbiguousCheckpointError, open_checkpoint, sharded), "two sets of weights", "fix:")


def test_one_ranks_piece_is_no_whole_tensor(tmp_path: Path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    from tests.support.worlds import rank_of

    with rank_of(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        piece = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)], shape=(4, 3), stride=(3, 1))
        save_bin(tmp_path, {"w": piece})
    assert_says(refusal(UnsupportedCheckpointError, open_checkpoint, tmp_path), "one rank's piece", "[4, 3]")


def test_quantised_weights_are_refused_in_words(tmp_path: Path, out: Path):
    write_config(tmp_path / "m", "llama", quantization_config={"quant_method": "fp8"})
    state = dict(published_state("llama"))
    state["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(1, 1)
    save_file(state, tmp_path / "m" / "model.safetensors")
    assert_says(refusal(nbmerge.PlanError, nbmerge.merge, tmp_path / "m", out), "quantised", "fp8", "weight_scale_inv")


def test_the_source_is_no_target(sharded: Path):
    assert_says(refusal(TargetError, nbmerge.merge, sharded, sharded, overwrite=True), "checkpoint itself")


def test_bin_directories_are_compared_and_fill_gaps(sharded: Path, tmp_path: Path, out: Path):
    base = save_bin(tmp_path / "base", memory_state("llama"))
    assert nbmerge.diff(sharded, base).changed == ()
    partial = save_bin(tmp_path / "part", {n: t for n, t in memory_state("llama").items() if "norm" not in n})
    nbmerge.merge(partial, out, base_model=base)
    assert_same(saved_bits(out), bits_of_all(published_state("llama")))


def test_a_merge_of_a_merge(sharded: Path, tmp_path: Path, out: Path):
    nbmerge.merge(sharded, tmp_path / "first")
    nbmerge.merge(tmp_path / "first", out, dtype="bfloat16")
    assert {dtype for dtype, _, _ in saved_bits(out).values()} == {"bfloat16"}
    shutil.rmtree(out)
