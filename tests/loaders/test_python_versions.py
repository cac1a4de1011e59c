"""What one version of Python pickles otherwise than another is read all the same, whichever Python is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.distributed.checkpoint.planner import WriteItemType

import nbmerge
from nbmerge.loaders.megatron.pickles import ALLOWED, saved_arguments
from nbmerge.loaders.unpickle import load_torch_file
from tests.support import deepspeed
from tests.support.dcp import write_dcp
from tests.support.megatron import write_torch_dist
from tests.support.pickles import Call, Global, write_archive
from tests.support.results import assert_same, bits_of, bits_of_all

TENSORS = {"a.weight": torch.randn(5, 3), "b.bias": torch.randn(7)}


def by_name(member: Any, protocol: int) -> tuple[Any, tuple[Any, str]]:
    """As Python 3.11.0 to 3.11.3, Debian 12's among them, pickle a member of an enum: `getattr(class, name)`."""
    return getattr, (type(member), member.name)


def assert_read(directory: Path) -> None:
    checkpoint = nbmerge.open_checkpoint(directory)
    assert_same({name: bits_of(tensor.expr) for name, tensor in checkpoint.tensors.items()}, bits_of_all(TENSORS))


@pytest.fixture
def enums_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for enum in (_MEM_FORMAT_ENCODING, WriteItemType):
        monkeypatch.setattr(enum, "__reduce_ex__", by_name)


@pytest.mark.usefixtures("enums_by_name")
class TestEnumsByName:
    def test_in_the_index_of_a_distributed_checkpoint(self, tmp_path: Path):
        write_dcp(tmp_path / "ckpt", TENSORS)
        assert b"getattr" in (tmp_path / "ckpt" / ".metadata").read_bytes()
        assert_read(tmp_path / "ckpt")

    @pytest.mark.parametrize("version", ["0.12", "0.15", "0.16"])
    def test_in_the_index_of_megatron_with_its_plans(self, tmp_path: Path, version: str):
        write_torch_dist(tmp_path / "ckpt", TENSORS, version=version)
        assert b"getattr" in (tmp_path / "ckpt" / ".metadata").read_bytes()
        assert_read(tmp_path / "ckpt")

    def test_of_deepspeed_s_stages(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(deepspeed, "_as_enum", lambda stage: (getattr, (type(stage), "gradients")))
        deepspeed.write_deepspeed(tmp_path / "ckpt", deepspeed.Run(TENSORS, stage=2))
        assert_read(tmp_path / "ckpt")


@pytest.mark.parametrize(
    "value",
    [
        Global("signal", "SIGTERM"),  # up to Python 3.10
        Call(Global("builtins", "getattr"), Global("signal", "Signals"), "SIGTERM"),  # 3.11.0 to 3.11.3
        Call(Global("signal", "Signals"), 15),  # from then on
        Call(Global("pathlib", "PosixPath"), "/data"),
        Call(Global("pathlib._local", "PosixPath"), "/data"),  # Python 3.13
    ],
    ids=["a signal", "a signal by name", "a signal by value", "a path", "a path of 3.13"],
)
def test_objects_among_the_arguments_of_a_run_are_left_out(tmp_path: Path, value: Any):
    arguments = Call(Global("argparse", "Namespace"), state={"of_another_python": value, "iteration": 10})
    path = write_archive(tmp_path / "model_optim_rng.pt", {"args": arguments})
    assert saved_arguments(load_torch_file(path, allowed=ALLOWED)) == {"iteration": 10}
