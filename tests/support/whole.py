"""Writes tensors whole into two files and their index, as Hugging Face and ColossalAI do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_indexed(directory: Path, tensors: Mapping[str, torch.Tensor], pattern: str) -> dict[str, str]:
    """Every second tensor into each of two files, whose names the pattern makes of 1 and 2. Returns the index."""
    weight_map: dict[str, str] = {}
    safe = pattern.endswith(".safetensors")
    for number in range(2):
        part = dict(list(tensors.items())[number::2])
        file = pattern.format(number + 1)
        if safe:
            save_file({name: tensor.clone().contiguous() for name, tensor in part.items()}, directory / file)
        else:
            torch.save(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = "model.safetensors.index.json" if safe else "pytorch_model.bin.index.json"
    (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map
