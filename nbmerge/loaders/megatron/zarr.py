"""Megatron's zarr checkpoints (core up to 0.15): a directory for each tensor, with plain JSON and raw chunk files.

Source: zarr v2's storage specification, and megatron/core/dist_checkpointing/strategies/zarr.py, whose bfloat16
arrays name a dtype that zarr itself does not know.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbmerge.dtypes import BY_NAME, DType
from nbmerge.errors import CheckpointError, CorruptFileError, IncompleteCheckpointError, Problem, plural
from nbmerge.expressions import Stored
from nbmerge.geometry import Box, Shape, contiguous_strides
from nbmerge.layout import LazyTensor, SourceFile
from nbmerge.loaders.assemble import paste
from nbmerge.loaders.megatron.contents import Contents
from nbmerge.loaders.megatron.dist import is_weight
from nbmerge.loaders.megatron.sizes import ParallelSizes

_NUMPY = {
    "<f8": "float64", "<f4": "float32", "<f2": "float16", "bfloat16": "bfloat16", "<i8": "int64", "<i4": "int32",
    "<i2": "int16", "|i1": "int8", "|u1": "uint8", "|b1": "bool",
}  # fmt: skip


def open_zarr(directory: Path, sizes: ParallelSizes) -> Contents:
    """The weights of a zarr checkpoint. Raises IncompleteCheckpointError and CorruptFileError with all that is wrong."""
    tensors: dict[str, LazyTensor] = {}
    files: list[SourceFile] = []
    problems: list[Problem] = []
    arrays = sorted(path.parent for path in directory.glob("*/.zarray"))
    weights = [path for path in arrays if is_weight(path.name)]
    for path in weights:
        try:
            shape, found = _array(path)
        except CheckpointError as error:
            problems += error.problems
            continue
        made = paste(path.name, shape, found, sizes.axes_of(path.name, (box for _, box, _ in found)))
        if isinstance(made, Problem):
            problems.append(made)
            continue
        tensors[path.name] = made
        files += [SourceFile.of(Path(stored.file), "weights") for _, _, stored in found]
        files.append(SourceFile.of(path / ".zarray", "weights"))
    if problems:
        raise IncompleteCheckpointError(f"{plural(len(problems), 'problem')} in {directory}", problems=problems)
    beside = len(arrays) - len(weights)
    note = f"{plural(beside, 'tensor')} of the optimizer left alone"
    return Contents(
        layout="Megatron zarr", tensors=tensors, files=tuple(files), world_size=max(sizes.tp * sizes.pp, 1),
        mesh=sizes.mesh, notes=(note,) if beside else (),
    )  # fmt: skip


def _array(path: Path) -> tuple[Shape, list[tuple[int, Box, Stored]]]:
    """Shape of an array, and its chunks: box and file of each."""
    shape, chunk, dtype, separator = _header(path / ".zarray")
    found: list[tuple[int, Box, Stored]] = []
    problems: list[Problem] = []
    for index, box in _grid(shape, chunk):
        file = path / (separator.join(map(str, index)) or "0")
        if not file.is_file():
            problems.append(
                Problem(
                    f"{path.name}: the chunk {file.name} is missing",
                    where=str(path),
                    kind="missing",
                    why="saving was stopped, or the copy is incomplete",
                    fix="copy it from the machine that trained",
                )  # fmt: skip
            )
            continue
        stored = Stored(str(file), 0, chunk, contiguous_strides(chunk), dtype)
        if file.stat().st_size != stored.nbytes:
            problems.append(
                Problem(
                    f"{path.name}: the chunk {file.name} has {file.stat().st_size:,} bytes, not {stored.nbytes:,}",
                    where=str(file),
                    why="it is cut short or damaged",
                    fix="copy it from the machine that trained",
                    kind="missing",
                )  # fmt: skip
            )
            continue
        found.append((0, box, stored.region(Box.whole(box.shape))))  # a chunk at the edge is stored in full size
    if problems:
        raise IncompleteCheckpointError(f"{path.name} is not whole", problems=problems)
    return shape, found


def _grid(shape: Shape, chunk: Shape) -> Iterator[tuple[Shape, Box]]:
    """The number and the box of each chunk."""
    for index in itertools.product(*(range(-(-size // step)) for size, step in zip(shape, chunk, strict=True))):
        offset = tuple(i * step for i, step in zip(index, chunk, strict=True))
        extent = tuple(min(step, size - start) for step, size, start in zip(chunk, shape, offset, strict=True))
        yield index, Box(offset, extent)


def _header(path: Path) -> tuple[Shape, Shape, DType, str]:
    """Shape, chunk shape, dtype and the separator in the names of chunk files."""
    try:
        header: dict[str, Any] = json.loads(path.read_bytes())
        shape, chunk = tuple(map(int, header["shape"])), tuple(map(int, header["chunks"]))
        dtype = BY_NAME[_NUMPY[header["dtype"]]]
        plain = header["zarr_format"] == 2 and header["order"] == "C"
        packed = header.get("compressor") or header.get("filters")
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(
            f".zarray is not as Megatron writes it: {type(error).__name__}: {error}", where=str(path),
            fix="copy it again from the machine that trained",
        ) from error  # fmt: skip
    if not plain or packed or len(shape) != len(chunk) or min(chunk, default=1) < 1 or min(shape, default=1) < 0:
        raise CorruptFileError(
            "the array is not of uncompressed row-major chunks, as Megatron writes it", where=str(path),
            fix="convert the checkpoint to torch_dist with Megatron-LM",
        )  # fmt: skip
    return shape, chunk, dtype, str(header.get("dimension_separator", "."))
