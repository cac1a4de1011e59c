"""The contract that `nbmerge.testing` publishes holds for every loader, on checkpoints of several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbmerge.layout import Checkpoint
from nbmerge.loaders.base import Loader, OpenOptions
from nbmerge.loaders.colossalai import ColossalAILoader
from nbmerge.loaders.dcp.loader import DCPLoader
from nbmerge.loaders.fsdp import FSDPLoader
from nbmerge.loaders.hf import HFLoader
from nbmerge.loaders.megatron import MegatronLoader
from nbmerge.testing import LoaderContract, Tensors
from tests.support.megatron import uneven_rows, whole, write_torch_dist
from tests.support.whole import write_indexed
from tests.support.worlds import write_mesh_world


class TestFSDP(LoaderContract):
    loader = FSDPLoader()

    def write(self, directory: Path, tensors: Tensors) -> None:
        write_mesh_world(directory, tensors, (4,))


class TestMegatronDistributed(LoaderContract):
    loader = MegatronLoader()

    def write(self, directory: Path, tensors: Tensors) -> None:
        write_torch_dist(directory, tensors, pieces=uneven_rows(whole, 3))


class TestDCP(LoaderContract):
    loader = DCPLoader()

    def write(self, directory: Path, tensors: Tensors) -> None:
        write_torch_dist(directory, tensors, uneven_rows(whole, 3), version="torch", threads=1)


class TestDCPByTorchItself(LoaderContract):
    loader = DCPLoader()

    def write(self, directory: Path, tensors: Tensors) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(dict(tensors), checkpoint_id=directory)


class TestHF(LoaderContract):
    loader = HFLoader()

    def write(self, directory: Path, tensors: Tensors) -> None:
        write_indexed(directory, tensors, "model-{:05d}-of-00002.safetensors")


class TestHFPickled(LoaderContract):
    loader = HFLoader()

    def write(self, directory: Path, tensors: Tensors) -> None:
        write_indexed(directory, tensors, "pytorch_model-{:05d}-of-00002.bin")


class TestColossalAI(LoaderContract):
    loader = ColossalAILoader()

    def write(self, directory: Path, tensors: Tensors) -> None:
        write_indexed(directory, tensors, "model-stage-{:05d}-shard-00001.safetensors")


class TestColossalAIPickled(LoaderContract):
    loader = ColossalAILoader()

    def write(self, directory: Path, tensors: Tensors) -> None:
        write_indexed(directory, tensors, "pytorch_model-{:05d}.bin")


class _Forgetful(FSDPLoader):
    """Leaves out what the last rank holds, as a careless loader would."""

    def open(self, directory: Path, options: OpenOptions) -> Checkpoint:
        from dataclasses import replace

        found = super().open(directory, options)
        return replace(found, tensors=dict(list(found.tensors.items())[:-1]))


class _Greedy(FSDPLoader):
    """Claims whatever it sees."""

    def evidence(self, directory: Path) -> tuple[str, ...]:
        return ("a directory",)


def contract_of(made: Loader) -> Any:
    class Contract(TestFSDP):
        loader = made

    return Contract()


def test_finds_a_loader_that_loses_a_tensor(tmp_path: Path):
    with pytest.raises(AssertionError, match="lost"):
        contract_of(_Forgetful()).test_gives_back_even_shards(tmp_path)


def test_finds_a_loader_that_claims_foreign_directories(tmp_path: Path):
    with pytest.raises(AssertionError, match="claims a directory"):
        contract_of(_Greedy()).test_claims_no_foreign_directory(tmp_path)
