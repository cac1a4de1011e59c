"""Reads tensors that are whole on disk: safetensors files and `.bin` files of torch.save, with an index or without."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from nbmerge.engine.safetensors_file import read_header
from nbmerge.errors import CheckpointError, CorruptFileError, Problem, UnsupportedCheckpointError, listing, plural
from nbmerge.expressions import Stored
from nbmerge.geometry import Box, contiguous_strides
from nbmerge.layout import Checkpoint, LazyTensor, SourceFile
from nbmerge.loaders.assemble import paste
from nbmerge.loaders.base import OpenOptions, index_error
from nbmerge.loaders.consolidated import SHARDED, scalars_of_shards
from nbmerge.loaders.pieces import MeshPiece, PlainPiece, piece_of
from nbmerge.loaders.reading import is_file, read_files
from nbmerge.loaders.unpickle import load_torch_file

_ROOTS = ("state_dict", "model", "module")  # keys that trainers put a state dict under
_DEEPEST = 3
_Read = tuple[Mapping[str, Stored], tuple[str, ...]]  # tensors by name, notes


@dataclass(frozen=True)
class WeightFiles:
    """Files that hold a model's tensors together. files: by name in the directory; index: the file that lists them;
    said: tensor → file, as the index has it; empty without one."""

    directory: Path
    files: tuple[str, ...]
    index: str = ""
    said: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Content:
    """tensors: by name; notes: what a reader should know of how they were found."""

    tensors: Mapping[str, Stored]
    notes: tuple[str, ...] = ()


def indexed(directory: Path, index: str) -> WeightFiles:
    """The files that an index names. Raises CorruptFileError for what is no index, or names a file elsewhere."""
    path = directory / index
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise TypeError("it is no JSON object")
        said = content["weight_map"]
        if not isinstance(said, dict) or not said or not all(isinstance(file, str) for file in said.values()):
            raise TypeError("weight_map is no object of tensor names and files")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        detail = f"{error} is not in it" if isinstance(error, KeyError) else str(error)
        raise CorruptFileError(
            f"the index cannot be read: {detail}", where=str(path), fix="copy it again with the files it belongs to"
        ) from error
    files = tuple(dict.fromkeys(said.values()))
    if outside := [file for file in files if not _is_inside(file)]:
        raise CorruptFileError(
            f"the index names {plural(len(outside), 'file')} outside its directory: {listing(outside)}",
            where=str(path), why="the index was edited, or made to read other files of this machine",
            fix="copy it again from where the checkpoint was saved",
        )  # fmt: skip
    return WeightFiles(directory, files, index, said)


def _is_inside(file: str) -> bool:
    parts = PurePosixPath(file)
    return bool(parts.parts) and not parts.is_absolute() and ".." not in parts.parts and "\x00" not in file


def read_whole(found: WeightFiles, options: OpenOptions) -> Content:
    """The tensors of the files. Raises CheckpointError and its kin with all that is wrong."""
    paths = {file: found.directory / file for file in found.files}
    if absent := [_missing(file, found) for file, path in paths.items() if not is_file(path)]:
        raise index_error(absent, found.directory)
    notes: list[str] = []
    held = _readable(read_files(paths, options, lambda path: _tensors_of(path, options.trust_pickle)), found.directory)
    tensors: dict[str, Stored] = {}
    where: dict[str, str] = {}
    problems: list[Problem] = []
    unlisted: list[str] = []
    for file, (entries, said) in held.items():
        notes += said
        for name, stored in entries.items():
            meant = found.said.get(name)
            if meant is not None and meant != file:
                if name not in held[meant][0]:
                    continue  # told below, as missing from the file that should hold it
                unlisted.append(f"{name} in {file}")
            elif name in tensors:
                problems.append(_twice(name, where[name], file))
            else:
                if found.said and meant is None:
                    unlisted.append(f"{name} in {file}")
                tensors[name], where[name] = stored, file
    problems += _not_there(found, held)
    if problems:
        raise index_error(problems, found.directory)
    if unlisted:
        notes.append(f"{plural(len(unlisted), 'tensor')} stored where {found.index} does not say: {listing(unlisted)}")
    if scalars := scalars_of_shards(found.directory, tensors, options):
        notes.append(f"read from {SHARDED}/, since torch's consolidation makes them 0: {listing(scalars)}")
    return Content(tensors | scalars, tuple(notes))


def _readable(read: Mapping[str, _Read | CheckpointError], directory: Path) -> dict[str, _Read]:
    """What was read. Raises where some of it could not be: the one error, or one for all files."""
    errors = [each for each in read.values() if isinstance(each, CheckpointError)]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        kind = type(errors[0])
        problems = [error.problem for error in errors]
        raise kind(f"{plural(len(errors), 'file')} cannot be read", where=str(directory), problems=problems)
    return {file: each for file, each in read.items() if not isinstance(each, CheckpointError)}


def whole_tensors(content: Content) -> dict[str, LazyTensor]:
    """The same as lazy tensors, each of one chunk, which no file says the rank of."""
    made = {name: paste(name, one.shape, [(0, Box.whole(one.shape), one)], ()) for name, one in content.tensors.items()}
    return {name: replace(tensor, ranked=False) for name, tensor in made.items() if isinstance(tensor, LazyTensor)}


def whole_checkpoint(
    found: WeightFiles, options: OpenOptions, *, backend: str, layout: str, path: Path, config_dir: Path | None,
    evidence: Sequence[str], others: Mapping[str, Sequence[Path]], notes: Sequence[str] = (),
    problems: Sequence[Problem] = (),
) -> Checkpoint:  # fmt: skip
    """The checkpoint of these files. others: role → files that are left alone."""
    content = read_whole(found, options)
    if not content.tensors:
        raise UnsupportedCheckpointError(
            "the files hold no tensors", where=f"{found.directory}: {listing(found.files)}",
            fix="pass the directory of a model's weights",
        )  # fmt: skip
    paths = dict.fromkeys(found.directory / file for file in found.files)
    paths |= dict.fromkeys(Path(stored.file) for stored in content.tensors.values())
    files = [SourceFile.of(path, "weights") for path in paths]
    if found.index:
        files.append(SourceFile.of(found.directory / found.index, "index"))
    files += [SourceFile.of(file, role) for role, group in others.items() for file in group]
    return Checkpoint(
        path=path, backend=backend, layout=layout, tensors=whole_tensors(content), world_size=1, files=tuple(files),
        config_dir=options.config_dir or config_dir, evidence=tuple(evidence), notes=(*notes, *content.notes),
        problems=tuple(problems), whole=True,
    )  # fmt: skip


def _missing(file: str, found: WeightFiles) -> Problem:
    count = sum(each == file for each in found.said.values())
    return Problem(
        f"{file} is missing" + (f", and {plural(count, 'tensor')} with it" if count else ""),
        where=str(found.directory),
        why=_why_missing(found.directory / file, found.index),
        fix="copy or download the missing files; if saving was stopped, use an older step",
        kind="missing",
    )


def _why_missing(path: Path, index: str) -> str:
    try:
        return f"it is a link to {path.readlink()}, where nothing is: a Hub cache was copied without its blobs"
    except (OSError, ValueError):  # it is no link, or there is nothing
        return f"{index} names it" if index else "the other files' numbers leave a gap"


def _twice(name: str, first: str, second: str) -> Problem:
    return Problem(
        f"{name} is in two files", where=f"{first}, {second}", why="files of two saves lie in one directory",
        fix="keep the files of one save, and their index", kind="contradiction",
    )  # fmt: skip


def _not_there(found: WeightFiles, held: Mapping[str, _Read]) -> Iterator[Problem]:
    """What the index promises of a file that does not hold it."""
    for name, file in found.said.items():
        if name not in held[file][0]:
            there = next((other for other, (entries, _) in held.items() if name in entries), "no file")
            yield Problem(
                f"{name} is not in {file}; it is in {there}", where=str(found.directory / found.index),
                why="index and files are of two saves, or several ranks wrote one file, of which the last is left",
                fix="copy the files again with the index of the same save; ranks of HuggingFaceStorageWriter need "
                "save_distributed=True",
                kind="missing",
            )  # fmt: skip


def _tensors_of(path: Path, trust_pickle: bool) -> _Read | CheckpointError:
    """A file's tensors by name, with notes, or why it cannot be read. Raises UnsafePickleError."""
    try:
        return _of_safetensors(path) if path.suffix == ".safetensors" else _of_pickle(path, trust_pickle)
    except CheckpointError as error:
        return error


