"""Writes large checkpoints of the further layouts, in one process, with torch's own archives and safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nbmerge.geometry import Box
from tests.benchmarks.large_checkpoint import config_of
from tests.support.megatron import write_torch_dist

_RANKS = 4


def make_dcp(directory: Path, gigabytes: float) -> None:
    """A torch.distributed.checkpoint directory of four ranks, each with a quarter of every tensor's rows."""
    config, state = _model(gigabytes)
    write_torch_dist(directory, state, _rows, version="torch", threads=1)
    config.save_pretrained(directory / "huggingface")


def make_hf(directory: Path, gigabytes: float) -> None:
    """A Hugging Face directory of many safetensors files."""
    from safetensors.torch import save_file

    config, state = _model(gigabytes)
    config.save_pretrained(directory)
    files = _by_layer(state)
    for number, tensors in enumerate(files, 1):
        save_file(tensors, directory / f"model-{number:05d}-of-{len(files):05d}.safetensors", {"format": "pt"})
    names = {name: f"model-{n:05d}-of-{len(files):05d}.safetensors" for n, t in enumerate(files, 1) for name in t}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def make_colossalai(directory: Path, gigabytes: float) -> None:
    """ColossalAI's sharded pickles: whole tensors in `pytorch_model-00001.bin` and on."""
    config, state = _model(gigabytes)
    config.save_pretrained(directory)
    files = _by_layer(state)
    for number, tensors in enumerate(files, 1):
        torch.save(tensors, directory / f"pytorch_model-{number:05d}.bin")
    names = {name: f"pytorch_model-{n:05d}.bin" for n, tensors in enumerate(files, 1) for name in tensors}
    index = {"metadata": {"total_size": gigabytes * 1e9 / 2**20}, "weight_map": names}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _model(gigabytes: float) -> tuple[Any, dict[str, torch.Tensor]]:
    from transformers import Qwen2ForCausalLM

    config = config_of(gigabytes)
    with torch.device("meta"):
        published = Qwen2ForCausalLM(config).state_dict()
    # Random bits would be honest too, but NaNs confuse every reader; a ramp is enough.
    return config, {n: torch.arange(t.numel(), dtype=torch.float32).reshape(t.shape) for n, t in published.items()}


def _rows(name: str, tensor: torch.Tensor) -> Iterator[tuple[int, Box]]:
    zeros = (0,) * (tensor.dim() - 1)
    at = 0
    for rank, part in enumerate(tensor.chunk(_RANKS)):
        yield rank, Box((at, *zeros), tuple(part.shape))
        at += part.shape[0]


def _by_layer(state: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        words = name.split(".")
        files.setdefault(words[2] if words[1] == "layers" else "", {})[name] = tensor
    return list(files.values())
