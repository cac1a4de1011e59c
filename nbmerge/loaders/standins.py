"""Inert stand-ins for the classes that checkpoints' pickles name. They carry data and run nothing.

Each is found by module and name in `TABLE`; a pickle that names anything else is refused by the unpickler.
Modules moved between versions of torch: a class is known under every path that a supported version wrote.
"""

from __future__ import annotations

from typing import Any

from nbmerge.dtypes import BY_NAME


class _Frozen(type):
    """The metaclass of stand-ins: a pickle's BUILD cannot change the class itself."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise TypeError(f"a pickle may not set {name!r} on {cls.__name__}")


class StandIn(metaclass=_Frozen):
    """An object of a class that is not imported: its arguments and its state, as the pickle gave them."""

    __slots__ = ("args", "attributes")

    args: tuple[Any, ...]
    attributes: dict[str, Any]

    def __new__(cls, *args: Any) -> StandIn:
        made = super().__new__(cls)
        made.args = args
        made.attributes = {}
        return made

    def __setstate__(self, state: Any) -> None:
        pair = isinstance(state, tuple) and len(state) == 2 and all(s is None or isinstance(s, dict) for s in state)
        for part in state if pair else (state,):
            if isinstance(part, dict):
                self.attributes.update({str(key): value for key, value in part.items()})
            elif part is not None:
                self.attributes["state"] = part

    def get(self, *names: str, default: Any = None) -> Any:
        """The first attribute of these names that the pickle set."""
        for name in names:
            if name in self.attributes:
                return self.attributes[name]
        return default

    def __repr__(self) -> str:
        return f"<stand-in for {type(self).__name__}>"


class StateDict(dict[Any, Any], metaclass=_Frozen):
    """An OrderedDict, which may carry attributes such as `_metadata`."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self)["attributes"] = state


class Size(tuple[int, ...], metaclass=_Frozen):
    """torch.Size."""


class DTensor(StandIn):
    __slots__ = ()


class DTensorSpec(StandIn):
    __slots__ = ()


class TensorMeta(StandIn):
    __slots__ = ()


class ShardOrderEntry(StandIn):
    __slots__ = ()


class DeviceMesh(StandIn):
    __slots__ = ()


class MeshLayout(StandIn):
    __slots__ = ()


class Shard(StandIn):
    __slots__ = ()


class StridedShard(StandIn):
    __slots__ = ()


class Replicate(StandIn):
    __slots__ = ()


class Partial(StandIn):
    __slots__ = ()


class ShardedTensor(StandIn):
    __slots__ = ()


class LocalShard(StandIn):
    __slots__ = ()


class ShardMetadata(StandIn):
    __slots__ = ()


class ShardedTensorMetadata(StandIn):
    __slots__ = ()


class Opaque(StandIn):
    """Something that is carried along and never looked at."""

    __slots__ = ()


class Enumeration(StandIn):
    """A member of an enum: its one argument is its value, or its name where Python 3.11.0 to 3.11.3 pickled it."""

    __slots__ = ()


class TensorClass(StandIn):
    """torch.Tensor or torch.nn.Parameter, named as a type by `_rebuild_from_type_v2`."""

    __slots__ = ()


class Function:
    """A function that a pickle may call. Immutable, so that BUILD cannot touch the function behind it."""

    __slots__ = ("_function",)

    _function: Any

    def __init__(self, function: Any) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError(f"a pickle may not set {name!r} on a function")


def _device(*args: Any) -> str:
    return ":".join(str(arg) for arg in args)


def _getattr(owner: Any, name: Any) -> Any:
    """`getattr` as pickles use it, which looks nothing up.

    For a class inside ShardedTensor's own module, and for members of enums: Python 3.11.0 to 3.11.3 pickles those so.
    """
    if owner is ShardedTensor and name in ("ProcessGroupState",):
        return Opaque
    is_enum = isinstance(owner, type) and issubclass(owner, (Opaque, Enumeration))
    if is_enum and isinstance(name, str) and name.isidentifier() and not name.startswith("_"):
        return owner(name)
    raise TypeError(f"getattr({owner!r}, {name!r}) is not on the allow-list")


