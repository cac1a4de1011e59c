"""Megatron's zarr checkpoints (core up to 0.15): a directory for each tensor, with plain JSON and raw chunk files.

Source: zarr v2's storage specification, and megatron/core/dist_checkpointing/strategies/zarr.py, whose bfloat16
arrays name a dtype that zarr itself does not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from nbmerge.dtypes import BY_NAME, DType
from nbmerge.errors import CheckpointError, CorruptFileError, IncompleteCheckpointError, Problem, listing, plural
from nbmerge.expressions import Stored
from nbmerge.geometry import Box, Shape, contiguous_strides, unravel
from nbmerge.json_files import json_object
from nbmerge.layout import LazyTensor, SourceFile
from nbmerge.loaders.assemble import paste
from nbmerge.loaders.base import index_error
from nbmerge.loaders.megatron.contents import Contents
from nbmerge.loaders.megatron.dist import is_weight
from nbmerge.loaders.megatron.recorded import Recorded
from nbmerge.loaders.megatron.sizes import ParallelSizes

_NUMPY = {
    "<f8": "float64", "<f4": "float32", "<f2": "float16", "bfloat16": "bfloat16", "<i8": "int64", "<i4": "int32",
    "<i2": "int16", "|i1": "int8", "|u1": "uint8", "|b1": "bool",
}  # fmt: skip
_MOST_PROBLEMS = 100  # of one array


def open_zarr(directory: Path, recorded: Recorded) -> Contents:
    """The weights of a zarr checkpoint. recorded: what a file beside them says of the run.

    Raises a CheckpointError with all that is wrong.
    """
    stated, unread = recorded
    sizes = ParallelSizes.of(stated.values)
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
        tensors[path.name] = replace(made, ranked=False)
        files += [SourceFile.of(Path(stored.file), "weights") for _, _, stored in found]
        files.append(SourceFile.of(path / ".zarray", "weights"))
    if problems:
        raise index_error(problems, directory)
    beside = len(arrays) - len(weights)
    note = f"{plural(beside, 'tensor')} of the optimizer left alone"
    return Contents(
        layout="Megatron zarr", tensors=tensors, files=tuple(files), world_size=(sizes.tp or 1) * (sizes.pp or 1),
        mesh=sizes.mesh, notes=(*unread, *((note,) if beside else ())), stated=stated,
    )  # fmt: skip


def _array(path: Path) -> tuple[Shape, list[tuple[int, Box, Stored]]]:
    """Shape of an array, and its chunks: box and file of each."""
    shape, chunk, dtype, separator = _header(path / ".zarray")
    found: list[tuple[int, Box, Stored]] = []
    problems: list[Problem] = []
    for index, box in _grid(shape, chunk):
        name = separator.join(map(str, index)) or "0"
        stored = Stored(str(path / name), 0, chunk, contiguous_strides(chunk), dtype)
        if problem := _fault(f"{path.name}: the chunk {name}", path / name, stored.nbytes):
            problems.append(problem)
            if len(problems) == _MOST_PROBLEMS:
                break  # a damaged shape can ask for more chunks than there is memory
        else:
            found.append((0, box, stored.region(Box.whole(box.shape))))  # a chunk at the edge is stored in full size
    if problems:
        raise IncompleteCheckpointError(f"{path.name} is not whole", problems=problems)
    return shape, found


def _fault(what: str, file: Path, size: int) -> Problem | None:
    """What is wrong with a chunk's file, which should have so many bytes."""
    if not file.is_file():
        return Problem(
            f"{what} is missing", where=str(file.parent), why="saving was stopped, or the copy is incomplete",
            fix="copy it from the machine that trained", kind="missing",
        )  # fmt: skip
    if (held := file.stat().st_size) != size:
        return Problem(
            f"{what} has {held:,} bytes, not {size:,}", where=str(file), why="it is cut short or damaged",
            fix="copy it from the machine that trained", kind="missing",
        )  # fmt: skip
    return None


def _grid(shape: Shape, chunk: Shape) -> Iterator[tuple[Shape, Box]]:
    """The number and the box of each chunk, in row-major order and one at a time, however many there are."""
    counts = tuple(-(-size // step) for size, step in zip(shape, chunk, strict=True))
    for number in range(prod(counts)):
        index = unravel(number, counts)
        offset = tuple(i * step for i, step in zip(index, chunk, strict=True))
        extent = tuple(min(step, size - start) for step, size, start in zip(chunk, shape, offset, strict=True))
        yield index, Box(offset, extent)


def _header(path: Path) -> tuple[Shape, Shape, DType, str]:
    """Shape, chunk shape, dtype and the separator in the names of chunk files."""
    header = json_object(path)
    shape, chunk = _sizes(header.get("shape")), _sizes(header.get("chunks"))
    dtype = _NUMPY.get(str(header.get("dtype")))
    separator = header.get("dimension_separator", ".")
    wrong = [
        what
        for what, is_wrong in (
            (f"shape {header.get('shape')}", shape is None),
            (f"chunks {header.get('chunks')}", chunk is None or (shape is not None and len(chunk) != len(shape))),
            (f"dtype {header.get('dtype')}", dtype is None),
            (f"zarr_format {header.get('zarr_format')}", header.get("zarr_format") != 2),
            (f"order {header.get('order')}", header.get("order") != "C"),
            (f"compressor {header.get('compressor')}", bool(header.get("compressor"))),
            (f"filters {header.get('filters')}", bool(header.get("filters"))),
            (f"dimension_separator {separator}", separator not in (".", "/")),
        )
        if is_wrong
    ]
    if shape is None or chunk is None or dtype is None or wrong:
        raise CorruptFileError(
            f"the array {path.parent.name} is not as Megatron writes it: {listing(wrong)}", where=str(path),
            why="Megatron's arrays are uncompressed row-major chunks of format 2; the file is damaged, or another tool "
            "wrote it",
            fix="copy it again from the machine that trained, or convert the checkpoint to torch_dist with Megatron-LM",
        )  # fmt: skip
    return shape, chunk, BY_NAME[dtype], separator


def _sizes(value: Any) -> Shape | None:
    """A list of positive integers, or None for anything else."""
    if isinstance(value, list) and all(type(size) is int and 0 < size < 1 << 63 for size in value):
        return tuple(value)
    return None
