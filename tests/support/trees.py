"""Random expressions over real bytes in a file, each with the tensor that torch makes of the same operations.

The reference holds bits: integers as wide as the elements, so that NaN payloads and negative zeros count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st

from nbmerge.dtypes import BY_NAME, DType
from nbmerge.expressions import Cast, Compute, Expr, Fill, Paste, Permute, Reshape, Slice, Stored
from nbmerge.geometry import Box

Shape = tuple[int, ...]
Tree = tuple[Expr, torch.Tensor]  # the expression, and its bits

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float64", "int64", "int16", "uint8",
          "bool", "complex64")  # fmt: skip
_CASTS = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NUMPY = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers of their size."""
    return tensor.contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()]).reshape(tensor.shape)


def as_values(bits: torch.Tensor, dtype: DType) -> torch.Tensor:
    """The integers as elements of the dtype."""
    return bits.contiguous().reshape(-1).view(getattr(torch, dtype.name)).reshape(bits.shape)


def data_of(bits: torch.Tensor) -> bytes:
    """The bytes, row by row."""
    return bits.contiguous().reshape(-1).numpy().tobytes()


def shapes(low: int = 0, high: int = 4, *, most: int = 4) -> st.SearchStrategy[Shape]:
    """Shapes of few elements, 0-d and empty ones among them."""
    return st.lists(st.integers(low, high), max_size=most).map(tuple)


