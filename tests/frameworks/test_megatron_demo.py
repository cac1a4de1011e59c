"""Megatron checkpoints of the demo: containers written by real ranks, compared with what was worked out by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

import nbmerge
from nbmerge.demo import DemoCheckpoint, Recipe, differences_on_disk, differences_when_loaded
from nbmerge.errors import IncompleteCheckpointError, OptionError
from tests.frameworks.recipes import MEGATRON

# torch's reader says that it reads in a single process, which is meant.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

CONTAINERS = {"dense": "dist_ckpt", "megatron_lm": "iter_0000010"}


@pytest.fixture
def demos(checkpoints: Mapping[str, DemoCheckpoint]) -> Mapping[str, DemoCheckpoint]:
    return {name: checkpoints[f"megatron {name}"] for name in MEGATRON}


def container(demos: Mapping[str, DemoCheckpoint], name: str) -> Path:
    """The directory of the weights."""
    return demos[name].path / CONTAINERS.get(name, "model/dist_ckpt")


@cache
def metadata_of(directory: Path) -> Any:
    return dcp.FileSystemReader(directory).read_metadata()


def shapes_of(directory: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of a container."""
    about = metadata_of(directory).state_dict_metadata
    return {key: tuple(value.size) for key, value in about.items() if hasattr(value, "size")}


def pieces_of(directory: Path, key: str) -> dict[tuple[int, ...], tuple[tuple[int, ...], int]]:
    """The boxes of a tensor by their offsets: extent, and the rank that wrote it."""
    metadata = metadata_of(directory)
    writers = {
        tuple(index.offset): int(stored.relative_path.split("_")[2])
        for index, stored in metadata.storage_data.items()
        if index.fqn == key
    }
    chunks = metadata.state_dict_metadata[key].chunks
    return {tuple(chunk.offsets): (tuple(chunk.sizes), writers[tuple(chunk.offsets)]) for chunk in chunks}


