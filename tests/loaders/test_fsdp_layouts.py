"""Per-rank FSDP checkpoints that are as they should be: every tensor, every bit."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import _dtensor_spec

import nbmerge
from tests.support import examples
from tests.support.models import memory_state, write_config
from tests.support.processes import in_child
from tests.support.results import bits, bits_of
from tests.support.worlds import (
    IS_TORCH_2_7,
    mesh_states,
    rank_file,
    rank_of,
    row_shards,
    write_mesh_world,
    write_ranks,
    write_sharded_tensor_world,
)

of_torch_2_7 = pytest.mark.skipif(not IS_TORCH_2_7, reason="torch 2.6 cannot write such shards")

TENSORS = {
    "rows": torch.randn(10, 3),
    "uneven": torch.randn(7, 2, 3),
    "few": torch.randn(1, 4),
    "vector": torch.randn(5).bfloat16(),
    "whole_numbers": torch.arange(12).reshape(6, 2),
    "scalar": torch.tensor(3.5),
    "flags": torch.tensor([True, False, True]),
}


def assert_opens_as(directory: Path, tensors: dict[str, torch.Tensor], **options: object) -> nbmerge.Checkpoint:
    ckpt = nbmerge.open_checkpoint(directory, **options)
    assert sorted(ckpt.tensors) == sorted(tensors)
    for name, tensor in tensors.items():
        assert bits_of(ckpt[name].expr) == bits(tensor), name
    return ckpt


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_dtensors_on_one_dimension_come_back_bit_by_bit_with_uneven_and_empty_shards(tmp_path: Path, world_size: int):
    ckpt = assert_opens_as(write_mesh_world(tmp_path, TENSORS, (world_size,)), TENSORS)
    assert (ckpt.backend, ckpt.world_size) == ("fsdp", world_size)
    assert ckpt["rows"].placement == f"Shard(0)×{world_size}"
    assert ckpt["few"].chunks[0].rank == 0


@pytest.mark.parametrize("name", ["fsdp", "dp_shard", "something else"])
def test_the_name_of_the_mesh_dimension_does_not_matter(tmp_path: Path, name: str):
    ckpt = assert_opens_as(write_mesh_world(tmp_path, TENSORS, (2,), (name,)), TENSORS)
    assert ckpt.mesh[0].name == name


def test_each_tensor_lies_by_its_own_placements(tmp_path: Path):
    from torch.distributed.tensor import Replicate, Shard

    own = {"rows": [Shard(1), Shard(0)], "uneven": [Shard(2), Replicate()], "few": [Replicate(), Shard(1)]}

    def place(name: str, tensor: torch.Tensor):
        return own.get(name, [Replicate(), Replicate()] if tensor.dim() else None)

    ckpt = assert_opens_as(write_mesh_world(tmp_path, TENSORS, (2, 2), ("a", "b"), place), TENSORS)
    assert ckpt["rows"].placement == "Shard(1)×2 · Shard(0)×2"


def test_replicas_of_an_hsdp_mesh_are_kept_once(tmp_path: Path):
    from torch.distributed.tensor import Replicate, Shard

    tensors = {name: tensor for name, tensor in TENSORS.items() if tensor.dim()}
    write_mesh_world(tmp_path, tensors, (2, 2), ("ddp", "fsdp"), lambda *_: [Replicate(), Shard(0)])
    ckpt = assert_opens_as(tmp_path, tensors)
    assert ckpt.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert [(chunk.rank, [rank for rank, _ in chunk.replicas]) for chunk in ckpt["rows"].chunks] == [(0, [2]), (1, [3])]


@given(data=st.data())
@examples(15)
def test_any_placements_on_any_mesh_come_back_bit_by_bit(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    from torch.distributed.tensor import Replicate, Shard

    mesh = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3).filter(lambda m: math.prod(m) <= 8).map(tuple))
    shapes = st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple)
    tensors, placed = {}, {}
    for name in "ab":
        shape = data.draw(shapes)
        one = st.one_of(st.just(Replicate()), st.integers(0, len(shape) - 1).map(Shard))
        tensors[name], placed[name] = (
            torch.randn(shape),
            data.draw(st.lists(one, min_size=len(mesh), max_size=len(mesh))),
        )
    names = tuple(f"d{i}" for i in range(len(mesh)))
    directory = tmp_path_factory.mktemp("mesh")
    assert_opens_as(write_mesh_world(directory, tensors, mesh, names, lambda name, _: placed[name]), tensors)


@pytest.mark.skipif(not hasattr(_dtensor_spec, "ShardOrderEntry"), reason="this torch states no order of cuts")
@pytest.mark.parametrize("cuts", [(1, 0), (0, 1)])
def test_an_order_of_cuts_that_the_tensor_states_holds(tmp_path: Path, cuts: tuple[int, int]):
    """7 rows on 2 by 2 ranks: which mesh dimension cuts first decides who holds the short piece."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, ShardOrderEntry, TensorMeta

    whole = torch.randn(7, 3)
    for rank in range(4):
        coordinate = divmod(rank, 2)
        local = whole
        for mesh_dim in cuts:
            local = local.chunk(2)[coordinate[mesh_dim]]
        with rank_of(rank, 4):
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
            meta = TensorMeta(whole.shape, whole.stride(), whole.dtype)
            order = (ShardOrderEntry(tensor_dim=0, mesh_dims=cuts),)
            spec = DTensorSpec(
                mesh, (Shard(0), Shard(0)), meta, shard_order=order, use_strided_shard_as_shard_order=False
            )
            torch.save({"w": DTensor(local.clone(), spec, requires_grad=False)}, rank_file(tmp_path, 4, rank))
    assert_opens_as(tmp_path, {"w": whole})


