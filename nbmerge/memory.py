"""Tensors that are in memory already, as a checkpoint: what a merger object is given to save."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nbmerge.dtypes import parse_dtype
from nbmerge.errors import OptionError
from nbmerge.expressions import Compute, Expr, Stored, walk
from nbmerge.layout import Checkpoint, LazyTensor, SourceFile

if TYPE_CHECKING:
    import torch


def checkpoint_of(tensors: Mapping[str, torch.Tensor | LazyTensor], path: Path, config_dir: Path) -> Checkpoint:
    """A checkpoint of these tensors, lazy or not, by name. Raises OptionError for anything else among them."""
    lazy = {name: _lazy(name, tensor) for name, tensor in tensors.items()}
    stored = {node.file for tensor in lazy.values() for node in walk(tensor.expr) if isinstance(node, Stored)}
    return Checkpoint(
        path=path,
        backend="memory",
        layout="tensors in memory",
        tensors=lazy,
        world_size=1,
        files=tuple(SourceFile.of(Path(path), "weights") for path in sorted(stored)),
        config_dir=config_dir,
        origin=uuid.uuid4().hex,  # what a tensor in memory holds is not looked at, so no two are taken for the same
    )


def _lazy(name: str, tensor: torch.Tensor | LazyTensor) -> LazyTensor:
    if isinstance(tensor, LazyTensor):
        return LazyTensor(name, tensor.expr, tensor.chunks, tensor.mesh)
    if not hasattr(tensor, "data_ptr"):
        raise OptionError(f"{name} is a {type(tensor).__name__}", fix="pass torch tensors or nbmerge's lazy tensors")
    held = tensor.detach().cpu().contiguous()  # once, not for every block that is read
    expr: Expr = Compute("in memory", lambda: held, (), tuple(held.shape), parse_dtype(str(held.dtype)))
    return LazyTensor(name, expr)
