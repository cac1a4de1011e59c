"""Weights for tests: safetensors directories of tensors that a test has in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from nbmerge.weights import Weights, weights_of


def save(directory: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A directory of one safetensors file."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def weights(directory: Path, tensors: Mapping[str, torch.Tensor]) -> Weights:
    """The same, opened."""
    return weights_of(save(directory, tensors))
