"""The other containers of Megatron: Megatron-FSDP's DTensors, and zarr of versions before 0.16."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from nbmerge.demo.megatron.pieces import ParallelSizes
from tests.support.megatron import (
    Objects,
    Pieces,
    megatron_pieces,
    metadata_json,
    part,
    saved,
    uneven_rows,
    write_torch_dist,
)

_GENERATORS = ("torch_rng_state", "cuda_rng_state", "rng_tracker_states.model-parallel-rng")
_ZARR_TYPES = {
    torch.bfloat16: "bfloat16",
    torch.float32: "<f4",
    torch.float16: "<f2",
    torch.float64: "<f8",
    torch.int64: "<i8",
    torch.uint8: "|u1",
}


def write_fsdp_dtensor(
    directory: Path, tensors: Mapping[str, torch.Tensor], sizes: ParallelSizes, *, dp: int = 2
) -> Path:
    """What Megatron-FSDP saves of the tensors of `megatron_forms.megatron_fsdp`.

    Cut by tensor parallelism as Megatron cuts, then by uneven rows over `dp` ranks; random number generators beside
    them, under keys with brackets; no metadata.json and no common.pt.
    """
    objects: dict[str, tuple[int, bytes]] = {}
    every = dict(tensors)
    for tp in range(sizes.tp):
        prefix = f"rng_state.(0, {tp}).0."
        objects[prefix + "random_rng_state"] = (tp, saved((3, (1, 2), None)))
        objects[prefix + "np_rng_state"] = (tp, saved(("MT19937", [1, 2], 4, 0, 0.0)))
        every |= {prefix + name: torch.arange(24, dtype=torch.uint8) for name in _GENERATORS}
    paths = {key: _path(key) for key in (*every, *objects)}
    pieces = uneven_rows(megatron_pieces(sizes), dp, sizes.tp)
    return write_torch_dist(
        directory, every, pieces, objects=objects, version="fsdp_dtensor", threads=1, planner_data=paths
    )


def _path(key: str) -> tuple[str | int, ...]:
    """Where the value of a flat key was in the nested state dict."""
    first, rest = key.split(".", 1)
    if first != "rng_state":
        return first, rest
    group, _, *names = rest.split(".", 2 if "tracker" not in rest else 3)
    return first, group, 0, *names


def write_zarr(
    directory: Path, tensors: Mapping[str, torch.Tensor], pieces: Pieces, *, objects: Objects | None = None
) -> Path:
    """A directory for each tensor, with a file of raw bytes for each chunk; a file for each object.

    pieces: all of one tensor must be of one shape, which is the chunks' shape.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for key, tensor in tensors.items():
        boxes = [box for _, box in pieces(key, tensor)]
        (shape,) = {box.shape for box in boxes}
        (directory / key).mkdir()
        about = {
            "chunks": list(shape),
            "compressor": None,
            "dtype": _ZARR_TYPES[tensor.dtype],
            "fill_value": None,
            "filters": None,
            "order": "C",
            "shape": list(tensor.shape),
            "zarr_format": 2,
        }
        (directory / key / ".zarray").write_text(json.dumps(about, indent=4))
        for box in boxes:
            index = ".".join(str(at // size) for at, size in zip(box.offset, shape, strict=True))
            raw = part(tensor, box).reshape(-1).view(torch.uint8)
            (directory / key / index).write_bytes(raw.numpy().tobytes())
    for key, (_, data) in (objects or {}).items():
        (directory / f"{key}.pt").parent.mkdir(exist_ok=True)
        (directory / f"{key}.pt").write_bytes(data)
    torch.save({}, directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(metadata_json(backend="zarr")))
    return directory
