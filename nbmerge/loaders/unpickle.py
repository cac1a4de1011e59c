"""Reads the pickle of a `torch.save` file without running anything of it and without reading tensor data.

Globals are looked up in a closed table of inert stand-ins; storages become byte ranges of the file.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbmerge.dtypes import DType
from nbmerge.errors import CheckpointError, CorruptFileError, UnsafePickleError, UnsupportedCheckpointError
from nbmerge.expressions import Stored
from nbmerge.geometry import Shape
from nbmerge.loaders import standins
from nbmerge.loaders.opcodes import refuse_excess
from nbmerge.loaders.torch_zip import TorchZip


class PickledTensor(Stored):
    """A tensor as a pickle gave it, which the pickle cannot change: BUILD could make it any file of the machine."""

    __slots__ = ()

    def __reduce__(self) -> tuple[type[Stored], tuple[object, ...]]:
        return Stored, (self.file, self.offset, self.shape, self.strides, self.dtype)

    def __setstate__(self, state: object) -> None:
        raise TypeError("a pickle may not change a tensor")


@dataclass(frozen=True)  # no slots: a frozen class with slots has a __setstate__ that changes it
class Storage:
    """A storage of a file: the offset of its first byte, its size in bytes, and its element type."""

    file: str
    offset: int
    size: int
    dtype: DType

    def __setstate__(self, state: object) -> None:
        raise TypeError("a pickle may not change a storage")

    def tensor(self, storage_offset: int, shape: Shape, strides: Shape) -> Stored:
        """The strided tensor over the storage. Raises CorruptFileError where it reaches outside."""
        first = last = 0  # an empty tensor may say any offset: torch keeps that of the tensor it was cut from
        if all(shape):
            first = storage_offset
            last = first + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
        out_of_bounds = last * self.dtype.itemsize > self.size
        if out_of_bounds or storage_offset < 0 or min(shape, default=0) < 0 or min(strides, default=0) < 0:
            raise CorruptFileError(
                f"a tensor of shape {list(shape)} reaches outside its storage of {self.size:,} bytes",
                where=self.file,
                why="the pickle and the archive do not belong together",
                fix="copy the file again from the machine that trained",
            )
        offset = self.offset + first * self.dtype.itemsize
        return PickledTensor(self.file, offset, shape, strides, self.dtype)


def _tensor_v2(storage: Any, storage_offset: Any, size: Any, stride: Any, *rest: Any) -> Stored:
    """torch._utils._rebuild_tensor_v2(storage, storage_offset, size, stride, requires_grad, hooks, metadata)."""
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("_rebuild_tensor_v2 was called without a storage")
    _refuse_lazy(rest[2:], storage)
    return storage.tensor(int(storage_offset), tuple(map(int, size)), tuple(map(int, stride)))


def _refuse_lazy(metadata: Sequence[Any], storage: Storage) -> None:
    """Raises for a view whose bytes are not its values: `tensor.conj()` and its `.imag` are saved as they are held."""
    flags = [flag for each in metadata if isinstance(each, dict) for flag in ("conj", "neg") if each.get(flag)]
    if flags:
        raise UnsupportedCheckpointError(
            "a tensor is stored as the conjugate or the negative of its bytes", where=storage.file,
            why=f"torch keeps it as a view ({', '.join(flags)}) and saves what is behind it",
            fix="save tensor.resolve_conj().resolve_neg()",
        )  # fmt: skip


def _tensor_v3(storage: Any, storage_offset: Any, size: Any, stride: Any, *rest: Any) -> Stored:
    """torch._utils._rebuild_tensor_v3, which names the dtype and whose storage counts bytes."""
    dtype = rest[2]
    if not isinstance(storage, Storage) or not isinstance(dtype, DType):
        raise pickle.UnpicklingError("_rebuild_tensor_v3 was called without a storage or a dtype")
    _refuse_lazy(rest[3:], storage)
    typed = Storage(storage.file, storage.offset, storage.size, dtype)
    return typed.tensor(int(storage_offset), tuple(map(int, size)), tuple(map(int, stride)))


_FUNCTIONS = {
    ("torch._utils", "_rebuild_tensor_v2"): standins.Function(_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): standins.Function(_tensor_v3),
}


class InertUnpickler(pickle.Unpickler):
    """An unpickler with a closed table of names. `allowed` adds to the table of all torch files."""

    def __init__(
        self,
        data: bytes,
        path: Path,
        archive: TorchZip | None = None,
        *,
        allowed: Mapping[tuple[str, str], Any] | None = None,
        trust_pickle: bool = False,
    ) -> None:
        refuse_excess(data, path)
        super().__init__(io.BytesIO(data))
        self._path, self._archive, self._trusted = path, archive, trust_pickle
        self._table = {**standins.TABLE, **_FUNCTIONS, **(allowed or {})}
        self._storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a global. Raises UnsafePickleError for one that is not in the table."""
        found = self._table.get((module, name))
        if found is not None:
            return found
        if self._trusted:
            return super().find_class(module, name)
        raise UnsafePickleError(
            f"the pickle names {module}.{name}, which is not on the allow-list; nothing of it was run",
            where=str(self._path),
            why="a pickle can run any code that it names, so only what checkpoints need is let through",
            fix="if you wrote the file yourself and trust it, pass trust_pickle=True (--trust_pickle)",
        )

    def persistent_load(self, pid: Any) -> Storage:
        """A storage, by its record: ("storage", type, key, location, elements). The location means nothing here."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or self._archive is None:
            raise pickle.UnpicklingError(f"a persistent id that is not torch's, a {type(pid).__name__}")
        dtype, key = pid[1], str(pid[2])
        if not isinstance(dtype, DType):
            raise pickle.UnpicklingError(f"storage {key} has no known element type")
        if key not in self._storages:
            record = self._archive.storage(key)
            self._storages[key] = Storage(str(self._path), record.offset, record.size, dtype)
        return self._storages[key]


def load_torch_file(
    path: Path,
    *,
    allowed: Mapping[tuple[str, str], Any] | None = None,
    trust_pickle: bool = False,
) -> Any:
    """What a `torch.save` file holds, with tensors as `Stored` byte ranges and classes as stand-ins.

    Raises UnsafePickleError, CorruptFileError or UnsupportedCheckpointError, each naming the file.
    """
    archive = TorchZip(path)
    unpickler = InertUnpickler(archive.pickle, path, archive, allowed=allowed, trust_pickle=trust_pickle)
    return run(unpickler, path)


def run(unpickler: pickle.Unpickler, path: Path) -> Any:
    """The object, with any failure of the pickle itself told as CorruptFileError."""
    try:
        return unpickler.load()
    except (UnsafePickleError, CheckpointError):
        raise
    except Exception as error:
        raise CorruptFileError(
            f"the pickle cannot be read: {type(error).__name__}: {error}",
            where=str(path),
            why="it is damaged, or it calls what checkpoints do not need",
            fix="copy the file again from the machine that trained",
        ) from error
