"""Reads the safetensors files of torch's HuggingFaceStorageWriter: each holds one rank's pieces of tensors.

`shard-RRRRR-model-NNNNN-of-MMMMM.safetensors`, ranks and numbers from 1. A header says where each piece begins in its
tensor; the tensor's own shape stands nowhere and is that of all pieces together.
Source: torch/distributed/checkpoint/hf_storage.py and _hf_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nbmerge.engine.safetensors_file import Entry, read_header
from nbmerge.errors import (
    AmbiguousCheckpointError,
    CorruptFileError,
    IncompleteCheckpointError,
    Problem,
    listing,
    plural,
)
from nbmerge.expressions import Stored
from nbmerge.geometry import Box, Shape, contiguous_strides
from nbmerge.loaders.assemble import disagreement
from nbmerge.loaders.base import OpenOptions
from nbmerge.loaders.dcp.storage import Located
from nbmerge.loaders.rank_shards import SHARD, UNREADABLE, saved_offsets
from nbmerge.loaders.reading import read_files

_NUMBERED = re.compile(r"model-(\d+)-of-(\d+)")
_COPY_AGAIN = "copy it again from the machine that trained"


@dataclass(frozen=True)
class Shards:
    """The pieces of every tensor, with the rank that wrote each; the files; what is wrong with them."""

    located: Located
    files: tuple[Path, ...]
    problems: list[Problem] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """Files that a rank has not, and others have: it had nothing for them, or they were lost."""
        there = {(_rank_of(path), match[2]) for path in self.files if (match := SHARD.fullmatch(path.name))}
        absent = [
            f"shard-{rank + 1:05d}-{name}.safetensors"
            for rank in range(self.world_size)
            for name in sorted({name for _, name in there})
            if (rank, name) not in there
        ]
        return [f"other ranks have {listing(absent)}: the rank had nothing for it, or it was lost"] if absent else []

    @property
    def world_size(self) -> int:
        """Ranks that wrote, by the highest number in a file's name."""
        return max(map(_rank_of, self.files), default=0) + 1


def read_shards(directory: Path, options: OpenOptions) -> Shards:
    """The pieces that the files in a directory hold. Reads headers, in parallel.

    Raises IncompleteCheckpointError where all ranks' files of one number are missing, AmbiguousCheckpointError for
    files of two saves.
    """
    files = tuple(path for path in sorted(directory.glob("*.safetensors")) if _speaks_of_pieces(path))
    _check_numbers(directory, files)
    shards = Shards({}, files)
    for path, found in read_files({path: path for path in files}, options, _pieces).items():
        if isinstance(found, Problem):
            shards.problems.append(found)
            continue
        for name, (box, stored) in found.items():
            shards.located.setdefault(name, []).append((_rank_of(path), box, stored))
    if shards.problems:
        raise CorruptFileError(f"{plural(len(shards.problems), 'file')} cannot be read", problems=shards.problems)
    return shards


def shape_of(name: str, pieces: Iterable[tuple[int, Box, Stored]]) -> Shape | Problem:
    """The shape of all pieces together, or the problem that they are not of one tensor."""
    found = list(pieces)
    for what, opinions in (
        ("dtype", [(str(stored.dtype), rank) for rank, _, stored in found]),
        ("number of dimensions", [(str(len(box.shape)), rank) for rank, box, _ in found]),
    ):
        if problem := disagreement(name, what, opinions):
            return problem
    filled = [box for _, box, _ in found if box.numel] or [box for _, box, _ in found]
    return tuple(map(max, zip(*(box.stop for box in filled), strict=True)))


def _speaks_of_pieces(path: Path) -> bool:
    """Whether the file is torch's: beside a rank's pieces, one whose pieces all begin at 0 is the first rank's."""
    try:
        return SHARD.fullmatch(path.name) is not None or bool(saved_offsets(path))
    except UNREADABLE:
        return False


def _rank_of(path: Path) -> int:
    match = SHARD.fullmatch(path.name)
    return max(int(match[1]) - 1, 0) if match else 0


def _check_numbers(directory: Path, files: Iterable[Path]) -> None:
    """Raises where a number that the names count to has no file of any rank, or names count to several numbers.

    One rank alone may have nothing in a file. A save that is written over another leaves its files of other names.
    """
    numbers = [_NUMBERED.fullmatch(match[2]) for path in files if (match := SHARD.fullmatch(path.name))]
    there = {int(match[1]) for match in numbers if match}
    if len(counts := sorted({match[2] for match in numbers if match})) > 1:
        raise AmbiguousCheckpointError(
            f"files of {len(counts)} saves lie in one directory", where=str(directory),
            why=f"their names count to {listing(map(int, counts))}, and all files of a save count to one number",
            fix="move the files of the older save away: " + listing(f"*-of-{each}.safetensors" for each in counts),
        )  # fmt: skip
    count = max((int(match[2]) for match in numbers if match), default=0)
    absent = [number for number in range(1, count + 1) if number not in there]
    if absent:
        raise IncompleteCheckpointError(
            f"of {plural(count, 'file')} of each rank, {len(absent):,} {'is' if len(absent) == 1 else 'are'} missing",
            where=f"{directory}: " + listing(f"shard-*-model-{n:05d}-of-{count:05d}.safetensors" for n in absent),
            why="only a part was copied, or saving was stopped",
            fix="copy the missing files from the machines that trained; without them the weights are incomplete",
        )


def _pieces(path: Path) -> dict[str, tuple[Box, Stored]] | Problem:
    try:
        entries = read_header(path)
        offsets = saved_offsets(path)
    except CorruptFileError as error:
        return replace(error.problem, where=str(path), fix=_COPY_AGAIN)
    except UNREADABLE as error:
        return Problem(
            f"the offsets of its pieces cannot be read: {type(error).__name__}: {error}",
            where=str(path),
            why="the header is not as torch's HuggingFaceStorageWriter writes it",
            fix=_COPY_AGAIN,
        )
    if unplaced := _unplaced(entries, offsets):
        return Problem(
            f"the header does not say where {listing(unplaced)} {'begins' if len(unplaced) == 1 else 'begin'}",
            where=str(path),
            why="the file was written by other means than torch's HuggingFaceStorageWriter, or was edited",
            fix=_COPY_AGAIN,
        )
    return {name: (Box(offsets[name], entry.shape), _stored(path, entry)) for name, entry in entries.items()}


def _unplaced(entries: Mapping[str, Entry], offsets: Mapping[str, Shape]) -> list[str]:
    return [
        name
        for name, entry in entries.items()
        if len(offsets.get(name, (-1,) * 99)) != len(entry.shape) or min(offsets[name], default=0) < 0
    ]


def _stored(path: Path, entry: Entry) -> Stored:
    return Stored(str(path), entry.offset, entry.shape, contiguous_strides(entry.shape), entry.dtype)
