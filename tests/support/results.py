"""What is on disk, read without the code under test."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from nbmerge.engine.read import read, to_torch
from nbmerge.engine.sources import LocalFiles
from nbmerge.expressions import Expr
from nbmerge.geometry import Box

Bits = tuple[str, tuple[int, ...], bytes]


def bits(tensor: torch.Tensor) -> Bits:
    """dtype, shape and bytes of a tensor: what must be equal for two to be the same."""
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data


def bits_of(expr: Expr) -> Bits:
    """The same of an expression, read with the engine."""
    with LocalFiles() as sources:
        return bits(to_torch(read(expr, Box.whole(expr.shape), sources), expr.dtype))


def bits_of_all(tensors: dict[str, torch.Tensor]) -> dict[str, Bits]:
    """`bits` of each."""
    return {name: bits(tensor) for name, tensor in tensors.items()}


def saved_bits(directory: Path) -> dict[str, Bits]:
    """The tensors of a directory's safetensors files, as the safetensors library reads them."""
    from safetensors.torch import load_file

    found: dict[str, Bits] = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            assert name not in found, f"{name} is in two files"
            found[name] = bits(tensor)
    return found


def assert_same(got: dict[str, Bits], want: dict[str, Bits]) -> None:
    """Equal names, dtypes, shapes and bytes; a failure names the tensors instead of printing them."""
    assert sorted(got) == sorted(want)
    assert {name: value[:2] for name, value in got.items()} == {name: value[:2] for name, value in want.items()}
    assert [name for name in got if got[name] != want[name]] == []


def receipt_of(directory: Path) -> dict:
    """nbmerge_receipt.json."""
    return json.loads((directory / "nbmerge_receipt.json").read_text())


def open_files() -> int:
    """How many files this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def content_of(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by relative path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
