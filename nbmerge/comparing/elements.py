"""What the bits of an element mean: values of every dtype, the order of its bit patterns, and a dtype for two."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from nbmerge.dtypes import BY_NAME, DType, torch_dtype
from nbmerge.engine.read import Words, from_torch, to_torch

Values = npt.NDArray[Any]

# Floating types that hold every value of another one.
_HOLD: dict[str, tuple[str, ...]] = {
    "float8_e4m3fn": ("float16", "bfloat16", "float32", "float64"),
    "float8_e5m2": ("float16", "bfloat16", "float32", "float64"),
    "float8_e8m0fnu": ("bfloat16", "float32", "float64"),
    "float16": ("float32", "float64"),
    "bfloat16": ("float32", "float64"),
    "float32": ("float64",),
    "float64": (),
}
_UNSIGNED_FLOATS = frozenset({"float8_e8m0fnu"})
_TORCH_GRAIN = 32768  # elements below which torch stays on the calling thread


def is_integer(dtype: DType) -> bool:
    """Whether elements are whole numbers; bool counts as 0 and 1."""
    return not dtype.is_floating and dtype.name != "complex64"


def common_dtype(a: DType, b: DType) -> DType | None:
    """The dtype to compare two in: the wider one where it holds every value of the other, else float32.

    Of integers, int64. None where they cannot be compared: an integer with a float, uint64 with a signed one.
    """
    if a == b:
        return a
    if a.is_floating and b.is_floating:
        if is_held(a, b):
            return b
        return a if is_held(b, a) else BY_NAME["float32"]
    if is_integer(a) and is_integer(b) and "uint64" not in (a.name, b.name):
        return BY_NAME["int64"]
    return None


def is_held(narrow: DType, wide: DType) -> bool:
    """Whether a floating dtype holds every value of another one."""
    return wide.name in _HOLD.get(narrow.name, ())


def sign_bit(dtype: DType) -> int:
    """The bit of a word that is the sign; 0 for a dtype without one."""
    return 0 if dtype.name in _UNSIGNED_FLOATS else 1 << (8 * dtype.itemsize - 1)


def widened(words: Words, dtype: DType, out: Values | None = None) -> Values:
    """The elements of a floating dtype as float32, exact but for float64. A view where they are float32 already.

    out: where to put them, a float32 array of the same shape.
    """
    if dtype.name == "float32":
        return words.view(np.float32)
    if out is None:
        out = np.empty(words.shape, np.float32)
    if dtype.name == "bfloat16":
        bits = out.view(np.uint32)
        np.copyto(bits, words)
        np.left_shift(bits, np.uint32(16), out=bits)
    elif dtype.name == "float16":
        _halves(words, out)
    elif dtype.name == "float64":
        np.copyto(out, words.view(np.float64), casting="same_kind")
    else:
        np.take(_table(dtype.name), words, out=out, mode="clip")
    return out


def as_float64(words: Words, dtype: DType) -> Values:
    """The elements of a floating dtype as float64, exact."""
    return words.view(np.float64) if dtype.name == "float64" else widened(words, dtype).astype(np.float64)


def as_integers(words: Words, dtype: DType) -> Values:
    """The elements of an integer dtype as numpy's type of that name; bool as uint8."""
    return words.view(np.uint8 if dtype.name == "bool" else dtype.name)


def converted(words: Words, dtype: DType, to: DType) -> Words:
    """The elements in a dtype that holds their values (see `common_dtype`)."""
    if dtype == to:
        return words
    if is_integer(dtype):
        integers: Words = as_integers(words, dtype).astype(to.name).view(np.uint64)
        return integers
    if to.name == "float64":
        return as_float64(words, dtype).view(np.uint64)
    wide = widened(words, dtype)
    if to.name == "float32":
        return wide.view(np.uint32)
    if to.name == "float16":
        return wide.astype(np.float16).view(np.uint16)
    upper: Words = wide.view(np.uint32) >> np.uint32(16)
    return upper.astype(np.uint16)


def rounded(words: Words, dtype: DType, to: DType) -> Words:
    """The elements rounded to a narrower floating dtype, to the nearest, ties to even, as torch rounds."""
    target = torch_dtype(to.name)
    flat = words.reshape(-1)
    parts = [flat[i : i + _TORCH_GRAIN] for i in range(0, len(flat), _TORCH_GRAIN)]
    return np.concatenate([from_torch(to_torch(part, dtype).to(target), to) for part in parts])


def _halves(words: Words, target: Values) -> None:
    """float16 as float32. torch has an instruction for it that numpy does not use."""
    import torch

    flat = torch.from_numpy(np.ascontiguousarray(words).view(np.float16))
    for start in range(0, len(words), _TORCH_GRAIN):
        stop = start + _TORCH_GRAIN
        torch.from_numpy(target[start:stop]).copy_(flat[start:stop])


@functools.cache
def _table(name: str) -> Values:
    """The 256 values of an 8-bit floating type."""
    import torch

    values: Values = torch.arange(256, dtype=torch.uint8).view(torch_dtype(name)).float().numpy()
    return values