class Forest:
    """Grows trees, and writes the bytes that their leaves lie on into one file."""

    def __init__(self, path: Path, draw: Callable[[st.SearchStrategy], object]) -> None:
        self.path = path
        self._draw = draw
        self._random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        self._below_a_cast = False
        self._bytes = bytearray(b"\xa5" * int(draw(st.integers(0, 9))))

    def write(self) -> None:
        """The file, when all trees are grown."""
        self.path.write_bytes(self._bytes)

    def tree(self, shape: Shape, dtype: DType, depth: int = 3) -> Tree:
        """An expression of this shape and dtype."""
        kinds = ["stored", "strided", "fill"]
        if depth:
            kinds += ["slice", "permute", "reshape", "paste", "compute"]
            if not self._below_a_cast:
                kinds += ["compute along"]
            if dtype.name in _CASTS and not (self._below_a_cast and dtype.itemsize == 1):
                kinds += ["cast"]
        make = getattr(self, "_" + str(self._draw(st.sampled_from(kinds[::-1]))).replace(" ", "_"))
        return make(shape, dtype, depth - 1)

    # Leaves

    def _bits(self, shape: Shape, dtype: DType) -> torch.Tensor:
        if dtype.name == "bool":
            return torch.from_numpy(self._random.integers(0, 2, shape, dtype=np.uint8))
        words = self._random.integers(0, 256, math.prod(shape) * dtype.itemsize, dtype=np.uint8)
        bits = torch.from_numpy(words.view(_NUMPY[dtype.itemsize]).reshape(shape))
        if self._below_a_cast:
            bits[as_values(bits, dtype).to(torch.float64).isnan()] = 0
        return bits

    def _store(self, bits: torch.Tensor) -> int:
        """Puts the bytes into the file at any offset, aligned or not; where they begin."""
        self._bytes += b"\x5a" * int(self._draw(st.integers(0, 5)))
        at = len(self._bytes)
        self._bytes += data_of(bits)
        return at

    def _stored(self, shape: Shape, dtype: DType, depth: int) -> Tree:
        bits = self._bits(shape, dtype)
        return Stored(str(self.path), self._store(bits), shape, bits.stride(), dtype), bits

    def _strided(self, shape: Shape, dtype: DType, depth: int) -> Tree:
        """A permuted, padded, partly repeated view of a storage."""
        order = self._draw(st.permutations(range(len(shape))))
        pads = [self._draw(st.tuples(st.integers(0, 2), st.integers(0, 2))) for _ in shape]
        repeated = [bool(self._draw(st.integers(0, 4)) == 0) for _ in shape]
        base = self._bits(tuple(1 if repeated[d] else shape[d] + sum(pads[d]) for d in order), dtype)
        at = self._store(base)
        view = base.permute([order.index(d) for d in range(len(shape))])
        for dim, size in enumerate(shape):
            view = (
                view.expand(*view.shape[:dim], size, *view.shape[dim + 1 :])
                if repeated[dim]
                else view.narrow(dim, pads[dim][0], size)
            )
        offset = at + view.storage_offset() * dtype.itemsize
        return Stored(str(self.path), offset, shape, view.stride(), dtype), view.clone()

    def _fill(self, shape: Shape, dtype: DType, depth: int) -> Tree:
        values = [0.0, 1.0, -0.0, -2.5, float("inf")] if dtype.is_floating else [0.0, 1.0]
        value = float(self._draw(st.sampled_from(values)))
        bits = as_bits(torch.full((), value).to(getattr(torch, dtype.name)))
        return Fill(value, shape, dtype), bits.expand(shape).clone()

    # Views

    def _slice(self, shape: Shape, dtype: DType, depth: int) -> Tree:
        pads = [self._draw(st.tuples(st.integers(0, 2), st.integers(0, 2))) for _ in shape]
        larger = tuple(a + n + b for (a, b), n in zip(pads, shape, strict=True))
        source, bits = self.tree(larger, dtype, depth)
        box = Box(tuple(a for a, _ in pads), shape)
        return Slice(source, box), bits[(*(slice(a, a + n) for (a, _), n in zip(pads, shape, strict=True)), ...)]

    def _permute(self, shape: Shape, dtype: DType, depth: int) -> Tree:
        dims = tuple(self._draw(st.permutations(range(len(shape)))))
        before = tuple(shape[dims.index(d)] for d in range(len(shape)))
        source, bits = self.tree(before, dtype, depth)
        return Permute(source, dims), bits.permute(dims)

    def _reshape(self, shape: Shape, dtype: DType, depth: int) -> Tree:
        sizes = list(shape)
        for _ in range(int(self._draw(st.integers(0, 3)))):
            at = int(self._draw(st.integers(0, max(len(sizes) - 1, 0))))
            kind = self._draw(st.sampled_from(["one", "join", "split", "swap"]))
            if kind == "one" or not sizes:
                if math.prod(sizes) != 1 and len(sizes) > 5:
                    continue
                sizes.insert(at, 1)
            elif kind == "join" and at + 1 < len(sizes):
                sizes[at : at + 2] = [sizes[at] * sizes[at + 1]]
            elif kind == "swap" and at + 1 < len(sizes):
                sizes[at], sizes[at + 1] = sizes[at + 1], sizes[at]
            elif kind == "split":
                factor = next((n for n in (3, 2) if sizes[at] and sizes[at] % n == 0), 1)
                sizes[at : at + 1] = [sizes[at] // factor, factor]
        source, bits = self.tree(tuple(sizes), dtype, depth)
        return Reshape(source, shape), bits.reshape(shape)

    def _paste(self, shape: Shape, dtype: DType, depth: int) -> Tree:
        """Cut twice, along any dimensions, as FSDP over tensor parallel cuts."""
        parts: list[tuple[Shape, Shape]] = [((0,) * len(shape), shape)]
        for _ in range(2 if shape else 0):
            dim = int(self._draw(st.integers(0, len(shape) - 1)))
            parts = [piece for part in parts for piece in self._halves(part, dim)]
        bits = torch.empty(shape, dtype=_INTEGERS[dtype.itemsize])
        placed: list[tuple[Shape, Expr]] = []
        for offset, size in self._draw(st.permutations(parts)):
            part, inside = self.tree(size, dtype, min(depth, 1))
            placed.append((offset, part))
            bits[(*(slice(a, a + n) for a, n in zip(offset, size, strict=True)), ...)] = inside
        return Paste(shape, dtype, tuple(placed)), bits

    def _halves(self, part: tuple[Shape, Shape], dim: int) -> list[tuple[Shape, Shape]]:
        offset, size = part
        first = int(self._draw(st.integers(0, size[dim])))
        second = tuple(a + first if d == dim else a for d, a in enumerate(offset))
        return [
            (offset, tuple(first if d == dim else n for d, n in enumerate(size))),
            (second, tuple(n - first if d == dim else n for d, n in enumerate(size))),
        ]

    # What is more than a copy

    def _cast(self, shape: Shape, dtype: DType, depth: int) -> Tree:
        """Never of a NaN: its bits after a cast depend on where torch's vector instructions begin and end."""
        before = BY_NAME[str(self._draw(st.sampled_from([name for name in _CASTS if name != dtype.name])))]
        outside, self._below_a_cast = self._below_a_cast, True
        source, bits = self.tree(shape, before, depth)
        self._below_a_cast = outside
        return Cast(source, dtype), as_bits(as_values(bits, before).to(getattr(torch, dtype.name)))

    def _compute(self, shape: Shape, dtype: DType, depth: int) -> Tree:
        """Everything upside down: it needs the whole tensor."""
        source, bits = self.tree(shape, dtype, depth)
        every = list(range(len(shape)))
        return Compute("flip", _flip(every), (source,), shape, dtype), bits.flip(every)

    def _compute_along(self, shape: Shape, dtype: DType, depth: int) -> Tree:
        """Row by row along an axis: two tensors interleaved, each row upside down."""
        if not shape:
            return self._compute(shape, dtype, depth)
        axis = int(self._draw(st.integers(0, len(shape) - 1)))
        (a, a_bits), (b, b_bits) = self.tree(shape, dtype, depth), self.tree(shape, dtype, min(depth, 1))
        others = [dim for dim in range(len(shape)) if dim != axis]
        return (
            Compute("xor", _xor(others), (a, b), shape, dtype, axis),
            a_bits ^ b_bits.flip(others),
        )


def _flip(dims: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: as_bits(tensor).flip(dims).view(tensor.dtype)


def _xor(dims: list[int]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda a, b: (as_bits(a) ^ as_bits(b).flip(dims)).view(a.dtype)
