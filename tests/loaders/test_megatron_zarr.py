"""Megatron's zarr checkpoints: a directory for each tensor, raw chunk files in it, and no library of zarr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import nbmerge
from nbmerge import Checkpoint, IncompleteCheckpointError, UnsupportedCheckpointError, open_checkpoint
from nbmerge.layout import MeshAxis
from tests.support.megatron import megatron_pieces, metadata_json, whole
from tests.support.megatron_forms import optimizer_beside
from tests.support.megatron_layers import Tensors
from tests.support.megatron_objects import extra_states
from tests.support.megatron_others import write_zarr
from tests.support.megatron_runs import PARALLEL, TWO_BY_TWO, llama
from tests.support.messages import assert_says, refusal
from tests.support.models import published_state, write_config
from tests.support.results import assert_same, bits_of, bits_of_all, content_of, saved_bits

NAME = "decoder.layers.0.w"


def assert_read(checkpoint: Checkpoint, want: Tensors) -> None:
    assert_same({name: bits_of(tensor.expr) for name, tensor in checkpoint.tensors.items()}, bits_of_all(want))


def write_array(
    directory: Path, tensor: torch.Tensor, chunk: tuple[int, ...], *, separator: str = ".", **header: Any
) -> Path:
    """A checkpoint of one array, whose chunks at the edges are filled up, as zarr stores them."""
    array = directory / NAME
    array.mkdir(parents=True)
    names = {torch.bfloat16: "bfloat16", torch.float32: "<f4", torch.int64: "<i8", torch.bool: "|b1"}
    about: dict[str, Any] = {
        "zarr_format": 2, "shape": list(tensor.shape), "chunks": list(chunk), "dtype": names[tensor.dtype],
        "order": "C", "compressor": None, "filters": None, "fill_value": None,
    }  # fmt: skip
    if separator != ".":
        about["dimension_separator"] = separator
    (array / ".zarray").write_text(json.dumps({**about, **header}))
    counts = [-(-size // step) for size, step in zip(tensor.shape, chunk, strict=True)]
    for index in torch.cartesian_prod(*map(torch.arange, counts)).reshape(-1, len(counts)).tolist() if counts else [[]]:
        filled = torch.ones(chunk).to(tensor.dtype)
        part = tensor[tuple(slice(i * step, (i + 1) * step) for i, step in zip(index, chunk, strict=True))]
        filled[tuple(map(slice, part.shape))] = part
        path = array / (separator.join(map(str, index)) or "0")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(filled.reshape(-1).view(torch.uint8).numpy().tobytes())
    (directory / "metadata.json").write_text(json.dumps(metadata_json(backend="zarr")))
    return directory


class TestWhatIsRead:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_a_model_with_optimizer_and_extra_states(self, tmp_path: Path, dtype: torch.dtype):
        tensors = {name: tensor.to(dtype) for name, tensor in llama().items()}
        write_zarr(tmp_path, tensors, megatron_pieces(TWO_BY_TWO), objects=extra_states(tensors, TWO_BY_TWO))
        beside = optimizer_beside(tensors)
        write_zarr(tmp_path, beside, whole)
        checkpoint = open_checkpoint(tmp_path)
        assert_read(checkpoint, tensors)
        assert (checkpoint.layout, checkpoint.evidence) == ("Megatron zarr", ("metadata.json: zarr",))
        assert checkpoint.notes == (f"{len(beside)} tensors of the optimizer left alone",)

    def test_it_is_merged(self, tmp_path: Path):
        write_zarr(tmp_path / "actor" / "dist_ckpt", llama(), megatron_pieces(TWO_BY_TWO))
        write_config(tmp_path / "actor" / "huggingface", "llama")
        (tmp_path / "actor" / "transformer_config.json").write_text(json.dumps(PARALLEL))
        checkpoint = open_checkpoint(tmp_path / "actor")
        assert checkpoint.mesh == (MeshAxis("pp", 2, "layers"), MeshAxis("tp", 2, "tensors"))
        assert checkpoint.world_size == 4
        nbmerge.merge(tmp_path / "actor", tmp_path / "out", progress=False)
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(published_state("llama")))

    @pytest.mark.parametrize(
        ("shape", "chunk"),
        [
            ((7, 5), (3, 2)),
            ((7, 5), (7, 5)),
            ((7, 5), (10, 10)),
            ((4,), (3,)),
            ((2, 3, 5), (1, 2, 2)),
            ((), ()),
            ((1,), (1,)),
        ],
    )
    def test_chunks_at_the_edges_are_stored_in_full(self, tmp_path: Path, shape: Any, chunk: Any):
        tensor = torch.randn(shape)
        assert_read(open_checkpoint(write_array(tmp_path, tensor, chunk)), {NAME: tensor})

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool])
    def test_element_types(self, tmp_path: Path, dtype: torch.dtype):
        tensor = torch.randint(0, 2, (5, 3)).to(dtype)
        assert_read(open_checkpoint(write_array(tmp_path, tensor, (2, 2))), {NAME: tensor})

    def test_chunks_in_directories(self, tmp_path: Path):
        tensor = torch.randn(5, 3)
        write_array(tmp_path, tensor, (2, 2), separator="/")
        assert (tmp_path / NAME / "2" / "1").is_file()
        assert_read(open_checkpoint(tmp_path), {NAME: tensor})

    def test_every_file_that_is_read_is_pinned(self, tmp_path: Path):
        checkpoint = open_checkpoint(write_array(tmp_path, torch.randn(5, 3), (2, 3)))
        assert {file.path.name for file in checkpoint.files} == {".zarray", "0.0", "1.0", "2.0"}
        assert {file.role for file in checkpoint.files} == {"weights"}


class TestWhatIsRefused:
    def refused(self, error: type[BaseException], directory: Path) -> str:
        before = content_of(directory)
        message = refusal(error, nbmerge.merge, directory, directory.parent / "out", progress=False)
        assert content_of(directory) == before
        assert not (directory.parent / "out").exists()
        return message

    def test_missing_chunks_are_all_told(self, tmp_path: Path):
        directory = write_array(tmp_path / "ckpt", torch.randn(5, 3), (2, 2))
        for name in ("0.1", "2.0"):
            (directory / NAME / name).unlink()
        message = self.refused(IncompleteCheckpointError, directory)
        assert_says(
            message, "2 problems", f"{NAME}: the chunk 0.1 is missing", "the chunk 2.0", str(directory / NAME), "fix:"
        )

    @pytest.mark.parametrize("change", [b"", b"\x00"])
    def test_a_chunk_of_the_wrong_size(self, tmp_path: Path, change: bytes):
        directory = write_array(tmp_path / "ckpt", torch.randn(5, 3), (2, 2))
        path = directory / NAME / "1.0"
        path.write_bytes((path.read_bytes() + change) if change else path.read_bytes()[:-1])
        message = self.refused(IncompleteCheckpointError, directory)
        assert_says(message, f"the chunk 1.0 has {17 if change else 15} bytes, not 16", str(path), "fix:")

    @pytest.mark.parametrize(
        ("header", "words"),
        [
            ({"compressor": {"id": "blosc"}}, "compressor {'id': 'blosc'}"),
            ({"filters": [{"id": "delta"}]}, "filters"),

            ({"dtype": "<c8"}, "dtype <c8"), ({"dtype": ">f4"}, "dtype >f4"), ({"dtype": [["a", "<f4"]]}, "dtype"),
            ({"dtype": None}, "dtype None"), ({"order": "F"}, "order F"), ({"zarr_format": 3}, "zarr_format 3"),
            ({"chunks": [2]}, "chunks [2]"), ({"chunks": [0, 2]}, "chunks [0, 2]"), ({"chunks": [-1, 2]}, "chunks"),
            ({"chunks": None}, "chunks None"), ({"shape": [5, "3"]}, "shape"), ({"shape": [5, 2.5]}, "shape"),
            ({"shape": {"a": 1}}, "shape"), ({"shape": [2**70, 3]}, "shape"), ({"shape": [0, 3]}, "shape [0, 3]"),
            ({"dimension_separator": "/../../"}, "dimension_separator"),
            ({"dimension_separator": None}, "dimension_separator"),
        ],
    )  # fmt: skip
    def test_an_array_of_another_kind(self, tmp_path: Path, header: dict[str, Any], words: str):
        directory = write_array(tmp_path / "ckpt", torch.randn(5, 3), (2, 2), **header)
        message = self.refused(UnsupportedCheckpointError, directory)
        assert_says(message, NAME, "not as Megatron writes it", words, ".zarray", "why:", "fix:", "torch_dist")

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"shape": [1e999]}'])
    def test_a_header_that_is_none(self, tmp_path: Path, content: bytes):
        directory = write_array(tmp_path / "ckpt", torch.randn(5, 3), (2, 2))
        (directory / NAME / ".zarray").write_bytes(content)
        assert_says(self.refused(UnsupportedCheckpointError, directory), NAME, "not as Megatron writes it", "fix:")

    def test_more_chunks_than_there_is_memory(self, tmp_path: Path):
        directory = write_array(tmp_path / "ckpt", torch.randn(5, 3), (2, 2), shape=[2**40, 2**40])
        assert_says(self.refused(IncompleteCheckpointError, directory), "is missing", "more like these")

    def test_chunks_larger_than_memory(self, tmp_path: Path):
        directory = write_array(tmp_path / "ckpt", torch.randn(5, 3), (2, 2), chunks=[2**31, 2**31])
        assert_says(self.refused(IncompleteCheckpointError, directory), "bytes, not 18,446,744,073,709,551,616")

    def test_optimizer_state_alone(self, tmp_path: Path):
        write_zarr(tmp_path / "ckpt", optimizer_beside(llama()), whole)
        assert_says(self.refused(IncompleteCheckpointError, tmp_path / "ckpt"), "holds no weights", "fix:")