def _wrapper_subclass(cls: Any, *args: Any) -> Any:
    """torch._utils._rebuild_wrapper_subclass(cls, dtype, size, stride, storage_offset, layout, device, grad)."""
    made = cls()
    made.attributes.update(dtype=args[0], size=tuple(args[1]))
    return made


def _from_type(function: Any, _type: Any, args: Any, state: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2: the object, then its state. A plain tensor's state is of no use here."""
    made = function(*args)
    if isinstance(made, StandIn):
        made.__setstate__(state)
    return made


def _parameter(data: Any, *_: Any) -> Any:
    return data


_MESH_MODULES = ("torch.distributed.device_mesh", "torch.distributed._tensor.device_mesh")
_TENSOR_MODULES = (
    "torch.distributed.tensor",
    "torch.distributed.tensor._api",
    "torch.distributed._tensor",
    "torch.distributed._tensor.api",
)
_SPEC_MODULES = (
    "torch.distributed.tensor._dtensor_spec",
    "torch.distributed._tensor._dtensor_spec",
    "torch.distributed._tensor.placement_types",
    "torch.distributed.tensor.placement_types",
)
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
    "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "UntypedStorage": "uint8",
}  # fmt: skip
_SHARDED = "torch.distributed._shard."


def _table() -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): StateDict,
        ("torch", "Size"): Size,
        ("torch", "device"): Function(_device),
        ("torch", "Tensor"): TensorClass,
        ("torch.nn.parameter", "Parameter"): TensorClass,
        ("torch.nn.parameter", "Buffer"): TensorClass,
        ("torch.serialization", "_get_layout"): Function(lambda name: str(name)),
        ("torch._tensor", "_rebuild_from_type_v2"): Function(_from_type),
        ("torch._utils", "_rebuild_wrapper_subclass"): Function(_wrapper_subclass),
        ("torch._utils", "_rebuild_parameter"): Function(_parameter),
        ("torch._utils", "_rebuild_parameter_with_state"): Function(_parameter),
        ("torch.distributed._mesh_layout", "_MeshLayout"): MeshLayout,
        ("torch.distributed._mesh_layout", "_FlatLayout"): MeshLayout,
        (_SHARDED + "sharded_tensor.api", "ShardedTensor"): ShardedTensor,
        (_SHARDED + "sharded_tensor.shard", "Shard"): LocalShard,
        (_SHARDED + "metadata", "ShardMetadata"): ShardMetadata,
        (_SHARDED + "sharded_tensor.metadata", "ShardedTensorMetadata"): ShardedTensorMetadata,
        (_SHARDED + "sharded_tensor.metadata", "TensorProperties"): Opaque,
        (_SHARDED + "sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): Opaque,
        (_SHARDED + "sharding_spec.chunk_sharding_spec", "ChunkShardingSpec"): Opaque,
        (_SHARDED + "sharding_spec.api", "EnumerableShardingSpec"): Opaque,
        ("torch.distributed.remote_device", "_remote_device"): Opaque,
    }
    table |= {("torch", name): dtype for name, dtype in BY_NAME.items()}
    table |= {(module, name): BY_NAME[of] for name, of in _STORAGES.items() for module in ("torch", "torch.storage")}
    for module in ("builtins", "__builtin__"):  # protocol 2 writes Python 2's name
        table[module, "getattr"] = Function(_getattr)
    table |= {(module, "DeviceMesh"): DeviceMesh for module in _MESH_MODULES}
    table |= {(module, "DTensor"): DTensor for module in _TENSOR_MODULES}
    for module in _SPEC_MODULES:
        for name, cls in (
            ("DTensorSpec", DTensorSpec), ("TensorMeta", TensorMeta), ("ShardOrderEntry", ShardOrderEntry),
            ("Shard", Shard), ("_StridedShard", StridedShard), ("Replicate", Replicate),
            ("Partial", Partial), ("_Partial", Partial),
        ):  # fmt: skip
            table[module, name] = cls
    return table


TABLE = _table()
