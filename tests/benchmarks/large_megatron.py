"""Writes a large Megatron torch_dist checkpoint, TP 2 × PP 2, with torch's own classes and archives, in one process."""

from __future__ import annotations

from pathlib import Path

import torch

from nbmerge.demo.megatron.names import megatron_tensors
from nbmerge.demo.megatron.pieces import ParallelSizes
from tests.benchmarks.large_checkpoint import config_of
from tests.support.megatron import megatron_pieces, write_torch_dist


def make(directory: Path, gigabytes: float) -> None:
    """A checkpoint of about so many gigabytes of fp32 weights, as verl 0.5 to 0.8 lays it out. Needs twice that."""
    from transformers import Qwen2ForCausalLM

    config = config_of(gigabytes)
    with torch.device("meta"):
        published = Qwen2ForCausalLM(config).state_dict()
    # Random bits would be honest too, but NaNs confuse every reader; a ramp is enough.
    state = {name: torch.arange(t.numel(), dtype=torch.float32).reshape(t.shape) for name, t in published.items()}
    sizes = ParallelSizes(layers=config.num_hidden_layers, tp=2, pp=2)
    write_torch_dist(directory / "dist_ckpt", megatron_tensors(state, config), megatron_pieces(sizes))
    config.save_pretrained(directory / "huggingface")
