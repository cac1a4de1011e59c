"""The element types that checkpoints hold: torch's name, safetensors' code and the size of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbmerge.errors import UnsupportedCheckpointError


@dataclass(frozen=True)  # no slots: a frozen class with slots has a __setstate__ that changes it
class DType:
    """An element type.

    name: torch's name (`bfloat16`); code: safetensors' code (`BF16`); itemsize: bytes per element.
    """

    name: str
    code: str
    itemsize: int
    is_floating: bool

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Callable[[str], DType], tuple[str]]:
        return parse_dtype, (self.name,)

    def __setstate__(self, state: Any) -> None:
        """There is one object of each type, and a checkpoint's pickle may name it: BUILD must not change it."""
        raise TypeError("a pickle may not change an element type")


# name, safetensors code, bytes, floating. Source of the codes: safetensors' `Dtype` enumeration.
_TABLE = (
    ("float64", "F64", 8, True),
    ("float32", "F32", 4, True),
    ("float16", "F16", 2, True),
    ("bfloat16", "BF16", 2, True),
    ("float8_e4m3fn", "F8_E4M3", 1, True),
    ("float8_e5m2", "F8_E5M2", 1, True),
    ("float8_e8m0fnu", "F8_E8M0", 1, True),
    ("complex64", "C64", 8, False),
    ("int64", "I64", 8, False),
    ("int32", "I32", 4, False),
    ("int16", "I16", 2, False),
    ("int8", "I8", 1, False),
    ("uint64", "U64", 8, False),
    ("uint32", "U32", 4, False),
    ("uint16", "U16", 2, False),
    ("uint8", "U8", 1, False),
    ("bool", "BOOL", 1, False),
)

BY_NAME: dict[str, DType] = {name: DType(name, code, size, floating) for name, code, size, floating in _TABLE}
BY_CODE: dict[str, DType] = {dtype.code: dtype for dtype in BY_NAME.values()}

# torch's other names for the same types, and the short ones that people type.
_ALIASES = {
    "double": "float64", "fp64": "float64",
    "float": "float32", "fp32": "float32",
    "half": "float16", "fp16": "float16",
    "bf16": "bfloat16",
    "cfloat": "complex64",
    "long": "int64", "int": "int32", "short": "int16",
}  # fmt: skip


def parse_dtype(text: str) -> DType:
    """The element type that `text` names: `bfloat16`, `torch.bfloat16`, `bf16` or `BF16`.

    Raises KeyError with the names that are known.
    """
    name = text.removeprefix("torch.")
    found = BY_NAME.get(_ALIASES.get(name.lower(), name.lower())) or BY_CODE.get(name.upper())
    if found is None:
        raise KeyError(f"{text!r} is no element type that safetensors stores; known: {', '.join(BY_NAME)}")
    return found


def torch_dtype(name: str) -> Any:
    """torch's object for the element type. Raises UnsupportedCheckpointError where the installed torch has none."""
    import torch

    found = getattr(torch, name, None)
    if found is None:
        raise UnsupportedCheckpointError(
            f"torch {torch.__version__} has no {name}",
            why="torch does what looks at values or changes them; only a copy needs no torch",
            fix="pip install --upgrade torch (2.7 has float8_e8m0fnu), or leave the cast out",
        )
    return found