def _of_safetensors(path: Path) -> _Read:
    return {
        name: Stored(str(path), entry.offset, entry.shape, contiguous_strides(entry.shape), entry.dtype)
        for name, entry in read_header(path).items()
    }, ()


def _of_pickle(path: Path, trust_pickle: bool) -> _Read:
    state, root = _state_dict(load_torch_file(path, trust_pickle=trust_pickle), path)
    tensors: dict[str, Stored] = {}
    objects: list[str] = []
    for name, value in state.items():
        stored = _whole(value, str(name), path)
        if stored is None:
            objects.append(str(name))
        else:
            tensors[str(name)] = stored
    notes = [f"{path.name} holds the state dict under {root!r}"] if root else []
    if objects:
        notes.append(
            f"{path.name}: {plural(len(objects), 'entry')} of other kinds than tensors left alone: {listing(objects)}"
        )
    return tensors, tuple(notes)


def _state_dict(state: Any, path: Path) -> tuple[Mapping[Any, Any], str]:
    """The mapping that holds the tensors, and the key that it is under. Raises UnsupportedCheckpointError."""
    keys: list[str] = []
    while isinstance(state, Mapping) and len(keys) <= _DEEPEST:
        key = next((key for key in _ROOTS if isinstance(state.get(key), Mapping)), None)  # even beside a tensor
        if key is None and any(_is_tensor(value) for value in state.values()):
            return state, ".".join(keys)
        if key is None:
            break
        state = state[key]
        keys.append(key)
    held = f"a mapping of {listing(state)}" if isinstance(state, Mapping) else f"a {type(state).__name__}"
    raise UnsupportedCheckpointError(
        f"the file holds no state dict but {held}", where=str(path),
        why=f"tensors are looked for at its root and under {', '.join(_ROOTS)}",
        fix="torch.save(model.state_dict(), FILE)",
    )  # fmt: skip


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Stored) or _is_piece(value)


def _is_piece(value: Any) -> bool:
    """Whether a value is a tensor of some kind, readable or not."""
    try:
        return piece_of(value, 0, "") is not None
    except CheckpointError:
        return True


def _whole(value: Any, name: str, path: Path) -> Stored | None:
    """The tensor of a state dict's value; None for one that is none. Raises UnsupportedCheckpointError for a piece."""
    piece = piece_of(value, 0, f"{name} in {path}")
    if piece is None:
        return None
    if isinstance(piece, PlainPiece):
        return piece.stored
    if isinstance(piece, MeshPiece) and (prod(piece.mesh_shape) == 1 or piece.stored.shape == piece.shape):
        return piece.stored
    raise UnsupportedCheckpointError(
        f"{name} is one rank's piece of a tensor of shape {list(piece.shape)}", where=str(path),
        why="the file was saved from a sharded model, and the other ranks' files are not there",
        fix="save the full state dict, or pass the directory of all ranks' files",
    )  # fmt: skip
