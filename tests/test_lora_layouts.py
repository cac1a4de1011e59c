"""One peft model as each framework saves it: folded, split and taken alone, always with peft's own bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

import nbmerge
from tests.support.adapters import Adapted, adapted, save_adapter_config
from tests.support.dcp import write_dcp
from tests.support.deepspeed import Run, write_deepspeed
from tests.support.models import write_config
from tests.support.results import assert_same, saved_bits
from tests.support.whole import write_indexed
from tests.support.worlds import write_mesh_world

Tensors = Mapping[str, torch.Tensor]


def _deepspeed(stage: int) -> Callable[[Path, Tensors], object]:
    """The adapter is trained, and the base model frozen; both in fp32, so that masters are the weights."""

    def write(directory: Path, tensors: Tensors) -> None:
        trained = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
        frozen = {name: tensor for name, tensor in tensors.items() if name not in trained}
        write_deepspeed(directory, Run(trained, stage=stage, world=3, frozen=frozen, dtype=torch.float32))

    return write


WRITERS: Mapping[str, Callable[[Path, Tensors], object]] = {
    "fsdp": lambda directory, tensors: write_mesh_world(directory, dict(tensors), (3,)),
    "dcp": lambda directory, tensors: write_dcp(directory, tensors, (3,)),
    "dcp below model": lambda directory, tensors: write_dcp(directory, tensors, (3,), root=("model",)),
    "zero2": _deepspeed(2),
    "zero3": _deepspeed(3),
    "hf": lambda directory, tensors: write_indexed(directory, tensors, "model-{:05d}-of-00002.safetensors"),
    "hf bin": lambda directory, tensors: write_indexed(directory, tensors, "pytorch_model-{:05d}-of-00002.bin"),
    "colossalai": lambda directory, tensors: write_indexed(directory, tensors, "pytorch_model-{:05d}.bin"),
}


@pytest.fixture(scope="module")
def made() -> Adapted:
    return adapted(target_modules="all-linear")


@pytest.fixture(params=WRITERS)
def ckpt(request: pytest.FixtureRequest, made: Adapted, tmp_path: Path) -> Path:
    """A checkpoint of the whole peft model, with peft's config and the model's beside it."""
    directory = tmp_path / "ckpt"
    directory.mkdir()
    WRITERS[request.param](directory, made.state())
    save_adapter_config(made, directory)
    write_config(tmp_path / "config", "qwen2")
    return directory


@pytest.mark.parametrize("lora", ["fold", "split", "adapter"])
def test_every_layout_of_a_peft_model(ckpt: Path, made: Adapted, tmp_path: Path, lora: str) -> None:
    nbmerge.merge(ckpt, tmp_path / "out", lora=lora, hf_model_config_path=tmp_path / "config")
    if lora != "adapter":
        assert_same(saved_bits(tmp_path / "out"), made.folded() if lora == "fold" else made.base())
    if lora != "fold":
        assert_same(saved_bits(tmp_path / "out" / "lora_adapter"), made.adapter())
