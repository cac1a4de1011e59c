"""Universal checkpoints: `zero/NAME/fp32.pt`, the master of one parameter, as ds_to_universal.py writes them.

From stages 1 and 2 a file holds {param: the tensor, cat_dim: …}, from stage 3 the flat tensor, whose shape stands in
the model states. What the optimizer does not have (frozen weights, buffers) may have a file too, as floats even of
integers: the module's own is taken. Source: deepspeed/checkpoint/ds_to_universal.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbmerge.errors import Problem
from nbmerge.expressions import Stored
from nbmerge.geometry import Box, Shape, contiguous_strides
from nbmerge.layout import Chunk, LazyTensor
from nbmerge.loaders.base import OpenOptions, index_error
from nbmerge.loaders.deepspeed.pickles import ALLOWED
from nbmerge.loaders.deepspeed.states import ModelStates
from nbmerge.loaders.reading import read_files
from nbmerge.loaders.unpickle import load_torch_file

_CONVERT = "convert the checkpoint again with ds_to_universal.py"


def universal_masters(
    files: Mapping[str, Path], states: Sequence[ModelStates], options: OpenOptions
) -> dict[str, LazyTensor]:
    """The masters by name. Raises CheckpointError with all that is wrong, UnsafePickleError."""
    shapes = {name: shape for state in states for group in state.groups for name, shape in group.items()}
    folder = next(iter(files.values())).parents[1]
    elsewhere = _in_module(states[0]) if shapes else set()
    files = {name: path for name, path in files.items() if name in shapes or name not in elsewhere}
    contents = read_files(files, options, lambda path: _content(path, options))
    problems = [_missing(name, folder) for name in shapes if name not in files]
    masters: dict[str, LazyTensor] = {}
    for name, content in contents.items():
        stored = _shaped(content, shapes.get(name), files[name])
        if isinstance(stored, Problem):
            problems.append(stored)
        else:
            masters[name] = LazyTensor(name, stored, (Chunk(Box.whole(stored.shape), stored, 0),), ranked=False)
    if problems:
        raise index_error(problems, folder)
    return masters


def _in_module(states: ModelStates) -> set[str]:
    """The names that the module holds whole: of tensor-parallel ranks, only the buffers."""
    if states.model_parallel > 1:
        return states.module.keys() & states.buffers
    return {name for name, stored in states.module.items() if stored.numel or name in states.buffers}


def _missing(name: str, folder: Path) -> Problem:
    return Problem(
        f"there is no {name}/fp32.pt, which has the master of {name}", where=str(folder),
        why="the directory was not copied whole, or the conversion was stopped",
        fix="copy it again, or convert the checkpoint again with ds_to_universal.py", kind="missing",
    )  # fmt: skip


def _content(path: Path, options: OpenOptions) -> Any:
    return load_torch_file(path, allowed=ALLOWED, trust_pickle=options.trust_pickle)


def _shaped(content: Any, shape: Shape | None, path: Path) -> Stored | Problem:
    """The tensor of a file, in the shape that the model states give it where it is flat."""
    stored = content.get("param") if isinstance(content, Mapping) else content
    if not isinstance(stored, Stored):
        return Problem(
            f"the file holds a {type(stored).__name__} where a parameter should be", where=str(path), fix=_CONVERT,
            kind="unsupported",
        )  # fmt: skip
    if isinstance(content, Mapping) or shape is None or stored.shape == shape:
        return stored
    if stored.numel != math.prod(shape) or not stored.is_contiguous:
        return Problem(
            f"the file has {stored.numel:,} elements, its parameter the shape {list(shape)}", where=str(path),
            why="it is of another checkpoint than the model states, or cut short", fix=_CONVERT, kind="contradiction",
        )  # fmt: skip
    return replace(stored, _shape=shape, strides=contiguous_strides(shape))
