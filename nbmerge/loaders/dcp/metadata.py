"""Reads `.metadata`, the index of a torch.distributed.checkpoint directory, without running anything of it.

Written by torch itself or, in Megatron's torch_dist format, by megatron-core, whose versions 0.11 to 0.15 name
classes of their own in it. Source: torch/distributed/checkpoint/metadata.py and filesystem.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from nbmerge.dtypes import DType
from nbmerge.errors import (
    CorruptFileError,
    InconsistentCheckpointError,
    NotACheckpointError,
    UnsupportedCheckpointError,
)
from nbmerge.geometry import Box, Shape
from nbmerge.loaders.rank_shards import begins_as_safetensors
from nbmerge.loaders.standins import Function, Opaque, StandIn
from nbmerge.loaders.unpickle import InertUnpickler, run

METADATA = ".metadata"
_MOST = 1 << 63


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """One chunk of a tensor: its box, and the bytes of `file` (relative to the directory) that hold it, as one zip."""

    box: Box
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of the index: global shape, dtype, and the chunks that it is stored in."""

    shape: Shape
    dtype: DType
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True, slots=True)
class StoredObject:
    """The bytes of `file` (relative to the directory) that hold a pickled object, as one zip."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Index:
    """What `.metadata` says: tensors by name, and where the pickled objects are, None where it names no place."""

    tensors: Mapping[str, TensorEntry]
    objects: Mapping[str, StoredObject | None]

    @property
    def files(self) -> set[str]:
        """Every file that it names, relative to the directory; others beside them are of another save."""
        of_objects = {place.file for place in self.objects.values() if place is not None}
        return of_objects | {chunk.file for entry in self.tensors.values() for chunk in entry.chunks}


class _Record(StandIn):
    """A dataclass of torch that keeps the fields that are looked at, and no other."""

    __slots__ = ()
    kept: ClassVar[frozenset[str]] = frozenset()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = {name: state[name] for name in state if name in self.kept}


class _Metadata(_Record):
    """torch's Metadata, or megatron-core's MCoreMetadata."""

    __slots__ = ()
    kept = frozenset({"state_dict_metadata", "storage_data"})


class _Tensor(_Record):
    """TensorStorageMetadata."""

    __slots__ = ()
    kept = frozenset({"properties", "size", "chunks"})


class _Object(_Record):
    """BytesStorageMetadata."""

    __slots__ = ()


class _Chunk(_Record):
    """ChunkStorageMetadata."""

    __slots__ = ()
    kept = frozenset({"offsets", "sizes"})


class _Key(_Record):
    """MetadataIndex, the key of storage_data. Hashable by identity: its fields come after it is a key."""

    __slots__ = ()
    kept = frozenset({"fqn", "offset"})


class _Storage(_Record):
    """_StorageInfo: where the bytes of an entry are."""

    __slots__ = ()
    kept = frozenset({"relative_path", "offset", "length", "transform_descriptors"})


class _Properties(StandIn):
    """TensorProperties, of which the dtype is looked at."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and state:
            self.attributes["dtype"] = state[0]
        elif isinstance(state, dict):
            self.attributes["dtype"] = state.get("dtype")


class _Ignored(Opaque):
    """The plan that wrote the checkpoint, paths of the training machine and the like: all one object, never kept."""

    __slots__ = ()

    def __new__(cls, *_: Any) -> _Ignored:
        return _IGNORED

    def __setstate__(self, state: Any) -> None:
        """Nothing of it is kept."""


_IGNORED = object.__new__(_Ignored)
_CHECKPOINT = "torch.distributed.checkpoint."
# Element types that torch has and safetensors has not, with their bytes: no weights, but what may lie beside them.
_NOT_STORABLE = {
    "complex128": 16, "complex32": 4, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float4_e2m1fn_x2": 1,
    "quint8": 1, "qint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1,
}  # fmt: skip
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"


