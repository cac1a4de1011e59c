"""Whole Megatron checkpoints of the tiny models: tensors under Megatron's names, and what verl lays beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import nbmerge
from nbmerge.report import MergeReport
from tests.support.megatron import whole, write_torch_dist
from tests.support.megatron_forms import padded
from tests.support.megatron_layers import Tensors
from tests.support.megatron_names import to_megatron
from tests.support.messages import refusal
from tests.support.models import published_state, tiny_config, write_config

VOCABULARY = 40  # rows with the padding; 37 without


def megatron_state(model: str, family: str = "", *, dtype: str = "float32", **options: Any) -> Tensors:
    """The tensors of a tiny model layer by layer, the vocabulary padded. options: those of `to_megatron`."""
    published = published_state(model, dtype)
    return padded(to_megatron(family or model, published, tiny_config(model), **options), VOCABULARY)


def write_megatron(
    directory: Path, tensors: Mapping[str, torch.Tensor], config_of: str, *, pieces: Any = whole, **changes: Any
) -> Path:
    """A checkpoint as verl 0.5 to 0.8 lays it out. config_of: the tiny model that its config is of, with changes."""
    write_torch_dist(directory / "dist_ckpt", tensors, pieces)
    write_config(directory / "huggingface", config_of, **changes)
    return directory


def without(tensors: Mapping[str, torch.Tensor], *words: str) -> Tensors:
    """The tensors whose names have none of the words."""
    return {name: tensor for name, tensor in tensors.items() if not any(word in name for word in words)}


def merge_megatron(
    directory: Path, tensors: Mapping[str, torch.Tensor], config_of: str, changes: Mapping[str, Any] | None = None,
    **options: Any,
) -> MergeReport:  # fmt: skip
    """Writes `ckpt` in the directory and merges it into `out`. changes: of the config; options: of the merge."""
    write_megatron(directory / "ckpt", tensors, config_of, **(changes or {}))
    return nbmerge.merge(directory / "ckpt", directory / "out", **options)


def refused_megatron(directory: Path, *args: Any, **options: Any) -> str:
    """The message with which `merge_megatron` is refused while planning; it ends with a fix."""
    message = refusal(nbmerge.PlanError, merge_megatron, directory, *args, **options)
    assert message.splitlines()[-1].startswith("  fix: ")
    assert not (directory / "out").exists()
    return message
