"""Finds the bytes of the chunks of a torch.distributed.checkpoint directory inside its `.distcp` files.

Each chunk is a whole `torch.save` archive at a byte range of a file; its tensor's bytes lie somewhere inside.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nbmerge.errors import (
    CheckpointError,
    CorruptFileError,
    IncompleteCheckpointError,
    Problem,
    UnsafePickleError,
    listing,
    plural,
)
from nbmerge.expressions import Stored
from nbmerge.geometry import Box
from nbmerge.loaders.base import OpenOptions
from nbmerge.loaders.dcp.metadata import StoredChunk, StoredObject, TensorEntry
from nbmerge.loaders.reading import is_file, read_all
from nbmerge.loaders.torch_zip import TorchZip
from nbmerge.loaders.unpickle import InertUnpickler, run

_HEAD = 2048  # bytes; the tensor's own begin after about 700
_RANK = re.compile(r"__(\d+)_\d+\.distcp")

Located = dict[str, list[tuple[int, Box, Stored]]]  # tensor → rank that wrote it, box, bytes


@dataclass(frozen=True, slots=True)
class _Template:
    """How the archives of one kind of chunk begin, and the tensor in one that begins at byte 0."""

    head: bytes
    tensor: Stored


def locate(directory: Path, tensors: Mapping[str, TensorEntry], options: OpenOptions) -> Located:
    """The bytes of every chunk of the tensors, with the rank that wrote it. Reads the archives' heads, in parallel.

    Raises IncompleteCheckpointError for missing files, UnsafePickleError for a file outside the directory,
    CorruptFileError for one that is cut short or holds something else; each with all that is wrong.
    """
    by_file: dict[str, list[tuple[str, StoredChunk]]] = {}
    for name, entry in tensors.items():
        for chunk in entry.chunks:
            by_file.setdefault(chunk.file, []).append((name, chunk))
    _check_files(directory, {file: [chunk for _, chunk in chunks] for file, chunks in by_file.items()})
    located: Located = {name: [] for name in tensors}
    problems: list[Problem] = []

    def read(file: str) -> list[Stored | Problem]:
        return _tensors_of_file(directory / file, [(n, c, tensors[n]) for n, c in by_file[file]], options.trust_pickle)

    sizes = {file: sum(chunk.length for _, chunk in chunks) for file, chunks in by_file.items()}
    for file, found in read_all(sizes, options, read).items():
        for (name, chunk), stored in zip(by_file[file], found, strict=True):
            if isinstance(stored, Problem):
                problems.append(stored)
            else:
                located[name].append((rank_of(file), chunk.box, stored))
    if problems:
        raise CorruptFileError(f"{plural(len(problems), 'chunk')} cannot be read in {directory}", problems=problems)
    return located


def read_object(
    directory: Path, place: StoredObject, allowed: Mapping[tuple[str, str], Any], *, trust_pickle: bool
) -> Any:
    """An object of the index, with the names that its pickle may use beside torch's.

    Raises UnsafePickleError for a file outside the directory or a name that is not allowed, a CheckpointError for
    bytes that are not there or no pickle.
    """
    _refuse_outside(directory, [place.file])
    path = directory / place.file
    if not is_file(path) or path.stat().st_size < place.offset + place.length:
        raise CorruptFileError(f"{place.file} ends before byte {place.offset + place.length:,}", where=str(path))
    archive = TorchZip(path, place.offset, place.length)
    return run(InertUnpickler(archive.pickle, path, archive, allowed=allowed, trust_pickle=trust_pickle), path)


def rank_of(file: str) -> int:
    """The global rank that wrote a `__R_T.distcp` file; 0 for a file of another name."""
    match = _RANK.fullmatch(Path(file).name)
    return int(match[1]) if match else 0


def _check_files(directory: Path, chunks: Mapping[str, Sequence[StoredChunk]]) -> None:
    """Raises where a file is outside the directory, is not there, or ends before its last chunk."""
    _refuse_outside(directory, chunks)
    missing = [file for file in chunks if not is_file(directory / file)]
    if missing:
        raise IncompleteCheckpointError(
            f"{plural(len(missing), 'file')} of {len(chunks):,} {'is' if len(missing) == 1 else 'are'} missing",
            where=f"{directory}: {listing(sorted(missing))}",
            why="each node saves to its own disk, or saving was stopped",
            fix="copy the missing files from the machines that trained; without them the weights are incomplete",
        )
    short = [
        Problem(
            f"{file} has {size:,} bytes, and chunks of it end at byte {end:,}",
            where=str(directory / file),
            why="the file is cut short: the copy or the save did not finish",
            fix="copy it again from the machine that trained",
            kind="missing",
        )
        for file, of in chunks.items()
        if (size := (directory / file).stat().st_size) < (end := max(chunk.offset + chunk.length for chunk in of))
    ]
    if short:
        raise CorruptFileError(f"{plural(len(short), 'file')} cut short in {directory}", problems=short)


def _refuse_outside(directory: Path, files: Iterable[str]) -> None:
    outside = [file for file in files if Path(file).parts != (file,) or file == ".."]
    if outside:
        raise UnsafePickleError(
            f".metadata names files outside the checkpoint: {listing(outside)}", where=str(directory),
            why="a checkpoint's files lie beside its index; this one was edited, and could read any file",
            fix="use the .metadata that training wrote",
        )  # fmt: skip


def _tensors_of_file(
    path: Path, chunks: Sequence[tuple[str, StoredChunk, TensorEntry]], trust_pickle: bool
) -> list[Stored | Problem]:
    """The tensor of each chunk of one file."""
    templates: dict[int, list[_Template]] = {}  # by length of the archive
    found: list[Stored | Problem] = []
    fd = os.open(path, os.O_RDONLY)
    try:
        for name, chunk, entry in chunks:
            try:
                stored = _tensor(path, fd, chunk, templates.setdefault(chunk.length, []), trust_pickle)
            except CheckpointError as error:
                found.append(replace(error.problem, what=f"{name} at {list(chunk.box.offset)}: {error.problem.what}"))
                continue
            found.append(_checked(name, chunk, entry, stored))
    finally:
        os.close(fd)
    return found


def _tensor(path: Path, fd: int, chunk: StoredChunk, known: list[_Template], trust_pickle: bool) -> Stored:
    """The tensor of a chunk. Archives of chunks of one shape begin alike, so that most need no second look."""
    head = os.pread(fd, min(_HEAD, chunk.length), chunk.offset)
    for template in known:
        if head.startswith(template.head):
            return replace(template.tensor, offset=template.tensor.offset + chunk.offset)
    archive = TorchZip(path, chunk.offset, chunk.length)
    unpickler = InertUnpickler(archive.pickle, path, archive, trust_pickle=trust_pickle)
    stored = run(unpickler, path)
    if not isinstance(stored, Stored):
        raise CorruptFileError(
            f"it holds a {type(stored).__name__}, not a tensor", where=str(path),
            why="the index and the file are not of one save", fix="copy both again from the machine that trained",
        )  # fmt: skip
    relative = stored.offset - chunk.offset
    if stored.numel and relative <= len(head):
        known.append(_Template(head[:relative], replace(stored, offset=relative)))
    return stored


def _checked(name: str, chunk: StoredChunk, entry: TensorEntry, stored: Stored) -> Stored | Problem:
    if (stored.shape, stored.dtype) == (chunk.box.shape, entry.dtype) and stored.nbytes <= chunk.length:
        return stored
    return Problem(
        f"{name} at {list(chunk.box.offset)} is {stored.dtype} {list(stored.shape)} in its file, "
        f"and {entry.dtype} {list(chunk.box.shape)} in .metadata",
        where=stored.file,
        why="the index and the file are not of one save",
        fix="copy both again from the machine that trained",
        kind="contradiction",
    )