def _allowed() -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {
        (_CHECKPOINT + "metadata", "Metadata"): _Metadata,
        (_CHECKPOINT + "metadata", "TensorStorageMetadata"): _Tensor,
        (_CHECKPOINT + "metadata", "BytesStorageMetadata"): _Object,
        (_CHECKPOINT + "metadata", "ChunkStorageMetadata"): _Chunk,
        (_CHECKPOINT + "metadata", "MetadataIndex"): _Key,
        (_CHECKPOINT + "metadata", "TensorProperties"): _Properties,
        ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): _Properties,  # torch before 2.3
        (_CHECKPOINT + "filesystem", "_StorageInfo"): _Storage,
        (_MEGATRON, "MCoreMetadata"): _Metadata,  # 0.15
        (_MEGATRON, "MCoreSavePlan"): _Ignored,  # 0.11 to 0.15
    }
    for name in ("StorageMeta", "_MEM_FORMAT_ENCODING"):
        table[_CHECKPOINT + "metadata", name] = _Ignored
    for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"):
        table[_CHECKPOINT + "planner", name] = _Ignored
    for module in ("pathlib", "pathlib._local"):  # the latter since Python 3.13
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
            table[module, name] = _Ignored
    table["torch.serialization", "_get_layout"] = Function(lambda *_: None)
    table |= {("torch", name): DType(name, "", size, is_floating=False) for name, size in _NOT_STORABLE.items()}
    return table


_ALLOWED = _allowed()


def read_index(directory: Path, *, trust_pickle: bool = False) -> Index:
    """The index of the checkpoint in `directory`.

    Raises NotACheckpointError where there is none, UnsafePickleError for a pickle that names what an index does
    not need, and CorruptFileError for one that is damaged or says less than where each chunk is.
    """
    path = directory / METADATA
    if not path.is_file():
        raise NotACheckpointError(
            "there is no .metadata, the index of a distributed checkpoint", where=str(directory),
            why="it is written last: saving was stopped, or the file was left behind when the rest was copied "
            "(its name begins with a dot)",
            fix="copy it from where the checkpoint was saved, or use an older step",
        )  # fmt: skip
    found = run(InertUnpickler(path.read_bytes(), path, allowed=_ALLOWED, trust_pickle=trust_pickle), path)
    try:
        index = _index(found)
    except UnsupportedCheckpointError as error:
        raise UnsupportedCheckpointError(
            error.problem.what, where=str(path), why=error.problem.why, fix=error.problem.fix
        ) from error
    except Exception as error:  # any object can stand anywhere in a pickle
        raise CorruptFileError(
            f"the index is not as torch writes it: {type(error).__name__}: {error}", where=str(path),
            why="it is damaged, or of a version that is not known",
            fix="copy it again from the machine that trained",
        ) from error  # fmt: skip
    _refuse_safetensors(index.files, path)
    _refuse_shared_bytes(index, path)
    return index


def _index(metadata: Any) -> Index:
    if not isinstance(metadata, _Metadata):
        raise TypeError(f"it holds a {type(metadata).__name__}")
    entries = metadata.get("state_dict_metadata")
    if not isinstance(entries, dict):
        raise TypeError("it has no names of tensors")
    places = _places(metadata.get("storage_data"))
    of_objects = _objects(metadata.get("storage_data"))
    tensors: dict[str, TensorEntry] = {}
    objects: dict[str, StoredObject | None] = {}
    for name, entry in entries.items():
        if not isinstance(name, str):
            raise TypeError(f"a {type(name).__name__} in the place of a name")
        if isinstance(entry, _Tensor):
            tensors[name] = _tensor(name, entry, places)
        else:
            objects[name] = of_objects.get(name)
    return Index(tensors, objects)


_Places = dict[tuple[str, Shape], tuple[str, int, int]]


