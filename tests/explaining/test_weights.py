"""Which directories are models: whole tensors, not the pieces of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nbmerge.weights import is_model_directory, weights_of
from tests.support.dcp import hf_writer


def test_a_directory_of_whole_tensors_is_one(tmp_path: Path):
    assert not is_model_directory(tmp_path)
    save_file({"DCP_SHARDING_INFO": torch.zeros(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert is_model_directory(tmp_path)
    assert not is_model_directory(tmp_path / "none")


@pytest.mark.parametrize(
    "content", [b"", b"1234", b"\xff" * 64, b"\x20" + b"\0" * 7 + b"DCP_SHARDING_INFO, not json at all"]
)
def test_a_file_that_cannot_be_read_is_left_to_whoever_reads_it(tmp_path: Path, content: bytes):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert is_model_directory(tmp_path)


@pytest.mark.parametrize(
    "said",
    ["{}", "[]", "no json", '{"a": 3}', '{"a": {}}', '{"a": {"saved_offsets": 3}}', '{"a": {"saved_offsets": [0]}}'],
)
def test_a_header_without_pieces_is_a_models(tmp_path: Path, said: str):
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors", metadata={"DCP_SHARDING_INFO": said})
    assert is_model_directory(tmp_path)


def saved_by_torch(directory: Path, *, save_distributed: bool) -> None:
    from torch.distributed.checkpoint import save

    writer = hf_writer(directory, save_distributed=save_distributed)
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        save({"a.weight": torch.zeros(4, 2)}, storage_writer=writer)


def test_whole_tensors_of_torchs_writer_are_a_models(tmp_path: Path):
    saved_by_torch(tmp_path, save_distributed=False)
    assert is_model_directory(tmp_path)
    assert list(weights_of(tmp_path).tensors) == ["a.weight"]


def assert_is_checkpoint(directory: Path) -> None:
    """Not a model, whose files would be taken one by one, but what torch's pieces make up."""
    assert not is_model_directory(directory)
    weights = weights_of(directory)
    assert weights.kind == "checkpoint"
    assert {name: tensor.shape for name, tensor in weights.tensors.items()} == {"a.weight": (4, 2)}


def test_pieces_of_ranks_are_none_by_their_names(tmp_path: Path):
    saved_by_torch(tmp_path, save_distributed=True)
    assert_is_checkpoint(tmp_path)


def test_pieces_of_ranks_are_none_by_their_headers(tmp_path: Path):
    for rank in range(2):
        said = {"a.weight": {"saved_offsets": [2 * rank, 0]}}
        save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / f"model-{rank}.safetensors",
                  metadata={"DCP_SHARDING_INFO": json.dumps(said)})  # fmt: skip
    assert_is_checkpoint(tmp_path)