@of_torch_2_7
class TestFSDP2OverTensorParallel:
    """fully_shard over parallelize_module, as torch itself cuts it, without sending anything."""

    @staticmethod
    def save(directory: Path, rank: int, mesh_shape: tuple[int, int], model: torch.nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        world_size = math.prod(mesh_shape)
        with rank_of(rank, world_size):
            mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("fsdp", "tp"))
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(model, mesh["tp"], plan, src_data_rank=None)
            fully_shard(model, mesh=mesh["fsdp"])
            torch.save(model.state_dict(), rank_file(directory, world_size, rank))

    @pytest.mark.parametrize("mesh_shape", [(2, 2), (4, 2), (2, 3), (3, 1)])
    @pytest.mark.parametrize("width", [8, 13, 5])
    def test_uneven_pieces_come_back_bit_by_bit(self, tmp_path: Path, mesh_shape: tuple[int, int], width: int):
        reference = torch.nn.Module()
        reference.up = torch.nn.Linear(6, width)
        reference.down = torch.nn.Linear(width, 6)
        reference.norm = torch.nn.LayerNorm(7)
        tensors = {name: value.detach().clone() for name, value in reference.state_dict().items()}
        for rank in range(math.prod(mesh_shape)):
            in_child(partial(self.save, tmp_path, rank, mesh_shape, reference))  # torch caches the first rank's mesh
        ckpt = assert_opens_as(tmp_path, tensors)
        assert [axis.name for axis in ckpt["norm.weight"].mesh] == ["fsdp"]
        assert [axis.name for axis in ckpt["up.weight"].mesh] == ["fsdp", "tp"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_sharded_tensors_come_back_bit_by_bit(tmp_path: Path, world_size: int):
    tensors = {name: tensor for name, tensor in TENSORS.items() if tensor.dim()}
    ckpt = assert_opens_as(write_sharded_tensor_world(tmp_path, tensors, world_size), tensors)
    assert ckpt.layout.startswith("FSDP1")


def test_world_size_one_holds_whole_tensors(tmp_path: Path):
    ckpt = assert_opens_as(write_ranks(tmp_path, [TENSORS]), TENSORS)
    assert ckpt["rows"].placement == "whole"


def test_fsdp_config_is_not_needed(tmp_path: Path):
    ckpt = assert_opens_as(write_ranks(tmp_path, [TENSORS], version=None), TENSORS)
    assert ckpt.layout == "FSDP, a file for each rank"


def test_a_replicated_buffer_is_kept_once(tmp_path: Path):
    tensors = {**TENSORS, "layer_scalar": torch.tensor([0.25]), "steps": torch.tensor(7)}
    plain = {"layer_scalar", "steps", "scalar"}
    from torch.distributed.tensor import Shard

    write_mesh_world(tmp_path, tensors, (4,), place=lambda name, _: None if name in plain else [Shard(0)])
    ckpt = assert_opens_as(tmp_path, tensors)
    assert ckpt["layer_scalar"].placement == "Replicate×4"
    assert len(ckpt["layer_scalar"].chunks[0].replicas) == 3


def test_optimizer_and_extra_state_are_counted_and_left_alone(tmp_path: Path):
    write_ranks(tmp_path, [TENSORS])
    (tmp_path / "optim_world_size_1_rank_0.pt").write_bytes(b"not even a zip")
    (tmp_path / "extra_state_world_size_1_rank_0.pt").write_bytes(b"")
    ckpt = assert_opens_as(tmp_path, TENSORS)
    assert {file.role for file in ckpt.files} == {"weights", "optimizer", "extra state"}
    assert ckpt.notes == ("1 extra state file left alone", "1 optimizer file left alone")


def test_entries_that_are_no_tensors_are_named_in_the_notes(tmp_path: Path):
    ckpt = nbmerge.open_checkpoint(write_ranks(tmp_path, [{"w": torch.ones(2), "layer._extra_state": {"a": 1}}]))
    assert list(ckpt.tensors) == ["w"]
    assert ckpt.notes == ("1 entry without a tensor left alone: layer._extra_state",)


class TestPlainTensors:
    """Old checkpoints hold no placement; only the shape that the config demands tells copies from row shards."""

    def test_row_shards_are_put_together_where_the_config_demands_their_sum(self, tmp_path: Path):
        state = memory_state("llama")
        write_ranks(tmp_path, row_shards(state, 2), version=None)
        write_config(tmp_path / "huggingface", "llama")
        ckpt = assert_opens_as(tmp_path, state)
        assert ckpt["model.norm.weight"].placement == "Shard(0)×2"

    def test_copies_are_kept_once_where_the_config_demands_their_shape(self, tmp_path: Path):
        state = memory_state("llama")
        write_ranks(tmp_path, [state, state], version=None)
        write_config(tmp_path / "huggingface", "llama")
        ckpt = assert_opens_as(tmp_path, state)
        assert ckpt["model.norm.weight"].placement == "Replicate×2"

    def test_shards_of_unequal_rows_need_no_config(self, tmp_path: Path):
        tensors = {"a": torch.randn(5, 3), "b": torch.randn(7)}
        assert_opens_as(write_ranks(tmp_path, row_shards(tensors, 2)), tensors)

    def test_the_config_may_lie_elsewhere(self, tmp_path: Path):
        state = memory_state("llama")
        write_ranks(tmp_path / "ckpt", row_shards(state, 2), version=None)
        config = write_config(tmp_path / "base", "llama")
        assert_opens_as(tmp_path / "ckpt", state, hf_model_config_path=config)


def test_padded_storages_are_cut_to_the_piece(tmp_path: Path):
    padded = torch.arange(30.0).reshape(10, 3)
    states = [{"w": padded[:4]}, {"w": padded[4:7]}]
    assert_opens_as(write_ranks(tmp_path, states), {"w": padded[:7]})


def test_a_file_says_where_each_of_its_tensors_lies_even_when_torch_itself_could_not_read_it(tmp_path: Path):
    """DTensors of a mesh of 4 are read in a process without any process group."""
    import torch.distributed as dist

    write_ranks(tmp_path, mesh_states({"w": TENSORS["rows"]}, (4,), ("fsdp",), lambda *_: _rows()), world_size=4)
    assert not dist.is_initialized()
    assert_opens_as(tmp_path, {"w": TENSORS["rows"]})


def _rows():
    from torch.distributed.tensor import Shard

    return [Shard(0)]
