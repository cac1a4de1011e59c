"""The safetensors format: headers to write, headers to read, and how tensors are dealt to files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from nbmerge.dtypes import BY_CODE, DType
from nbmerge.errors import CorruptFileError
from nbmerge.expressions import Expr
from nbmerge.geometry import Shape
from nbmerge.plan import OutputFile, OutputTensor

_AGAIN = "copy or download it again, or write it again: merge once more"
POINTER = b"version https://git-lfs"  # what a file begins with that git-lfs has not fetched
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


def deal(outputs: Mapping[str, Expr], max_shard_size: int, stem: str = "model") -> tuple[OutputFile, ...]:
    """The outputs in files of at most `max_shard_size` bytes of tensors, filled in order.

    A tensor that is larger has a file of its own. The rule of huggingface_hub's
    `split_state_dict_into_shards_factory`.
    """
    shards: list[dict[str, Expr]] = []
    current: dict[str, Expr] = {}
    size = 0
    for name, expr in outputs.items():
        if expr.nbytes > max_shard_size:
            shards.append({name: expr})
            continue
        if size + expr.nbytes > max_shard_size:
            shards.append(current)
            current, size = {}, 0
        current[name] = expr
        size += expr.nbytes
    if current or not shards:
        shards.append(current)
    if len(shards) == 1:
        return (lay_out(f"{stem}.safetensors", shards[0]),)
    return tuple(
        lay_out(f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors", shard)
        for number, shard in enumerate(shards, 1)
    )


def lay_out(name: str, outputs: Mapping[str, Expr]) -> OutputFile:
    """A file of these tensors, widest dtype first and then by name, as the safetensors library orders them.

    That keeps every tensor aligned to its own element size.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    tensors: list[OutputTensor] = []
    at = 0
    for tensor, expr in sorted(outputs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        stop = at + expr.nbytes
        entries[tensor] = {"dtype": expr.dtype.code, "shape": list(expr.shape), "data_offsets": [at, stop]}
        tensors.append(OutputTensor(tensor, expr, at))
        at = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return OutputFile(name, len(text).to_bytes(8, "little") + text, tuple(tensors))


def index_json(files: tuple[OutputFile, ...]) -> bytes:
    """The content of model.safetensors.index.json."""
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(file.data_bytes for file in files)
    count = sum(tensor.expr.numel for file in files for tensor in file.tensors)
    metadata = {"total_parameters": count, "total_size": total}
    content = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a safetensors file: offset of its first byte in the file, in bytes."""

    name: str
    dtype: DType
    shape: Shape
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, by name. Raises CorruptFileError where header and file don't agree."""
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(size - 8, _MAX_HEADER):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            content = json.loads(stream.read(length))
            entries = dict(_entries(content, 8 + length))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFileError(
            f"the safetensors header cannot be read: {error}", where=str(path),
            why="it is the pointer of git-lfs, not the file itself: git lfs pull" if _is_pointer(path) else "",
            fix=_AGAIN,
        ) from error  # fmt: skip
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            raise CorruptFileError(
                f"{entry.name} begins at byte {entry.offset:,}, the tensor before it ends at {end:,}", where=str(path),
                why="tensors of a safetensors file lie one after the other", fix=_AGAIN,
            )  # fmt: skip
        end += entry.nbytes
    if end != size:
        raise CorruptFileError(
            f"the file has {size:,} bytes, its header describes {end:,}", where=str(path),
            why="it is cut short, or has bytes that belong to no tensor", fix=_AGAIN,
        )  # fmt: skip
    return entries


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(POINTER)) == POINTER


def _entries(content: object, start: int) -> Iterator[tuple[str, Entry]]:
    if not isinstance(content, dict):
        raise TypeError("it is no JSON object")
    for name, entry in content.items():
        if name == "__metadata__":
            continue
        code = str(entry["dtype"])
        if code not in BY_CODE:
            raise ValueError(f"{name!r} has elements of type {code!r}, which is not known here")
        dtype, shape = BY_CODE[code], tuple(map(_size, entry["shape"]))
        first, stop = map(_size, entry["data_offsets"])
        if stop - first != prod(shape) * dtype.itemsize:
            raise ValueError(f"{name!r} of shape {list(shape)} and dtype {dtype} has {stop - first:,} bytes")
        yield name, Entry(name, dtype, shape, start + first, stop - first)


def _size(number: object) -> int:
    if not isinstance(number, int) or number < 0:
        raise ValueError(f"{number!r} is no size")
    return number
