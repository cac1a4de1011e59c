"""What a run recorded of its model is found wherever frameworks put it, and what cannot be read is a note."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import nbmerge
from nbmerge import open_checkpoint
from nbmerge.demo.megatron.pieces import ParallelSizes
from tests.support.megatron import megatron_pieces, saved, write_torch_dist
from tests.support.megatron_forms import megatron_fsdp
from tests.support.megatron_models import megatron_state
from tests.support.megatron_objects import saved_object
from tests.support.megatron_others import write_fsdp_dtensor, write_zarr
from tests.support.megatron_ranks import Ranks, arguments_of, gpt, rank_states, write_lm, write_verl
from tests.support.megatron_runs import TWO_BY_TWO, llama, write_run
from tests.support.messages import assert_says
from tests.support.models import published_state, write_config
from tests.support.results import assert_same, bits_of_all, saved_bits

SAID = {"num_attention_heads": 8, "tensor_model_parallel_size": 2}
ARGUMENTS = argparse.Namespace(**SAID)


def stated(directory: Path) -> tuple[dict[str, object], str]:
    """The attention heads that are recorded, and where."""
    found = open_checkpoint(directory).stated
    return {name: found.values[name] for name in SAID}, found.where


class TestWhereItIsFound:
    def test_verls_transformer_config(self, tmp_path: Path):
        write_torch_dist(tmp_path / "dist_ckpt", llama())
        (tmp_path / "transformer_config.json").write_text(json.dumps(SAID))
        assert stated(tmp_path) == (SAID, str(tmp_path / "transformer_config.json"))

    def test_it_comes_before_the_arguments(self, tmp_path: Path):
        directory = write_torch_dist(tmp_path / "dist_ckpt", llama())
        torch.save({"args": argparse.Namespace(num_attention_heads=1)}, directory / "common.pt")
        (tmp_path / "transformer_config.json").write_text(json.dumps(SAID))
        assert stated(tmp_path) == (SAID, str(tmp_path / "transformer_config.json"))

    def test_the_arguments_in_the_common_file(self, tmp_path: Path):
        directory = write_torch_dist(tmp_path / "dist_ckpt", llama())
        torch.save({"args": ARGUMENTS}, directory / "common.pt")
        assert stated(tmp_path) == (SAID, str(directory / "common.pt"))

    def test_the_arguments_in_an_object_of_the_index(self, tmp_path: Path):
        objects = saved_object("common_state/shard_0_1", {"args": ARGUMENTS, "iteration": 10}, rank=1)
        directory = write_torch_dist(tmp_path, llama(), megatron_pieces(TWO_BY_TWO), version="0.19", objects=objects)
        assert stated(tmp_path) == (SAID, f"{directory / '__1_0.distcp'}: common_state/shard_0_1")
        assert open_checkpoint(tmp_path).mesh[0].name == "tp"

    def test_the_arguments_of_megatron_fsdp(self, tmp_path: Path):
        tensors = megatron_fsdp(megatron_state("llama", spec="local", container="ranks"))
        objects = {"args": (0, saved(ARGUMENTS))}
        directory = write_torch_dist(tmp_path / "dist_ckpt", tensors, version="fsdp_dtensor", objects=objects)
        assert stated(directory) == (SAID, f"{directory / '__0_0.distcp'}: args")

    def test_beside_a_zarr_checkpoint(self, tmp_path: Path):
        write_zarr(tmp_path / "dist_ckpt", megatron_state("llama"), megatron_pieces(ParallelSizes(layers=2, tp=2)))
        (tmp_path / "transformer_config.json").write_text(json.dumps(SAID))
        assert stated(tmp_path) == (SAID, str(tmp_path / "transformer_config.json"))

    def test_in_rank_files(self, tmp_path: Path):
        ranks = Ranks(stages=[[2]], tp=2)
        write_lm(tmp_path, rank_states(gpt(2), ranks), arguments_of(ranks, num_attention_heads=8))
        assert stated(tmp_path) == (SAID, str(tmp_path / "mp_rank_00" / "model_optim_rng.pt"))

    def test_beside_rank_files_without_arguments(self, tmp_path: Path):
        write_verl(tmp_path / "model", rank_states(gpt(2), Ranks(stages=[[2]], tp=2)))
        (tmp_path / "transformer_config.json").write_text(json.dumps(SAID))
        assert stated(tmp_path) == (SAID, str(tmp_path / "transformer_config.json"))

    def test_nowhere(self, tmp_path: Path):
        write_torch_dist(tmp_path / "dist_ckpt", llama(), version="0.19")
        found = open_checkpoint(tmp_path)
        assert (found.stated.values, found.stated.where) == ({}, "")
        write_fsdp_dtensor(tmp_path / "f", megatron_fsdp(megatron_state("llama", spec="local", container="ranks")),
                           ParallelSizes(layers=2))  # fmt: skip
        assert open_checkpoint(tmp_path / "f").stated.values == {}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"not a file of torch"])
def test_a_common_file_that_is_damaged_does_not_keep_the_weights_from_being_merged(tmp_path: Path, content: bytes):
    directory = write_run(tmp_path / "ckpt", "megatron_lm")
    common = directory / "iter_0000010" / "common.pt"
    common.write_bytes(content)
    write_config(tmp_path / "hf", "llama")
    report = nbmerge.merge(directory, tmp_path / "out", hf_model_config_path=tmp_path / "hf", progress=False)
    assert_same(saved_bits(tmp_path / "out"), bits_of_all(published_state("llama")))
    assert_says(report.plan.checkpoint.notes[0], "not compared with config.json", str(common), "cannot be read")


class TestRootsOfNeMo:
    """weights/ beside context/, whose config is NeMo's own."""

    def checkpoint(self, directory: Path, **options: Any) -> Path:
        tensors = {f"module.{name}": tensor for name, tensor in llama().items()}
        write_torch_dist(directory / "ckpt" / "weights", tensors, megatron_pieces(TWO_BY_TWO), **options)
        (directory / "ckpt" / "context").mkdir()
        write_config(directory / "hf", "llama")
        return directory / "ckpt"

    def test_are_merged(self, tmp_path: Path):
        directory = self.checkpoint(tmp_path)
        assert open_checkpoint(directory).evidence[0].startswith("weights/.metadata")
        nbmerge.merge(directory, tmp_path / "out", hf_model_config_path=tmp_path / "hf", progress=False)
        assert_same(saved_bits(tmp_path / "out"), bits_of_all(published_state("llama")))

    def test_say_what_is_missing(self, tmp_path: Path):
        directory = self.checkpoint(tmp_path)
        for name in (".metadata", "metadata.json"):
            (directory / "weights" / name).unlink()
        with pytest.raises(nbmerge.NotACheckpointError, match=r"there is no \.metadata"):
            open_checkpoint(directory)

    def test_a_directory_of_other_weights_is_none(self, tmp_path: Path):
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / "__0_0.distcp").write_bytes(b"")
        with pytest.raises(nbmerge.NotACheckpointError, match="no checkpoint that can be read"):
            open_checkpoint(tmp_path)