def _places(storage: Mapping[Any, Any]) -> _Places:
    """(name, offset of the chunk) → file, offset and length in bytes."""
    places: _Places = {}
    for key, info in storage.items():
        offset = key.get("offset")
        if offset is None:  # an object's
            continue
        name, file = key.get("fqn"), info.get("relative_path")
        if not isinstance(name, str) or not isinstance(file, str):
            raise TypeError("bytes without the name of their tensor or of their file")
        if applied := info.get("transform_descriptors"):
            raise UnsupportedCheckpointError(
                f"the bytes of {name} are transformed: {applied}",
                why="FileSystemWriter was given _extensions, which compress or change what it writes",
                fix="load it with torch and save it without extensions",
            )
        at = (name, _shape(offset))
        place = (file, _natural(info.get("offset")), _natural(info.get("length")))
        if places.setdefault(at, place) != place:
            raise ValueError(f"the chunk of {name} at {list(at[1])} is said to be in two places")
    return places


def _objects(storage: Mapping[Any, Any]) -> dict[str, StoredObject]:
    """Where objects are. None of the weights, so that what is wrong with one is no reason to refuse them."""
    found: dict[str, StoredObject] = {}
    for key, info in storage.items():
        name, file = key.get("fqn"), info.get("relative_path")
        if key.get("offset") is None and isinstance(name, str) and isinstance(file, str):
            offset, length = info.get("offset"), info.get("length")
            if all(type(number) is int and 0 <= number < _MOST for number in (offset, length)):
                found[name] = StoredObject(file, offset, length)
    return found


def _tensor(name: str, entry: _Tensor, places: _Places) -> TensorEntry:
    dtype = entry.get("properties").get("dtype")
    if not isinstance(dtype, DType):
        raise TypeError(f"{name} has no dtype")
    shape = _shape(entry.get("size"))
    boxes = dict.fromkeys(
        Box(_shape(chunk.get("offsets")), _shape(chunk.get("sizes"))) for chunk in entry.get("chunks")
    )
    chunks: list[StoredChunk] = []
    for box in boxes:
        if not len(box.offset) == len(box.shape) == len(shape):
            raise ValueError(f"{name} has {len(shape)} dimensions, and a chunk of it {len(box.shape)}")
        if not box.numel and 0 not in shape:
            continue  # of a rank without rows; the next rank's chunk may begin at the same place
        if (name, box.offset) not in places:
            raise ValueError(f"no bytes are named for the chunk of {name} at {list(box.offset)}")
        chunks.append(StoredChunk(box, *places[name, box.offset]))
    if not chunks:
        raise ValueError(f"{name} has no chunks")
    return TensorEntry(shape, dtype, tuple(chunks))


def _shape(sizes: Any) -> Shape:
    if not isinstance(sizes, (tuple, list)):
        raise TypeError(f"a {type(sizes).__name__} in the place of sizes")
    return tuple(map(_natural, sizes))


def _natural(number: Any) -> int:
    if type(number) is not int:
        raise TypeError(f"a {type(number).__name__} in the place of a number")
    if not 0 <= number < _MOST:
        raise ValueError(f"the number {number:.3e} in the place of a size" if number >= 0 else "a size below 0")
    return number


def _refuse_safetensors(files: Iterable[str], path: Path) -> None:
    found = [file for file in files if Path(file).parts == (file,) and begins_as_safetensors(path.parent / file)]
    if found:
        raise UnsupportedCheckpointError(
            f"{min(found)} holds safetensors, not archives of torch.save", where=str(path),
            why="it was saved by FileSystemWriter with serialization_format=SAFETENSORS, which this version does "
            "not read",
            fix="save with torch's default format, or with HuggingFaceStorageWriter(save_distributed=True)",
        )  # fmt: skip


def _refuse_shared_bytes(index: Index, path: Path) -> None:
    """Raises where two chunks have bytes in common: a damaged offset can lead to another chunk of the same form."""
    places = sorted(
        (chunk.file, chunk.offset, chunk.offset + chunk.length, name)
        for name, entry in index.tensors.items()
        for chunk in entry.chunks
    )
    for (file, _, end, name), (other_file, start, _, other) in pairwise(places):
        if file != other_file or start >= end:
            continue
        raise InconsistentCheckpointError(
            f"the index puts {other} where {name} is: byte {start:,} of {file} belongs to both", where=str(path),
            why="the index is damaged or was edited: each chunk has bytes of its own",
            fix="copy it again from the machine that trained",
        )  # fmt: skip
