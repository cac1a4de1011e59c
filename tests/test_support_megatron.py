"""The tests' own writers of Megatron checkpoints: what they write is what torch reads, in the boxes Megatron cuts."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from nbmerge.demo.megatron.pieces import Coordinates, ParallelSizes, local_pieces
from tests.support.megatron import (
    megatron_pieces,
    saved,
    uneven_rows,
    whole,
    write_torch_dist,
)
from tests.support.megatron_classes import megatron_classes
from tests.support.megatron_forms import (
    hybrid,
    megatron_fsdp,
    optimizer_beside,
    padded,
    singleton,
    stacked,
    with_mtp,
)
from tests.support.megatron_names import FAMILIES, Tensors, fused_qkv, to_megatron
from tests.support.megatron_objects import extra_states, rng_states
from tests.support.megatron_others import write_fsdp_dtensor, write_zarr
from tests.support.models import published_state, tiny_config

# torch's reader says that it reads in a single process, which is meant.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TWO_BY_TWO = ParallelSizes(layers=2, experts=4, tp=2, pp=2, ep=2, etp=1)


def renamed(family: str, **options: str) -> Tensors:
    return to_megatron(family, published_state(family), tiny_config(family), **options)  # type: ignore[arg-type]


def load_with_torch(directory: Path, like: Tensors) -> Tensors:
    """What torch's own reader gives."""
    state = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.load(state, storage_reader=dcp.FileSystemReader(directory), planner=planner)
    return state


def assert_loads(directory: Path, tensors: Tensors) -> None:
    loaded = load_with_torch(directory, tensors)
    assert [name for name in tensors if not torch.equal(loaded[name], tensors[name])] == []


@pytest.mark.parametrize("version", ["0.16", "0.19", "torch"])
def test_torch_reads_what_is_written(tmp_path: Path, version: str) -> None:
    tensors = padded(stacked(renamed("llama")), 40)
    sizes = ParallelSizes(layers=2, tp=2, pp=2)
    objects = {**extra_states(tensors, sizes, torch.empty(0, dtype=torch.uint8)), **rng_states(sizes)}
    write_torch_dist(tmp_path, tensors, megatron_pieces(sizes), objects=objects, version=version)
    assert_loads(tmp_path, tensors)
    files = sorted(path.name for path in tmp_path.glob("*.distcp"))
    assert files == [f"__{rank}_{thread}.distcp" for rank in range(4) for thread in range(2)]


@pytest.mark.parametrize(
    ("version", "names"),
    [("0.12", ("MCoreSavePlan", "PosixPath")), ("0.14", ("MCoreSavePlan",)), ("0.15", ("MCoreMetadata",))],
)
def test_older_metadata_needs_the_classes_of_megatron(tmp_path: Path, version: str, names: tuple[str, ...]) -> None:
    tensors = padded(stacked(renamed("llama")), 40)
    write_torch_dist(tmp_path, tensors, megatron_pieces(ParallelSizes(layers=2, tp=2)), version=version)
    data = (tmp_path / ".metadata").read_bytes()
    assert [name for name in names if name.encode() not in data] == []
    with pytest.raises(ModuleNotFoundError, match="megatron"):
        pickle.loads(data)  # noqa: S301 - our own file
    with megatron_classes():
        made = pickle.loads(data)  # noqa: S301 - our own file
        assert type(made.all_local_plans[0]).__name__ == "MCoreSavePlan"
        assert_loads(tmp_path, tensors)


@pytest.mark.skipif(len(saved(torch.zeros(1))) % 2 == 0, reason="torch 2.6 writes archives of even sizes")
def test_entries_begin_at_odd_offsets_too(tmp_path: Path) -> None:
    tensors = padded(stacked(renamed("llama")), 40)
    write_torch_dist(tmp_path, tensors, megatron_pieces(ParallelSizes(layers=2, tp=2)))
    stored = dcp.FileSystemReader(tmp_path).read_metadata().storage_data.values()
    assert {info.offset % 2 for info in stored} == {0, 1}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", ["te", "local"])