def load_with_torch(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors, as torch's own reader puts them together."""
    about = metadata_of(directory).state_dict_metadata
    state = {key: torch.zeros(size, dtype=about[key].properties.dtype) for key, size in shapes_of(directory).items()}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.load(state, storage_reader=dcp.FileSystemReader(directory), planner=planner)
    return state


def test_a_dense_model_has_these_keys_and_shapes(demos: Mapping[str, DemoCheckpoint]) -> None:
    # 24 wide, 4 heads and 2 groups of 6, 50 wide in the MLP; 257 rows padded to a multiple of 8 × 2
    assert shapes_of(container(demos, "dense")) == {
        "embedding.word_embeddings.weight": (272, 24),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (3, 24),
        "decoder.layers.self_attention.linear_qkv.weight": (3, 48, 24),
        "decoder.layers.self_attention.linear_qkv.bias": (3, 48),
        "decoder.layers.self_attention.linear_proj.weight": (3, 24, 24),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (3, 24),
        "decoder.layers.mlp.linear_fc1.weight": (3, 100, 24),
        "decoder.layers.mlp.linear_fc2.weight": (3, 24, 50),
        "decoder.final_layernorm.weight": (24,),
        "output_layer.weight": (272, 24),
    }


def test_each_rank_writes_the_pieces_that_megatron_gives_it(demos: Mapping[str, DemoCheckpoint]) -> None:
    directory = container(demos, "dense")  # ranks 0 and 1 have two layers, 2 and 3 the third
    rows = (136, 24)
    assert pieces_of(directory, "embedding.word_embeddings.weight") == {(0, 0): (rows, 0), (136, 0): (rows, 1)}
    assert pieces_of(directory, "output_layer.weight") == {(0, 0): (rows, 2), (136, 0): (rows, 3)}
    assert pieces_of(directory, "decoder.final_layernorm.weight") == {(0,): ((24,), 2)}
    half = (1, 25, 24)
    assert pieces_of(directory, "decoder.layers.mlp.linear_fc1.weight") == {
        (0, 0, 0): (half, 0), (0, 50, 0): (half, 0), (0, 25, 0): (half, 1), (0, 75, 0): (half, 1),
        (1, 0, 0): (half, 0), (1, 50, 0): (half, 0), (1, 25, 0): (half, 1), (1, 75, 0): (half, 1),
        (2, 0, 0): (half, 2), (2, 50, 0): (half, 2), (2, 25, 0): (half, 3), (2, 75, 0): (half, 3),
    }  # fmt: skip
    columns = (1, 24, 25)
    assert pieces_of(directory, "decoder.layers.mlp.linear_fc2.weight") == {
        (0, 0, 0): (columns, 0), (0, 0, 25): (columns, 1), (1, 0, 0): (columns, 0), (1, 0, 25): (columns, 1),
        (2, 0, 0): (columns, 2), (2, 0, 25): (columns, 3),
    }  # fmt: skip
    assert pieces_of(directory, "decoder.layers.mlp.linear_fc1.layer_norm_weight") == {
        (0, 0): ((1, 24), 0), (1, 0): ((1, 24), 0), (2, 0): ((1, 24), 2),
    }  # fmt: skip


def test_the_tensors_are_those_of_the_model(demos: Mapping[str, DemoCheckpoint]) -> None:
    saved = load_with_torch(container(demos, "dense"))
    published = load_file(demos["dense"].reference / "model.safetensors")
    layer = "model.layers.2."
    q, k, v = (published[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv")
    fused = torch.cat([q[:12], k[:6], v[:6], q[12:], k[6:], v[6:]])
    assert torch.equal(saved["decoder.layers.self_attention.linear_qkv.weight"][2], fused)
    fc1 = saved["decoder.layers.mlp.linear_fc1.weight"][2]
    assert torch.equal(fc1[:50], published[layer + "mlp.gate_proj.weight"])
    assert torch.equal(fc1[50:], published[layer + "mlp.up_proj.weight"])
    assert torch.equal(saved["output_layer.weight"][:257], published["lm_head.weight"])
    assert saved["output_layer.weight"][257:].abs().min() > 0  # what has to be cut off


def test_experts_are_spread_and_cut(demos: Mapping[str, DemoCheckpoint]) -> None:
    directory = container(demos, "experts")  # ranks 0 and 1 hold experts 0 to 2, ranks 2 and 3 the rest
    pieces = pieces_of(directory, "decoder.layers.mlp.experts.experts.linear_fc1.weight")
    part = (1, 1, 5, 24)
    assert pieces == {
        (layer, expert, half * 10 + 5 * tp, 0): (part, 2 * (expert // 3) + tp)
        for layer in range(3)
        for expert in range(6)
        for half in range(2)
        for tp in range(2)
    }
    assert {rank for _, rank in pieces_of(directory, "decoder.layers.self_attention.linear_qkv.weight").values()} == {
        0,
        1,
    }
    saved = load_with_torch(directory)
    published = load_file(demos["experts"].reference / "model.safetensors")
    fc1 = saved["decoder.layers.mlp.experts.experts.linear_fc1.weight"][1, 4]
    assert torch.equal(fc1[10:], published["model.layers.1.mlp.experts.4.up_proj.weight"])
    fc2 = saved["decoder.layers.mlp.experts.experts.linear_fc2.weight"][1, 4]
    assert torch.equal(fc2, published["model.layers.1.mlp.experts.4.down_proj.weight"])
    assert saved["decoder.layers.mlp.router.weight"].dtype == torch.bfloat16


def test_states_lie_beside_the_weights(demos: Mapping[str, DemoCheckpoint]) -> None:
    keys = set(metadata_of(container(demos, "experts")).state_dict_metadata)
    assert "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_2.5_3.6" in keys
    assert "decoder.layers.self_attention.q_layernorm._extra_state/shard_0_3" in keys
    assert "decoder.final_layernorm._extra_state/shard_0_1" in keys
    extra = metadata_of(demos["experts"].path / "extra" / "dist_ckpt").state_dict_metadata
    assert sorted(extra) == ["rng_state/shard_0.0_1.2", "rng_state/shard_0.1_1.2"]
    optimizer = shapes_of(demos["experts"].path / "optimizer" / "dist_ckpt")
    assert optimizer["optimizer.state.exp_avg.decoder.layers.mlp.router.weight"] == (3, 6, 24)
    dense = set(metadata_of(container(demos, "dense")).state_dict_metadata)
    assert {"rng_state/shard_1.0_2.2", "decoder.layers.mlp.linear_fc2._extra_state/shard_2_3"} < dense


def test_tied_and_value_heads_are_saved_as_megatron_has_them(demos: Mapping[str, DemoCheckpoint]) -> None:
    assert "output_layer.weight" not in shapes_of(container(demos, "megatron_lm"))
    assert pieces_of(container(demos, "value"), "output_layer.weight") == {(0, 0): ((1, 24), 0)}
    assert pieces_of(container(demos, "thick"), "decoder.layers.self_attention.q_layernorm.weight") == {
        (0, 0): ((1, 6), 0), (1, 0): ((1, 6), 0), (2, 0): ((1, 6), 1),
    }  # fmt: skip


def test_the_files_are_those_of_each_layout(demos: Mapping[str, DemoCheckpoint]) -> None:
    assert sorted(path.name for path in demos["dense"].path.iterdir()) == [
        "dist_ckpt", "huggingface", "transformer_config.json",
    ]  # fmt: skip
    assert sorted(path.name for path in demos["experts"].path.iterdir()) == [
        "ckpt_contents.json", "extra", "model", "optimizer", "transformer_config.json",
    ]  # fmt: skip
    assert sorted(path.name for path in container(demos, "experts").iterdir()) == [
        ".metadata", *(f"__{rank}_{thread}.distcp" for rank in range(4) for thread in range(2)), "common.pt",
        "metadata.json",
    ]  # fmt: skip
    lm = demos["megatron_lm"].path
    assert sorted(path.name for path in lm.iterdir()) == ["iter_0000010", "latest_checkpointed_iteration.txt"]
    assert (lm / "latest_checkpointed_iteration.txt").read_text() == "10"
    for demo in demos.values():
        assert (demo.huggingface / "config.json").is_file()
        assert (demo.huggingface / "tokenizer.json").is_file()


def test_the_sizes_are_written_down(demos: Mapping[str, DemoCheckpoint]) -> None:
    about = json.loads((demos["dense"].path / "transformer_config.json").read_text())
    assert about["tensor_model_parallel_size"] == about["pipeline_model_parallel_size"] == 2
    assert (about["num_layers"], about["num_layers_in_first_pipeline_stage"], about["kv_channels"]) == (3, 2, 6)
    contents = json.loads((demos["experts"].path / "ckpt_contents.json").read_text())
    assert contents["contents"]["model"]["format"] == "megatron_dist_checkpoint"
    assert (contents["schema_version"], contents["world_size"]) == (2, 4)
    common = torch.load(container(demos, "megatron_lm") / "common.pt", weights_only=False)
    assert (common["args"].padded_vocab_size, common["args"].untie_embeddings_and_output_weights) == (272, False)
    assert json.loads((container(demos, "dense") / "metadata.json").read_text())["sharded_backend"] == "torch_dist"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"arch": "gemma4"}, "no Megatron checkpoint of gemma4"),
        ({"world_size": 3}, "mesh of 1 × 1 × 2 does not fit a world of 3"),
        ({"mesh_dim_names": ("a", "b", "c")}, "no names of mesh dimensions"),
        ({"mesh_shape": (1, 2, 2)}, "0 experts cannot be spread over 2"),
        ({"mesh_shape": (1, 1, 4)}, "num_key_value_heads 2 cannot be cut into 4"),
        ({"config": {"intermediate_size": 51}}, "intermediate_size 51 cannot be cut into 2"),
    ],
)
def test_what_megatron_cannot_save_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Recipe(layout="megatron", **fields)


def merged(demo: DemoCheckpoint, target: Path, **options: Any) -> Path:
    """The merge of a demo; Megatron-LM's has its config beside it."""
    if not demo.huggingface.is_relative_to(demo.path):
        options["hf_model_config_path"] = demo.huggingface
    nbmerge.merge(demo.path, target, progress=False, **options)
    return target


@pytest.mark.parametrize("name", MEGATRON)
def test_a_merge_gives_the_model_that_was_sharded(
    demos: Mapping[str, DemoCheckpoint], name: str, tmp_path: Path
) -> None:
    target = merged(demos[name], tmp_path / "merged")
    assert differences_on_disk(target, demos[name].reference) == []
    assert differences_when_loaded(target, demos[name].state) == []


@pytest.mark.parametrize("name", ["dense", "experts", "megatron_lm"])
def test_the_index_says_how_the_ranks_divided_the_model(demos: Mapping[str, DemoCheckpoint], name: str) -> None:
    checkpoint = nbmerge.open_checkpoint(demos[name].path, progress=False)
    sizes = dict(zip(("pp", "ep", "tp"), MEGATRON[name].mesh, strict=True))
    assert {axis.name: axis.size for axis in checkpoint.mesh} == {axis: n for axis, n in sizes.items() if n > 1}
    assert checkpoint.world_size == 4
    directory = container(demos, name)
    for tensor in checkpoint.tensors.values():
        boxes = {chunk.box.offset: (chunk.box.shape, chunk.rank) for chunk in tensor.chunks}
        assert boxes == pieces_of(directory, tensor.name)


def test_a_cast_rounds_as_torch_does(demos: Mapping[str, DemoCheckpoint], tmp_path: Path) -> None:
    written = load_file(merged(demos["dense"], tmp_path / "merged", dtype="bfloat16") / "model.safetensors")
    published = load_file(demos["dense"].reference / "model.safetensors")
    assert written.keys() == published.keys()
    assert [name for name in written if not torch.equal(written[name], published[name].bfloat16())] == []


@pytest.mark.parametrize("name", ["dense", "experts", "megatron_lm"])
def test_a_container_alone_is_merged_too(demos: Mapping[str, DemoCheckpoint], name: str, tmp_path: Path) -> None:
    target = tmp_path / "merged"
    nbmerge.merge(container(demos, name), target, hf_model_config_path=demos[name].huggingface, progress=False)
    assert differences_on_disk(target, demos[name].reference) == []


def test_a_file_of_the_demo_that_is_lost_is_named(demos: Mapping[str, DemoCheckpoint], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(demos["dense"].path, tmp_path / "copy"))
    (directory / "dist_ckpt" / "__3_0.distcp").unlink()
    with pytest.raises(IncompleteCheckpointError, match=r"__3_0\.distcp"):
        nbmerge.merge(directory, tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()
