"""Writes large checkpoints of the further layouts, in one process, with torch's own archives and safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nbmerge.geometry import Box
from tests.benchmarks.large_checkpoint import config_of
from tests.support.deepspeed import deepspeed_classes, model_states, optimizer_states, run_of
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


def make_zero2(directory: Path, gigabytes: float) -> None:
    """DeepSpeed's ZeRO-2: the parameters one after the other in one vector, cut over four ranks."""
    _make_deepspeed(directory, gigabytes, stage=2)


def make_zero3(directory: Path, gigabytes: float) -> None:
    """DeepSpeed's ZeRO-3: each parameter cut over four ranks."""
    _make_deepspeed(directory, gigabytes, stage=3)


def _make_deepspeed(directory: Path, gigabytes: float, stage: int) -> None:
    """fp32 masters without the optimizer's moments, which a merge skips and `cp` would copy."""
    config, state = _model(gigabytes)
    run = run_of(state, stage=stage, world=_RANKS)
    folder = directory / "global_step3"
    folder.mkdir(parents=True)
    for rank in range(_RANKS if stage == 3 else 1):
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        torch.save(model_states(run, rank), folder / name)
    with deepspeed_classes() as classes:
        for rank, optimizer in enumerate(optimizer_states(run, classes)):
            zero = optimizer["optimizer_state_dict"]
            zero["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]["state"] = {}
            torch.save(optimizer, folder / f"{run.prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    (directory / "latest").write_text("global_step3")
    config.save_pretrained(directory)


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
