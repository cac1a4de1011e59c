"""Saves of torch.distributed.checkpoint with other options than usual: each is read right, or refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, filesystem

from nbmerge import AmbiguousCheckpointError, UnsupportedCheckpointError, open_checkpoint
from tests.support.dcp import hf_writer, save_ranks, write_dcp
from tests.support.messages import assert_says, refusal
from tests.support.results import assert_same, bits_of, bits_of_all

TABLE = {"model.layers.0.mlp.weight": torch.arange(35.0).reshape(7, 5), "model.norm.weight": torch.arange(3.0)}


def bits(directory: Path) -> dict[str, Any]:
    opened = open_checkpoint(directory, progress=False)
    return {name: bits_of(opened[name].expr) for name in opened}


@pytest.mark.parametrize("moments", [("step", "exp_avg", "exp_avg_sq"), ("step", "row_var", "col_var")])
def test_a_flat_optimizer_beside_a_flat_model_is_none_of_it(tmp_path: Path, moments: tuple[str, ...]):
    """As get_optimizer_state_dict gives it with flatten_optimizer_state_dict=True; of Adafactor, too."""
    state = {f"state.{name}.{moment}": torch.ones(2) for name in TABLE for moment in moments}
    write_dcp(tmp_path, TABLE, beside=state | {f"param_groups.{name}.lr": 0.1 for name in TABLE})
    assert_same(bits(tmp_path), bits_of_all(TABLE))
    assert_says(" ".join(open_checkpoint(tmp_path).notes), "6 tensors of optimizer left alone")


def test_scalars_of_a_consolidated_save_are_those_of_its_shards(tmp_path: Path):
    """torch 2.13 writes 0 in their place when it consolidates, so that this must not be what comes out."""
    scalar = {"model.layers.0.scale": torch.tensor(3.25)}
    write_dcp(tmp_path, TABLE | scalar, writer=hf_writer(tmp_path, enable_consolidation=True))
    assert (tmp_path / "model-00001-of-00001.safetensors").is_file()
    opened = open_checkpoint(tmp_path)
    assert_same(bits(tmp_path), bits_of_all(TABLE | scalar))
    assert_says(" ".join(opened.notes), "sharded/", "model.layers.0.scale")
    assert [file.path.parent.name for file in opened.files if file.role == "weights"] == [tmp_path.name, "sharded"]


def test_a_nested_state_that_a_planner_did_not_flatten_is_told(tmp_path: Path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    dcp.save({"model": TABLE}, checkpoint_id=tmp_path, planner=DefaultSavePlanner(flatten_state_dict=False))
    said = refusal(UnsupportedCheckpointError, open_checkpoint, tmp_path)
    assert_says(said, "pickled objects: model", "flatten_state_dict=False", "fix:")


def test_one_tensor_in_another_format(tmp_path: Path):
    if not hasattr(filesystem, "SerializationFormat"):
        pytest.skip("this torch has one format only")
    writer = FileSystemWriter(tmp_path, serialization_format=filesystem.SerializationFormat.SAFETENSORS)
    save_ranks(tmp_path, [{"model.norm.weight": torch.ones(3)}], 1, writer)
    said = refusal(UnsupportedCheckpointError, open_checkpoint, tmp_path)
    assert_says(said, "__0_0.distcp holds safetensors", "serialization_format=SAFETENSORS", "fix:")


def test_what_an_extension_of_the_writer_compressed_is_told(tmp_path: Path):
    extension = pytest.importorskip("torch.distributed.checkpoint._extension")  # torch 2.7

    class Same(extension.StreamTransformExtension):
        """Changes nothing; what it is called in the index is what counts."""

        registry_name = classmethod(lambda cls: "stream.same")
        from_descriptor = classmethod(lambda cls, version: cls())
        get_descriptor = lambda self: "stream.same/1"  # noqa: E731
        transform_to = lambda self, output: output  # noqa: E731
        transform_from = lambda self, input: input  # noqa: E731

    save_ranks(tmp_path, [TABLE], 1, FileSystemWriter(tmp_path, _extensions=[Same()]))
    said = refusal(UnsupportedCheckpointError, open_checkpoint, tmp_path)
    assert_says(said, "transformed", "stream.same", ".metadata", "fix:")


def test_what_a_save_left_of_an_earlier_one_is_not_mixed_with_it(tmp_path: Path):
    names = dict(zip(TABLE, (1, 2), strict=True))
    write_dcp(tmp_path, TABLE, writer=hf_writer(tmp_path, fqn_to_index_mapping=names))
    write_dcp(tmp_path, {name: tensor + 1 for name, tensor in TABLE.items()}, writer=hf_writer(tmp_path))
    said = refusal(AmbiguousCheckpointError, open_checkpoint, tmp_path)
    assert_says(said, "files of 2 saves", "count to 1, 2", "*-of-00002.safetensors", "fix:")


def test_links_to_nothing_beside_the_weights_are_no_matter(tmp_path: Path):
    folder = tmp_path / "pytorch_model_fsdp_0"
    write_dcp(folder, TABLE)
    (tmp_path / "optimizer_0").mkdir()
    for link in (folder / "__7_0.distcp", tmp_path / "optimizer_0" / "__0_0.distcp", tmp_path / "scheduler.bin"):
        link.symlink_to("nowhere")
    assert_same(bits(tmp_path), bits_of_all(TABLE))