def test_the_pieces_of_all_ranks_are_the_whole_model(family: str, spec: str) -> None:
    tensors = padded(renamed(family, spec=spec), 40)
    experts = max((t.shape[0] for name, t in tensors.items() if "experts.experts" in name), default=0)
    ep = 2 if experts % 2 == 0 else 1
    cut = megatron_pieces(ParallelSizes(layers=2, experts=experts, tp=2, pp=2, ep=ep, etp=1))
    for name, tensor in tensors.items():
        filled = torch.zeros(tensor.shape, dtype=torch.int32)
        for _, box in cut(name, tensor):
            filled[tuple(slice(a, b) for a, b in zip(box.offset, box.stop, strict=True))] += 1
        assert torch.equal(filled, torch.ones_like(filled)), name


@pytest.mark.parametrize(
    ("name", "shape", "rank", "boxes"),
    [  # worked out by hand for TWO_BY_TWO: ranks 0 and 1 are the first stage; experts are not cut, 2 on each rank
        ("embedding.word_embeddings.weight", (40, 16), 1, ["[20:40, 0:16]"]),
        ("embedding.word_embeddings.weight", (40, 16), 3, []),
        ("output_layer.weight", (40, 16), 3, ["[20:40, 0:16]"]),
        ("output_layer.weight", (1, 16), 2, ["[0:1, 0:16]"]),
        ("output_layer.weight", (1, 16), 3, []),
        ("decoder.layers.mlp.linear_fc1.weight", (2, 48, 16), 1, ["[0:1, 12:24, 0:16]", "[0:1, 36:48, 0:16]"]),
        ("decoder.layers.mlp.linear_fc2.weight", (2, 16, 24), 2, ["[1:2, 0:16, 0:12]"]),
        ("decoder.layers.1.mlp.linear_fc2.weight", (16, 24), 0, []),
        ("decoder.layers.mlp.router.weight", (2, 4, 16), 0, ["[0:1, 0:4, 0:16]"]),
        ("decoder.layers.mlp.router.weight", (2, 4, 16), 1, []),
        (
            "decoder.layers.mlp.experts.experts.linear_fc1.weight", (2, 4, 12, 16), 3,
            ["[1:2, 2:3, 0:6, 0:16]", "[1:2, 2:3, 6:12, 0:16]", "[1:2, 3:4, 0:6, 0:16]", "[1:2, 3:4, 6:12, 0:16]"],
        ),
        ("decoder.layers.0.mlp.experts.experts.3.linear_fc2.weight", (16, 6), 1, ["[0:16, 0:6]"]),
        ("decoder.layers.0.mlp.experts.experts.3.linear_fc2.weight", (16, 6), 0, []),
    ],
)  # fmt: skip
def test_a_rank_saves_these_boxes(name: str, shape: tuple[int, ...], rank: int, boxes: list[str]) -> None:
    assert [str(box) for box in local_pieces(name, shape, Coordinates.of(rank, TWO_BY_TWO), TWO_BY_TWO)] == boxes


def test_queries_keys_and_values_are_fused_group_by_group() -> None:
    q, k, v = (torch.arange(start, start + rows).reshape(-1, 1) for start, rows in ((0, 16), (100, 8), (200, 8)))
    fused = fused_qkv(q, k, v, tiny_config("llama")).flatten().tolist()  # 4 heads of 4 rows in 2 groups
    groups = [[*range(8), *range(100, 104), *range(200, 204)], [*range(8, 16), *range(104, 108), *range(204, 208)]]
    assert fused == groups[0] + groups[1]


