"""Megatron's distributed checkpoints, as every version writes them, give the tensors that were saved, bit by bit."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nbmerge import Checkpoint, open_checkpoint
from nbmerge.demo.megatron.pieces import ParallelSizes
from nbmerge.engine.events import Advanced, Ended, Event, Started
from nbmerge.geometry import Box
from nbmerge.layout import MeshAxis
from nbmerge.loaders.base import OpenOptions
from nbmerge.loaders.megatron.dist import is_weight, open_torch_dist
from tests.support.megatron import VERSIONS, like, megatron_pieces, saved, uneven_rows, whole, write_torch_dist
from tests.support.megatron_forms import hybrid, megatron_fsdp, optimizer_beside, singleton, stacked, with_mtp
from tests.support.megatron_models import megatron_state
from tests.support.megatron_names import Tensors, to_megatron, under
from tests.support.megatron_objects import extra_states, rng_states, saved_object, with_prefix
from tests.support.megatron_others import write_fsdp_dtensor
from tests.support.megatron_runs import TWO_BY_TWO, edit_metadata, llama, saved_beside
from tests.support.models import published_state, tiny_config
from tests.support.results import assert_same, bits, bits_of, bits_of_all

MEGATRON_VERSIONS = [name for name in VERSIONS if name[0].isdigit()]
PP, TP = MeshAxis("pp", 2, "layers"), MeshAxis("tp", 2, "tensors")


def assert_read(checkpoint: Checkpoint, want: Tensors) -> None:
    assert_same({name: bits_of(tensor.expr) for name, tensor in checkpoint.tensors.items()}, bits_of_all(want))


def opened(directory: Path, tensors: Tensors, pieces: Any = None, **options: Any) -> Checkpoint:
    """What is read of a container that is written with these options."""
    pieces = megatron_pieces(TWO_BY_TWO) if pieces is None else pieces
    return open_checkpoint(write_torch_dist(directory / "dist_ckpt", tensors, pieces, **options))


class TestVersions:
    @pytest.mark.parametrize("version", MEGATRON_VERSIONS)
    def test_the_index_is_what_was_saved(self, tmp_path: Path, version: str):
        tensors = llama()
        objects = {**extra_states(tensors, TWO_BY_TWO), **rng_states(TWO_BY_TWO)}
        checkpoint = opened(tmp_path, tensors, objects=objects, version=version)
        assert_read(checkpoint, tensors)
        assert (checkpoint.backend, checkpoint.layout, checkpoint.names) == (
            "megatron",
            "Megatron torch_dist",
            "megatron",
        )
        assert checkpoint.world_size == 4
        count = len(objects) + (version == "0.19")  # common_state instead of common.pt
        assert checkpoint.notes == (f"{count} pickled objects (extra states and the like) left alone",)

    @pytest.mark.parametrize("version", MEGATRON_VERSIONS)
    def test_without_metadata_json_the_names_tell_whose_it_is(self, tmp_path: Path, version: str):
        tensors = llama()
        write_torch_dist(tmp_path, tensors, version=version)
        (tmp_path / "metadata.json").unlink()
        checkpoint = open_checkpoint(tmp_path)
        assert_read(checkpoint, tensors)
        assert checkpoint.evidence == (".metadata",)

    @pytest.mark.parametrize("dp", [1, 3])
    @pytest.mark.parametrize("tp", [1, 2])
    def test_megatron_fsdp(self, tmp_path: Path, tp: int, dp: int):
        tensors = megatron_fsdp(megatron_state("llama", spec="local", container="ranks"))
        write_fsdp_dtensor(tmp_path, tensors, ParallelSizes(layers=2, tp=tp), dp=dp)
        checkpoint = open_checkpoint(tmp_path)
        assert_read(checkpoint, tensors)
        assert checkpoint.layout == "Megatron-FSDP (fsdp_dtensor)"
        assert checkpoint.notes == (
            f"{3 * tp} tensors of optimizer and random number generators left alone",
            f"{2 * tp} pickled objects (extra states and the like) left alone",
        )

    def test_megatron_fsdp_of_experts(self, tmp_path: Path):
        tensors = megatron_fsdp(megatron_state("qwen3_moe", spec="local", container="ranks"))
        write_fsdp_dtensor(tmp_path, tensors, ParallelSizes(layers=2, experts=3))
        checkpoint = open_checkpoint(tmp_path)
        assert_read(checkpoint, tensors)
        assert "model.module.decoder.layers.1.mlp.experts.linear_fc1.weight2_w" in checkpoint.tensors


class TestForms:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_layers_that_are_stacked(self, tmp_path: Path, dtype: torch.dtype):
        tensors = {name: tensor.to(dtype) for name, tensor in llama().items()}
        assert_read(opened(tmp_path, tensors), tensors)

    @pytest.mark.parametrize("family", ["llama", "deepseek_v3", "qwen3_moe"])
    def test_layers_by_themselves(self, tmp_path: Path, family: str):
        tensors = megatron_state(family)
        assert_read(opened(tmp_path, tensors), tensors)

    def test_stacked_experts(self, tmp_path: Path):
        tensors = stacked(megatron_state("qwen3_moe"))
        sizes = ParallelSizes(layers=2, experts=3, tp=2, pp=2, ep=3, etp=1)
        checkpoint = opened(tmp_path, tensors, megatron_pieces(sizes))
        assert_read(checkpoint, tensors)
        fc1 = checkpoint["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
        assert {chunk.box.shape for chunk in fc1.chunks} == {(1, 1, 6, 16)}  # gate or up of one expert; not cut

    def test_singleton_shards(self, tmp_path: Path):
        tensors = singleton(megatron_state("qwen3_moe"))
        sizes = ParallelSizes(layers=2, experts=3, tp=2, pp=2)
        checkpoint = opened(tmp_path, tensors, megatron_pieces(sizes))
        assert_read(checkpoint, tensors)
        assert "decoder.layers.1.mlp.experts.experts.2.linear_fc1.weight_v" in checkpoint.tensors

    @pytest.mark.parametrize("prefix", ["module.", "module.module.", "model."])
    def test_a_prefix(self, tmp_path: Path, prefix: str):
        tensors = under(prefix, llama())
        objects = with_prefix(extra_states(llama(), TWO_BY_TWO), prefix)
        checkpoint = opened(tmp_path, tensors, objects=objects)
        assert_read(checkpoint, tensors)
        assert checkpoint.layout == "Megatron torch_dist"

    def test_hybrid_models(self, tmp_path: Path):
        tensors = hybrid(megatron_state("llama"))
        checkpoint = opened(tmp_path, tensors, whole)
        assert_read(checkpoint, tensors)
        assert "decoder.layers.3.mlp.linear_fc1.weight" in checkpoint.tensors

    def test_layers_that_predict_further(self, tmp_path: Path):
        tensors = to_megatron("deepseek_v3", *with_mtp(published_state("deepseek_v3"), tiny_config("deepseek_v3")))
        assert_read(opened(tmp_path, tensors, whole), tensors)


class TestBesideTheWeights:
    @pytest.mark.parametrize("form", ["fully_reshardable", "fp32_param", "dp_reshardable", "chained"])
    @pytest.mark.parametrize("version", ["0.14", "0.19"])
    def test_optimizer_tensors_are_left_alone_and_counted(self, tmp_path: Path, form: str, version: str):
        tensors = llama()
        beside = optimizer_beside(tensors, form)
        checkpoint = opened(tmp_path, {**tensors, **beside}, saved_beside(TWO_BY_TWO), version=version)
        assert_read(checkpoint, tensors)
        assert checkpoint.notes[0] == f"{len(beside)} tensors of optimizer and random number generators left alone"

    def test_a_file_without_weights_is_the_optimizers(self, tmp_path: Path):
        tensors = llama()
        every = {**tensors, **optimizer_beside(tensors, "chained")}
        checkpoint = opened(tmp_path, every, lambda name, t: [(7 * name.startswith("chained"), Box.whole(t.shape))])
        roles = {file.path.name: file.role for file in checkpoint.files}
        assert roles == {
            ".metadata": "weights", "__0_0.distcp": "weights", "__0_1.distcp": "weights", "__7_0.distcp": "optimizer",
            "__7_1.distcp": "optimizer",
        }  # fmt: skip
        assert checkpoint.world_size == 8

    def test_the_weights_are_read_though_the_optimizers_file_is_damaged(self, tmp_path: Path):
        tensors = llama()
        every = {**tensors, **optimizer_beside(tensors, "chained")}
        pieces = {name: [(7 * name.startswith("chained"), Box.whole(tuple(t.shape)))] for name, t in every.items()}
        write_torch_dist(tmp_path, every, pieces)
        (tmp_path / "__7_0.distcp").write_bytes(b"")
        (tmp_path / "__7_1.distcp").unlink()
        assert_read(open_checkpoint(tmp_path), tensors)

    @pytest.mark.parametrize("norms", [True, False])
    @pytest.mark.parametrize(
        "value",
        [None, torch.empty(0, dtype=torch.uint8), io.BytesIO(b"fp8"), {"scale": 1.0}],
        ids=lambda v: type(v).__name__,
    )
    def test_extra_states_of_every_kind(self, tmp_path: Path, value: Any, norms: bool):
        tensors = megatron_state("qwen3_moe")
        sizes = ParallelSizes(layers=2, experts=3, tp=2, pp=2)
        objects = extra_states(tensors, sizes, value, norms=norms)
        checkpoint = opened(tmp_path, tensors, megatron_pieces(sizes), objects=objects)
        assert_read(checkpoint, tensors)
        assert checkpoint.notes == (f"{len(objects)} pickled objects (extra states and the like) left alone",)

    def test_objects_are_never_opened(self, tmp_path: Path):
        tensors = llama()
        objects = {"rng_state/shard_0_1": (0, b"neither zip nor pickle"), "a/shard_0_1": (1, b"")}
        assert_read(opened(tmp_path, tensors, objects=objects), tensors)

    @pytest.mark.parametrize("name", ["args", "iteration", "rerun_state_machine_state", "opt_param_scheduler"])
    def test_other_objects(self, tmp_path: Path, name: str):
        tensors = llama()
        checkpoint = opened(tmp_path, tensors, objects=saved_object(f"{name}/shard_0_1", {"x": 1}))
        assert_read(checkpoint, tensors)
        assert checkpoint.notes == ("1 pickled object (extra states and the like) left alone",)

    @pytest.mark.parametrize(
        ("name", "weight"),
        [
            ("decoder.layers.0.mlp.linear_fc1.weight", True), ("optimizer.state.exp_avg.decoder.x", False),
            ("chained_12.optimizer.x", False), ("rng_state.(0, 1).0.x", False), ("lr_scheduler.x", False),
            ("decoder.optimizer.weight", True), ("optimizers_weight", True),
            ("decoder.layers.0.mlp.linear_fc1._extra_state", False), ("argsort.weight", True),
        ],
    )  # fmt: skip
    def test_what_is_a_weight(self, name: str, weight: bool):
        assert is_weight(name) is weight


class TestChunks:
    def test_they_begin_at_odd_bytes_too(self, tmp_path: Path):
        """Which torch.save makes of odd sizes differs from version to version: an object before them has one."""
        tensors = llama()
        checkpoint = opened(tmp_path, tensors, objects={"args/shard_0_1": (0, bytes(641))})
        assert_read(checkpoint, tensors)
        stored = dcp.FileSystemReader(tmp_path / "dist_ckpt").read_metadata().storage_data.values()
        assert {info.offset % 2 for info in stored} == {0, 1}
        assert {chunk.stored.offset % 4 for t in checkpoint.tensors.values() for chunk in t.chunks} != {0}

    def test_they_are_of_any_number_of_rows(self, tmp_path: Path):
        tensors = megatron_state("llama")
        checkpoint = opened(tmp_path, tensors, uneven_rows(megatron_pieces(TWO_BY_TWO), 3, 2))
        assert_read(checkpoint, tensors)
        rows = {chunk.box.shape[0] for chunk in checkpoint["output_layer.weight"].chunks}
        assert rows == {3, 7, 10}

    @pytest.mark.parametrize("threads", [1, 2, 5])
    def test_a_rank_writes_any_number_of_files(self, tmp_path: Path, threads: int):
        tensors = llama()
        assert_read(opened(tmp_path, tensors, threads=threads), tensors)
        assert len(list(tmp_path.glob("dist_ckpt/__3_*"))) == threads

    def test_each_knows_the_rank_that_wrote_it(self, tmp_path: Path):
        checkpoint = opened(tmp_path, llama())
        chunks = {chunk.box.offset: chunk.rank for chunk in checkpoint["decoder.layers.mlp.linear_fc2.weight"].chunks}
        assert chunks == {(0, 0, 0): 0, (0, 0, 12): 1, (1, 0, 0): 2, (1, 0, 12): 3}
        assert all(chunk.replicas == () for tensor in checkpoint.tensors.values() for chunk in tensor.chunks)

    def test_archives_of_one_length_and_another_shape(self, tmp_path: Path):
        tensors = {
            f"decoder.layers.{n}.w": torch.randn(shape) for n, shape in enumerate([(6, 8), (8, 6), (6, 8), (48,)])
        }
        assert_read(opened(tmp_path, tensors, whole), tensors)

    def test_the_dtype_differs_from_tensor_to_tensor(self, tmp_path: Path):
        tensors = {
            f"decoder.layers.0.{dtype}": torch.arange(24, dtype=torch.uint8).view(dtype)
            for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.float8_e4m3fn)
        }
        assert_read(opened(tmp_path, tensors, whole), tensors)

    def test_a_tensor_without_dimensions(self, tmp_path: Path):
        tensors = {"decoder.layers.0.mlp.router.count": torch.tensor(3.5), "decoder.layers.0.x": torch.randn(1, 1, 3)}
        assert_read(opened(tmp_path, tensors, whole), tensors)

    def test_a_tensor_without_elements(self, tmp_path: Path):
        tensors = {"decoder.layers.0.none": torch.empty(0, 5), "decoder.layers.0.some": torch.randn(2)}
        assert_read(opened(tmp_path, tensors, whole), tensors)

    def test_a_chunk_that_lies_in_memory_in_another_order(self, tmp_path: Path):
        transposed = torch.randn(5, 3).T
        write_torch_dist(tmp_path, {"decoder.layers.0.w": transposed})
        data = saved(transposed)
        (tmp_path / "__0_0.distcp").write_bytes(data)

        def longer(made: Any) -> None:
            (info,) = made.storage_data.values()
            info.length = len(data)

        edit_metadata(tmp_path, longer)
        found = open_checkpoint(tmp_path)["decoder.layers.0.w"]
        assert found.chunks[0].stored.strides == (1, 3)
        assert bits_of(found.expr) == bits(transposed)

    def test_a_rank_without_rows_says_so_at_the_next_ones_place(self, tmp_path: Path):
        name = "decoder.layers.0.w"
        tensors = {name: torch.randn(6, 2)}
        boxes = [(0, Box((0, 0), (0, 2))), (1, Box((0, 0), (4, 2))), (2, Box((4, 0), (2, 2))), (3, Box((6, 0), (0, 2)))]
        assert_read(opened(tmp_path, tensors, {name: boxes}), tensors)

    def test_a_chunk_that_is_listed_twice_is_one(self, tmp_path: Path):
        tensors = llama()
        write_torch_dist(tmp_path, tensors)

        def doubled(made: Any) -> None:
            for about in made.state_dict_metadata.values():
                about.chunks.extend(about.chunks)

        edit_metadata(tmp_path, doubled)
        checkpoint = open_checkpoint(tmp_path)
        assert_read(checkpoint, tensors)
        assert {len(tensor.chunks) for tensor in checkpoint.tensors.values()} == {1}

    @pytest.mark.parametrize("workers", [1, 8])
    def test_progress_is_told_in_bytes(self, tmp_path: Path, workers: int):
        events: list[Event] = []
        write_torch_dist(tmp_path, llama(), megatron_pieces(TWO_BY_TWO))
        open_torch_dist(tmp_path, OpenOptions(workers=workers, listener=events.append))
        size = sum(path.stat().st_size for path in tmp_path.glob("*.distcp"))
        assert events[0] == Started("reading", size)
        assert events[-1] == Ended("reading")
        assert sum(event.nbytes for event in events if isinstance(event, Advanced)) == size


class TestParallelSizes:
    """What transformer_config.json or the saved arguments say becomes the mesh; it is for display alone."""

    SIZES: ClassVar = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 1,
    }

    def checkpoint(self, directory: Path, tensors: Tensors | None = None, **options: Any) -> Path:
        return write_torch_dist(
            directory / "dist_ckpt", llama() if tensors is None else tensors, megatron_pieces(TWO_BY_TWO), **options
        )

    def test_verls_transformer_config(self, tmp_path: Path):
        self.checkpoint(tmp_path)
        (tmp_path / "transformer_config.json").write_text(json.dumps({**self.SIZES, "activation_func": "silu"}))
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.mesh == (PP, TP)
        assert checkpoint["decoder.layers.mlp.linear_fc2.weight"].placement == "Shard(0)×2 · Shard(2)×2"
        assert checkpoint["decoder.layers.mlp.linear_fc1.weight"].placement == "Shard(0)×2 · Shard(1)×2"
        assert checkpoint["embedding.word_embeddings.weight"].placement == "Shard(0)×2"
        assert checkpoint["decoder.final_layernorm.weight"].placement == "whole"

    def test_the_transformer_config_of_a_dist_ckpt_given_alone(self, tmp_path: Path):
        directory = self.checkpoint(tmp_path)
        (tmp_path / "transformer_config.json").write_text(json.dumps(self.SIZES))
        assert open_checkpoint(directory).mesh == (PP, TP)

    def test_the_arguments_of_megatron_lm(self, tmp_path: Path):
        directory = self.checkpoint(tmp_path)
        arguments = argparse.Namespace(**self.SIZES, rank=0, data_path=["a", {"b": 1}], lr=1e-4)
        torch.save({"args": arguments, "checkpoint_version": 3.0}, directory / "common.pt")
        assert open_checkpoint(tmp_path).mesh == (PP, TP)

    @pytest.mark.parametrize("common", [{}, [], {"args": None}, {"args": argparse.Namespace()}, None])
    def test_a_common_file_that_says_nothing(self, tmp_path: Path, common: Any):
        tensors = llama()
        torch.save(common, self.checkpoint(tmp_path, tensors) / "common.pt")
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.mesh == ()
        assert_read(checkpoint, tensors)

    @pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '{"tensor_model_parallel_size": "two"}', "\x00",
                                         '{"tensor_model_parallel_size": -2, "pipeline_model_parallel_size": null}',
                                         '{"tensor_model_parallel_size": 1e999}'])  # fmt: skip
    def test_a_transformer_config_that_says_nothing(self, tmp_path: Path, content: str):
        tensors = llama()
        self.checkpoint(tmp_path, tensors)
        (tmp_path / "transformer_config.json").write_text(content)
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.mesh == ()
        assert_read(checkpoint, tensors)

    def test_no_common_file_and_no_sizes(self, tmp_path: Path):
        (self.checkpoint(tmp_path) / "common.pt").unlink()
        assert open_checkpoint(tmp_path).mesh == ()
        assert open_checkpoint(self.checkpoint(tmp_path / "19", version="0.19")).mesh == ()

    def test_experts(self, tmp_path: Path):
        tensors = stacked(megatron_state("qwen3_moe"))
        sizes = ParallelSizes(layers=2, experts=3, tp=2, pp=2, ep=3)
        write_torch_dist(tmp_path / "dist_ckpt", tensors, megatron_pieces(sizes))
        said = {**self.SIZES, "expert_model_parallel_size": 3, "expert_tensor_parallel_size": 2}
        (tmp_path / "transformer_config.json").write_text(json.dumps(said))
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.mesh == (PP, MeshAxis("ep", 3, "experts"), TP)
        fc2 = checkpoint["decoder.layers.mlp.experts.experts.linear_fc2.weight"]
        assert fc2.placement == "Shard(0)×2 · Shard(1)×3 · Shard(3)×2"

    def test_megatron_fsdp_cuts_the_piece_of_a_rank_again(self, tmp_path: Path):
        tensors = megatron_fsdp(megatron_state("llama", spec="local", container="ranks"))
        write_fsdp_dtensor(tmp_path / "dist_ckpt", tensors, ParallelSizes(layers=2, tp=2), dp=3)
        (tmp_path / "transformer_config.json").write_text(json.dumps({**self.SIZES, "pipeline_model_parallel_size": 1}))
        gate = open_checkpoint(tmp_path)["model.module.decoder.layers.0.mlp.linear_fc1.weight_w"]
        assert len({chunk.box for chunk in gate.chunks}) == 6
        assert [(axis.name, axis.size, axis.placement) for axis in gate.mesh] == [
            ("tp", 2, "Shard(0)"), ("dp", 3, "Shard(0)")
        ]  # fmt: skip

    def test_halves_of_gate_and_up_are_no_ranks_where_a_size_is_one(self, tmp_path: Path):
        sizes = ParallelSizes(layers=2, experts=3, tp=1, pp=2, ep=3)
        tensors = {**stacked(megatron_state("qwen3_moe")), **stacked(megatron_state("llama"))}
        write_torch_dist(tmp_path / "dist_ckpt", tensors, megatron_pieces(sizes))
        said = {**self.SIZES, "tensor_model_parallel_size": 1, "expert_model_parallel_size": 3}
        (tmp_path / "transformer_config.json").write_text(json.dumps({**said, "expert_tensor_parallel_size": 1}))
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint["decoder.layers.mlp.experts.experts.linear_fc1.weight"].placement == "Shard(0)×2 · Shard(1)×3"
        assert checkpoint["decoder.layers.mlp.linear_fc1.weight"].placement == "Shard(0)×2"
        (tmp_path / "transformer_config.json").unlink()
        fc1 = open_checkpoint(tmp_path)["decoder.layers.mlp.linear_fc1.weight"]
        assert fc1.placement == "Shard(1)×2"  # nothing says that these are halves

    def test_sizes_that_the_chunks_contradict_do_no_harm(self, tmp_path: Path):
        tensors = llama()
        self.checkpoint(tmp_path, tensors)
        (tmp_path / "transformer_config.json").write_text('{"tensor_model_parallel_size": 64}')
        assert_read(open_checkpoint(tmp_path), tensors)


def test_a_changed_version_of_the_index_is_read_as_long_as_it_says_where_the_bytes_are(tmp_path: Path):
    tensors = llama()
    assert_read(opened(tmp_path, tensors, version=like("0.16", index=True, plans="")), tensors)
