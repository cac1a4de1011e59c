"""Archives of torch.save around pickles that torch itself would never write."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Global:
    """Stands for a global in a pickle that is written: nothing of it is imported."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __repr__(self) -> str:
        return f"{self.module}.{self.name}"


class Call:
    """Stands for a call in a pickle that is written."""

    def __init__(self, function: Global, *args: Any, state: Any = None) -> None:
        self.function, self.args, self.state = function, args, state


class StorageOf:
    """Stands for a storage: its persistent id is written as it is given."""

    def __init__(self, *pid: Any) -> None:
        self.pid = pid


class _Writer(pickle._Pickler):  # the Python one, whose single steps can be used
    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, StorageOf):
            self.save(tuple(obj.pid))
            self.write(pickle.BINPERSID)
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(tuple(obj.args))
            self.write(pickle.REDUCE)
            if obj.state is not None:
                self.save(obj.state)
                self.write(pickle.BUILD)
        elif isinstance(obj, bytes) and obj.startswith(b"raw:"):
            self.write(obj[4:])
        else:
            super().save(obj)


def pickled(obj: Any) -> bytes:
    """A pickle of protocol 2 in which Global, Call, StorageOf and b"raw:…" opcodes stand as they are."""
    stream = io.BytesIO()
    _Writer(stream, 2).dump(obj)
    return stream.getvalue()


def storage(key: str = "0", elements: int = 4, kind: str = "FloatStorage") -> StorageOf:
    """A storage as torch.save names it."""
    return StorageOf("storage", Global("torch", kind), key, "cpu", elements)


def tensor(of: Any = None, *, offset: Any = 0, shape: Any = (4,), stride: Any = (1,)) -> Call:
    """A tensor as torch.save writes it."""
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, storage() if of is None else of, offset, shape, stride, False, Call(STATE_DICT))


STATE_DICT = Global("collections", "OrderedDict")


def write_archive(
    path: Path,
    data: Any,
    records: Mapping[str, bytes] | None = None,
    *,
    compression: int = zipfile.ZIP_STORED,
    byteorder: bytes | None = b"little",
    pickle_name: str = "data.pkl",
) -> Path:
    """A file as torch.save lays it out: data.pkl (an object for `pickled`, or its bytes), byteorder and storages."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"archive/{pickle_name}", data if isinstance(data, bytes) else pickled(data))
        if byteorder is not None:
            archive.writestr("archive/byteorder", byteorder)
        for key, content in ({"0": bytes(16)} if records is None else records).items():
            archive.writestr(f"archive/data/{key}", content)
        archive.writestr("archive/version", b"3\n")
    return path


def pickle_of(path: Path) -> bytes:
    """data.pkl of a file of torch.save."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def with_pickle(path: Path, data: bytes) -> None:
    """Writes the file again with another data.pkl; its storages stay."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, data if name.endswith("/data.pkl") else content)


def sparse_file(path: Path, elements: int) -> Path:
    """A torch.save file of one float32 tensor `w` whose bytes are a hole: larger than memory, and no disk is used."""
    size = elements * 4
    text = pickled({"w": tensor(storage(elements=elements), shape=(elements,))})
    with path.open("wb") as stream:
        offsets = []
        for name, content in (("archive/data.pkl", text), ("archive/byteorder", b"little")):
            offsets.append((name, stream.tell(), len(content), zlib.crc32(content)))
            stream.write(_local_header(name, len(content), zlib.crc32(content)) + content)
        offsets.append(("archive/data/0", stream.tell(), size, 0))
        stream.write(_local_header("archive/data/0", size, 0))
        stream.seek(size, 1)
        start = stream.tell()
        for name, offset, length, crc in offsets:
            stream.write(_directory_entry(name, offset, length, crc))
        end = stream.tell()
        stream.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, end - start, start))
        stream.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        stream.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 3, 3, end - start, 0xFFFFFFFF, 0))
    return path


def _local_header(name: str, size: int, crc: int) -> bytes:
    extra = struct.pack("<2H2Q", 1, 16, size, size)
    fixed = struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 33, crc, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra))
    return fixed + name.encode() + extra


def _directory_entry(name: str, offset: int, size: int, crc: int) -> bytes:
    extra = struct.pack("<2H3Q", 1, 24, size, size, offset)
    fixed = struct.pack(
        "<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 33, crc, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra), 0, 0, 0, 0,
        0xFFFFFFFF,
    )  # fmt: skip
    return fixed + name.encode() + extra


def dtensor(
    local: Any,
    *,
    shape: Any = (4,),
    placements: Any = None,
    mesh_shape: Any = (1,),
    coordinate: Any = (0,),
    names: Any = ("fsdp",),
    **spec: Any,
) -> Call:
    """A DTensor as torch 2.13 pickles it, with any values in it."""
    module = "torch.distributed.tensor"
    layout = Global("torch.distributed._mesh_layout", "_FlatLayout")
    axes = tuple(_made(layout, shape=size, stride=1) for size in mesh_shape) if mesh_shape is not None else None
    mesh = _made(
        Global("torch.distributed.device_mesh", "DeviceMesh"), _coordinate_on_dim=coordinate, _mesh_dim_names=names,
        _layout=_made(Global("torch.distributed._mesh_layout", "_MeshLayout"), axes=axes),
    )  # fmt: skip
    meta = Call(Global(f"{module}._dtensor_spec", "TensorMeta"), shape, None, Global("torch", "float32"))
    given = {"mesh": mesh, "placements": (shard(0),) if placements is None else placements, "tensor_meta": meta, **spec}
    return Call(
        Global("torch._tensor", "_rebuild_from_type_v2"),
        Global("torch._utils", "_rebuild_wrapper_subclass"),
        Global(module, "DTensor"),
        (Global(module, "DTensor"), Global("torch", "float32"), shape),
        {"_local_tensor": local, "_spec": _made(Global(f"{module}._dtensor_spec", "DTensorSpec"), **given)},
    )


def shard(dim: Any) -> Call:
    """Shard(dim)."""
    return _made(Global("torch.distributed.tensor.placement_types", "Shard"), dim=dim)


def _made(cls: Global, **attributes: Any) -> Call:
    return Call(cls, state=attributes)
