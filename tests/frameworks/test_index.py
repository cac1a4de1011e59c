"""The index of a checkpoint says what torch put where, tensor by tensor, whatever the layout."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import nbmerge
from nbmerge.demo import DemoCheckpoint
from nbmerge.engine.read import read
from nbmerge.engine.sources import LocalFiles
from nbmerge.geometry import Box
from tests.frameworks.recipes import RECIPES, UNMERGED

Checkpoints = Mapping[str, DemoCheckpoint]
States = Callable[[str], Mapping[str, torch.Tensor]]

READABLE = {**RECIPES, **UNMERGED}
EMBEDDING, NORM, OUT = "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.o_proj.weight"


def opened(checkpoints: Checkpoints, name: str) -> nbmerge.Checkpoint:
    return nbmerge.open_checkpoint(checkpoints[name].path, progress=False)


def pickle_of(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        return archive.read(name)


@pytest.mark.parametrize("name", READABLE)
def test_names_shapes_and_dtypes_are_those_of_the_unsharded_state_dict(
    checkpoints: Checkpoints, whole_states: States, name: str
) -> None:
    index, state = opened(checkpoints, name), whole_states(name)
    assert {key: (tensor.shape, f"torch.{tensor.dtype.name}") for key, tensor in index.tensors.items()} == {
        key: (tuple(tensor.shape), str(tensor.dtype)) for key, tensor in state.items()
    }


@pytest.mark.parametrize("name", READABLE)
def test_the_chunks_hold_the_bytes_of_the_unsharded_state_dict(
    checkpoints: Checkpoints, whole_states: States, name: str
) -> None:
    state = whole_states(name)
    with LocalFiles() as sources:
        for key, tensor in opened(checkpoints, name).tensors.items():
            data = read(tensor.expr, Box.whole(tensor.shape), sources).tobytes()
            assert data == state[key].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), key


@pytest.mark.parametrize("name", READABLE)
def test_every_replica_holds_the_bytes_of_its_chunk(checkpoints: Checkpoints, name: str) -> None:
    with LocalFiles() as sources:
        for key, tensor in opened(checkpoints, name).tensors.items():
            for chunk in tensor.chunks:
                whole = Box.whole(chunk.box.shape)
                data = read(chunk.stored, whole, sources).tobytes()
                for rank, replica in chunk.replicas:
                    assert read(replica, whole, sources).tobytes() == data, (key, rank)


@pytest.mark.parametrize("name", READABLE)
def test_every_rank_appears_once_among_the_chunks_of_a_tensor(checkpoints: Checkpoints, name: str) -> None:
    index = opened(checkpoints, name)
    for key, tensor in index.tensors.items():
        ranks = [rank for chunk in tensor.chunks for rank in (chunk.rank, *(rank for rank, _ in chunk.replicas))]
        assert len(ranks) == len(set(ranks)), key
        if tensor.mesh[:1] and tensor.mesh[0].name != "ranks":  # a ShardedTensor leaves out the ranks without rows
            assert sorted(ranks) == list(range(index.world_size)), key


@pytest.mark.parametrize(
    ("name", "written", "unwritten"),
    [
        ("fsdp2", b"DTensor", b"ShardedTensor"),
        ("fsdp1_mesh", b"DTensor", b"ShardedTensor"),
        ("fsdp1_no_mesh", b"ShardedTensorMetadata", b"DTensor"),
        ("tp_2x2_uneven", b"_StridedShard", b"ShardedTensor"),
        ("plain_world_of_1", b"_rebuild_tensor_v2", b"DTensor"),
        ("fsdp1_world_of_1", b"_rebuild_tensor_v2", b"DTensor"),
        ("flat_parameters", b"_flat_param", b"DTensor"),
    ],
)
def test_torch_wrote_the_kind_of_tensor_that_the_layout_is_about(
    checkpoints: Checkpoints, name: str, written: bytes, unwritten: bytes
) -> None:
    """Else the other tests would prove nothing about that kind."""
    (path,) = checkpoints[name].path.glob("model_*_rank_0.pt")
    assert written in pickle_of(path)
    assert unwritten not in pickle_of(path)


@pytest.mark.parametrize(
    ("name", "tensor", "mesh"),
    [
        ("fsdp2", EMBEDDING, [("fsdp", 4, "Shard(0)")]),
        ("fsdp2_renamed_mesh_tied_bf16", EMBEDDING, [("dp_shard", 4, "Shard(0)")]),
        ("hsdp_2x2_bf16", EMBEDDING, [("dp_replicate", 2, "Replicate"), ("fsdp", 2, "Shard(0)")]),
        ("hsdp_4x2_renamed", NORM, [("replica", 4, "Replicate"), ("shards", 2, "Shard(0)")]),
        ("fsdp1_hsdp_2x2", NORM, [("ddp", 2, "Replicate"), ("fsdp", 2, "Shard(0)")]),
        ("tp_2x2_uneven", EMBEDDING, [("fsdp", 2, "StridedShard(0, sf=2)"), ("tp", 2, "Shard(0)")]),
        ("tp_2x2_uneven", OUT, [("fsdp", 2, "Shard(0)"), ("tp", 2, "Shard(1)")]),
        ("tp_2x2_uneven", NORM, [("fsdp", 2, "Shard(0)")]),  # a norm lies on the part of the mesh that FSDP uses
        (
            "three_dimensional_2x2x2",
            OUT,
            [("ddp", 2, "Replicate"), ("fsdp", 2, "Shard(0)"), ("tp", 2, "Shard(1)")],
        ),
        ("three_dimensional_2x2x2", NORM, [("ddp", 2, "Replicate"), ("fsdp", 2, "Shard(0)")]),
        ("fsdp1_no_mesh", EMBEDDING, [("ranks", 4, "Shard(0)")]),
    ],
)
def test_each_tensor_has_the_mesh_and_placements_that_torch_gave_it(
    checkpoints: Checkpoints, name: str, tensor: str, mesh: list[tuple[str, int, str]]
) -> None:
    found = opened(checkpoints, name)[tensor].mesh
    assert [(axis.name, axis.size, axis.placement) for axis in found] == mesh


def test_uneven_tensor_parallel_pieces_are_cut_before_fsdp_cuts_them(checkpoints: Checkpoints) -> None:
    """257 rows: TP makes 129 and 128 of them, FSDP over four ranks 33, 33, 33, 30 and 32, 32, 32, 32."""
    chunks = opened(checkpoints, "tp_4x2_uneven")[EMBEDDING].chunks
    assert [(chunk.rank, chunk.box.offset[0], chunk.box.shape[0]) for chunk in chunks] == [
        (0, 0, 33),
        (2, 33, 33),
        (4, 66, 33),
        (6, 99, 30),
        (1, 129, 32),
        (3, 161, 32),
        (5, 193, 32),
        (7, 225, 32),
    ]


@pytest.mark.parametrize(
    ("name", "ranks_with_rows"),
    [("fsdp2_world_of_8", range(6)), ("fsdp1_no_mesh_world_of_8", range(6)), ("fsdp2", range(4))],
)
def test_ranks_beyond_the_rows_hold_nothing(checkpoints: Checkpoints, name: str, ranks_with_rows: range) -> None:
    """18 rows are 3 for each of the first six of eight ranks, and 5, 5, 5 and 3 for four."""
    chunks = opened(checkpoints, name)[NORM].chunks
    assert [chunk.rank for chunk in chunks if chunk.box.numel] == list(ranks_with_rows)
    assert sum(chunk.box.numel for chunk in chunks) == 18


def test_a_single_row_lies_on_one_rank(checkpoints: Checkpoints) -> None:
    (chunk,) = [chunk for chunk in opened(checkpoints, "value_model")["score.weight"].chunks if chunk.box.numel]
    assert (chunk.rank, chunk.box.shape) == (0, (1, 18))


@pytest.mark.parametrize(
    ("name", "tensor", "shape", "dtype"),
    [
        ("buffers_of_one_element_gemma4", "model.layers.0.layer_scalar", (1,), "float32"),
        ("buffers_of_no_dimension_resnet_fsdp2", "num_batches_tracked", (), "int64"),
        ("buffers_of_no_dimension_resnet_fsdp1", "num_batches_tracked", (), "int64"),
        ("buffers_of_no_dimension_resnet_fsdp2", "running_mean", None, "float32"),
        ("unknown_buffers_fsdp2", "steps_seen", (), "int64"),
        ("unknown_buffers_fsdp2", "tokens_seen", (5,), "int64"),
        ("unknown_buffers_fsdp1_no_mesh", "steps_seen", (), "int64"),
        ("unknown_buffers_fsdp1_no_mesh", "tokens_seen", (5,), "int64"),
    ],
)
def test_a_replicated_buffer_is_kept_once(
    checkpoints: Checkpoints, name: str, tensor: str, shape: tuple[int, ...] | None, dtype: str
) -> None:
    found = [lazy for key, lazy in opened(checkpoints, name).tensors.items() if key.endswith(tensor)]
    assert found
    for lazy in found:
        (chunk,) = lazy.chunks
        assert (chunk.rank, [rank for rank, _ in chunk.replicas]) == (0, [1, 2, 3])
        assert lazy.dtype.name == dtype
        assert shape is None or lazy.shape == shape


@pytest.mark.parametrize(("name", "copies"), [("hsdp_2x2_bf16", 2), ("hsdp_4x2_renamed", 4), ("fsdp1_hsdp_2x2", 2)])
def test_hybrid_sharding_has_every_piece_once_for_each_replica(
    checkpoints: Checkpoints, name: str, copies: int
) -> None:
    for tensor in opened(checkpoints, name).tensors.values():
        for chunk in tensor.chunks:
            if chunk.box.numel:
                assert 1 + len(chunk.replicas) == copies, tensor.name


def test_optimizer_and_extra_state_are_counted_and_left_alone(checkpoints: Checkpoints) -> None:
    index = opened(checkpoints, "fsdp2")
    roles = [file.role for file in index.files]
    assert (roles.count("weights"), roles.count("optimizer"), roles.count("extra state")) == (4, 4, 4)
    assert any("4 optimizer files" in note for note in index.notes)


@pytest.mark.parametrize(("name", "version"), [("fsdp2", 2), ("hsdp_2x2_bf16", 2), ("fsdp1_no_mesh", 1)])
def test_the_version_of_fsdp_is_named(checkpoints: Checkpoints, name: str, version: int) -> None:
    assert f"FSDP{version}" in opened(checkpoints, name).layout


@pytest.mark.parametrize("name", [name for name, recipe in READABLE.items() if recipe.fsdp_version == 2])
def test_torch_agrees_on_every_local_piece(checkpoints: Checkpoints, name: str) -> None:
    """The shape of each rank's own local tensor, as torch reads it back, is the shape of that rank's chunk."""
    demo = checkpoints[name]
    index = opened(checkpoints, name)
    for path in demo.path.glob("model_*.pt"):
        rank = int(path.stem.rpartition("_")[2])
        state: dict[str, Any] = torch.load(path, weights_only=False)
        for key, value in state.items():
            local = getattr(value, "_local_tensor", value)
            (chunk,) = [
                chunk
                for chunk in index[key].chunks
                if rank == chunk.rank or rank in [other for other, _ in chunk.replicas]
            ]
            assert chunk.box.shape == tuple(local.shape), (key, rank)