def test_forms_have_the_keys_of_megatron() -> None:
    dense, experts = renamed("llama"), renamed("qwen3_moe")
    assert stacked(experts)["decoder.layers.mlp.experts.experts.linear_fc1.weight"].shape == (2, 3, 12, 16)
    assert "decoder.layers.1.mlp.experts.experts.2.linear_fc1.weight_v" in singleton(experts)
    assert "decoder.layers.3.mlp.linear_fc1.weight" in hybrid(dense)
    assert "decoder.final_norm.weight" in hybrid(dense)
    fsdp = megatron_fsdp(renamed("qwen3_moe", spec="local", container="ranks"))
    assert "model.module.decoder.layers.1.mlp.experts.linear_fc1.weight2_w" in fsdp
    assert "model.module.decoder.layers.1.pre_mlp_layernorm.weight" in fsdp
    with pytest.raises(AssertionError, match="not alike"):
        stacked(renamed("deepseek_v3"))


def test_mtp_layers_have_no_copies_of_the_tables() -> None:
    published, config = with_mtp(published_state("deepseek_v3"), tiny_config("deepseek_v3"))
    extra = {name for name in to_megatron("deepseek_v3", published, config) if name.startswith("mtp.layers.0.")}
    assert "mtp.layers.0.transformer_layer.mlp.router.expert_bias" in extra
    assert "mtp.layers.0.final_layernorm.weight" in extra
    assert not [name for name in extra if "embed" in name or "head" in name]


@pytest.mark.parametrize("form", ["fully_reshardable", "fp32_param", "dp_reshardable", "chained"])
def test_optimizer_tensors_stand_beside_the_weights(tmp_path: Path, form: str) -> None:
    tensors = stacked(renamed("llama"))
    every = {**tensors, **optimizer_beside(tensors, form)}
    write_torch_dist(tmp_path, every, whole)
    assert_loads(tmp_path, every)


def test_megatron_fsdp_has_uneven_rows_and_no_sidecars(tmp_path: Path) -> None:
    tensors = megatron_fsdp(padded(renamed("llama", spec="local", container="ranks"), 40))
    write_fsdp_dtensor(tmp_path, tensors, ParallelSizes(layers=2, tp=2))
    assert_loads(tmp_path, tensors)
    assert not (tmp_path / "metadata.json").exists()
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    chunks = metadata.state_dict_metadata["model.module.output_layer.weight"].chunks
    assert sorted(tuple(chunk.sizes) for chunk in chunks) == [(6, 16), (6, 16), (14, 16), (14, 16)]
    key = "rng_state.(0, 1).0.rng_tracker_states.model-parallel-rng"
    assert metadata.planner_data[key] == ("rng_state", "(0, 1)", 0, "rng_tracker_states", "model-parallel-rng")


def test_zarr_has_a_file_of_raw_bytes_for_each_chunk(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in stacked(renamed("llama")).items()}
    sizes = ParallelSizes(layers=2, tp=2, pp=2)
    tensors = padded(tensors, 40)
    write_zarr(tmp_path, tensors, megatron_pieces(sizes), objects=extra_states(tensors, sizes))
    name = "decoder.layers.mlp.linear_fc1.weight"
    about = json.loads((tmp_path / name / ".zarray").read_text())
    assert (about["chunks"], about["dtype"]) == ([1, 12, 16], "bfloat16")
    data = (tmp_path / name / "1.2.0").read_bytes()
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.bfloat16), tensors[name][1, 24:36].flatten())
    assert (tmp_path / "decoder.layers.mlp.linear_fc1._extra_state" / "shard_1_2.pt").is_file()


def test_rows_cut_unevenly_are_all_of_them() -> None:
    cut = uneven_rows(whole, 3)
    assert [(rank, str(box)) for rank, box in cut("w", torch.empty(7, 2))] == [
        (0, "[0:1, 0:2]"), (1, "[1:3, 0:2]"), (2, "[3:7, 0:2]"),
    ]  # fmt: skip
    assert [str(box) for _, box in cut("norm", torch.empty(7))] == ["[0:7]"]
