"""An output tensor as a small expression over stored bytes. Pure description: nothing here reads a file.

Stored    bytes in a file                        Cast     another dtype
Fill      a constant                             Compute  an operation, with the axis it can be cut along
Input     a tensor that a naming rule will be given
Slice, Permute, Reshape   views of another node  Paste    boxes put together
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from nbmerge.dtypes import DType
from nbmerge.geometry import Box, Shape, contiguous_strides, viewed_strides, with_dim

if TYPE_CHECKING:
    import torch


class Expr(ABC):
    """A tensor as it can be made. Every node knows its shape and dtype and holds no data."""

    __slots__ = ()

    @property
    @abstractmethod
    def shape(self) -> Shape: ...

    @property
    @abstractmethod
    def dtype(self) -> DType: ...

    @property
    def sources(self) -> tuple[Expr, ...]:
        """The nodes that this one is made of."""
        return ()

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, once made."""
        return self.numel * self.dtype.itemsize

    def with_sources(self, sources: Sequence[Expr]) -> Expr:
        """The same node over other sources."""
        if sources:
            raise ValueError(f"{type(self).__name__} has no sources")
        return self


class _Leaf(Expr):
    """A node without sources, whose shape and dtype are given."""

    __slots__ = ()

    _shape: Shape
    _dtype: DType

    @property
    def shape(self) -> Shape:
        """Dimensions."""
        return self._shape

    @property
    def dtype(self) -> DType:
        """Element type."""
        return self._dtype


@dataclass(frozen=True, slots=True)
class Stored(_Leaf):
    """Bytes in a file. offset in bytes, strides in elements; a stride of 0 repeats."""

    file: str
    offset: int
    _shape: Shape
    strides: Shape
    _dtype: DType

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in the file row by row without gaps."""
        return all(
            size == 1 or stride == want
            for size, stride, want in zip(self._shape, self.strides, contiguous_strides(self._shape), strict=True)
        )

    def region(self, box: Box) -> Stored:
        """The part of it that the box holds."""
        skipped = sum(start * stride for start, stride in zip(box.offset, self.strides, strict=True))
        return replace(self, offset=self.offset + skipped * self._dtype.itemsize, _shape=box.shape)


@dataclass(frozen=True, slots=True)
class Fill(_Leaf):
    """One value everywhere, for a tensor that no source holds."""

    value: float
    _shape: Shape
    _dtype: DType


@dataclass(frozen=True, slots=True)
class Input(_Leaf):
    """The tensor that a naming rule calls `name`; `substitute` puts a real one in its place."""

    name: str
    _shape: Shape
    _dtype: DType


@dataclass(frozen=True, slots=True)
class _Unary(Expr):
    source: Expr

    @property
    def dtype(self) -> DType:
        return self.source.dtype

    @property
    def sources(self) -> tuple[Expr, ...]:
        return (self.source,)

    def with_sources(self, sources: Sequence[Expr]) -> Expr:
        (source,) = sources
        return replace(self, source=source)


@dataclass(frozen=True, slots=True)
class Slice(_Unary):
    """A box of another node."""

    box: Box

    @property
    def shape(self) -> Shape:
        return self.box.shape


@dataclass(frozen=True, slots=True)
class Permute(_Unary):
    """Another node with its dimensions in another order: dimension i is dimension dims[i] of the source."""

    dims: Shape

    @property
    def shape(self) -> Shape:
        return tuple(self.source.shape[dim] for dim in self.dims)


@dataclass(frozen=True, slots=True)
class Reshape(_Unary):
    """The elements of another node, in row-major order, in another shape."""

    _shape: Shape

    @property
    def shape(self) -> Shape:
        return self._shape


@dataclass(frozen=True, slots=True)
class Paste(Expr):
    """Boxes put together: each part lies at its offset, and the parts tile the shape."""

    _shape: Shape
    _dtype: DType
    parts: tuple[tuple[Shape, Expr], ...]

    @property
    def shape(self) -> Shape:
        return self._shape

    @property
    def dtype(self) -> DType:
        return self.parts[0][1].dtype if self.parts else self._dtype

    @property
    def sources(self) -> tuple[Expr, ...]:
        return tuple(part for _, part in self.parts)

    def with_sources(self, sources: Sequence[Expr]) -> Expr:
        offsets = (offset for offset, _ in self.parts)
        return replace(self, parts=tuple(zip(offsets, sources, strict=True)))


@dataclass(frozen=True, slots=True)
class Cast(_Unary):
    """Another dtype. Floating values round to the nearest, ties to even, as torch's `Tensor.to` does."""

    to: DType

    @property
    def shape(self) -> Shape:
        return self.source.shape

    @property
    def dtype(self) -> DType:
        return self.to


@dataclass(frozen=True, slots=True)
class Compute(Expr):
    """An operation on whole tensors: `function` takes the inputs as torch tensors and returns the output.

    axis: the dimension of the output, and of every input but the last `whole`, along which it can be done in blocks;
    None when it must see whole tensors, whose size the plan then counts as memory. scratch: bytes that the function
    takes beside them.
    """

    name: str
    function: Callable[..., torch.Tensor]
    inputs: tuple[Expr, ...]
    _shape: Shape
    _dtype: DType
    axis: int | None = None
    whole: int = 0
    scratch: int = 0

    @property
    def shape(self) -> Shape:
        return self._shape

    @property
    def dtype(self) -> DType:
        return self._dtype

    @property
    def sources(self) -> tuple[Expr, ...]:
        return self.inputs

    def with_sources(self, sources: Sequence[Expr]) -> Expr:
        """The same operation; where it keeps its inputs' dtype, it keeps the new ones'."""
        dtypes = {source.dtype for source in sources}
        keeps = {source.dtype for source in self.inputs} == {self._dtype} and len(dtypes) == 1
        return replace(self, inputs=tuple(sources), _dtype=dtypes.pop() if keeps else self._dtype)


def slice_of(expr: Expr, box: Box) -> Expr:
    """A box of a tensor, of stored bytes and pastes only what it needs; the tensor itself where that is all of it."""
    if box == Box.whole(expr.shape):
        return expr
    if isinstance(expr, Stored):
        return expr.region(box)
    if isinstance(expr, Fill):
        return replace(expr, _shape=box.shape)
    if isinstance(expr, Slice):
        return slice_of(expr.source, box.shift(expr.box.offset))
    if isinstance(expr, Paste):
        return _slice_of_paste(expr, box)
    return Slice(expr, box)


def _slice_of_paste(paste: Paste, box: Box) -> Expr:
    parts: list[tuple[Shape, Expr]] = []
    for offset, part in paste.parts:
        common = box.intersect(Box(offset, part.shape))
        if common is not None:
            parts.append((common.relative_to(box.offset).offset, slice_of(part, common.relative_to(offset))))
    if len(parts) == 1 and parts[0][1].shape == box.shape:
        return parts[0][1]
    return Paste(box.shape, paste.dtype, tuple(parts))


def narrow(expr: Expr, dim: int, start: int, length: int) -> Expr:
    """Rows `start` to `start + length` of dimension `dim`."""
    whole = Box.whole(expr.shape)
    return slice_of(expr, Box(with_dim(whole.offset, dim, start), with_dim(whole.shape, dim, length)))


def reshape(expr: Expr, shape: Shape) -> Expr:
    """The same elements in another shape. Raises ValueError where the sizes differ."""
    if math.prod(shape) != expr.numel:
        raise ValueError(f"{list(expr.shape)} cannot be reshaped to {list(shape)}")
    if shape == expr.shape:
        return expr
    if isinstance(expr, Stored):
        strides = viewed_strides(expr.shape, expr.strides, shape)
        return Reshape(expr, shape) if strides is None else replace(expr, _shape=shape, strides=strides)
    if isinstance(expr, Fill):
        return replace(expr, _shape=shape)
    if isinstance(expr, Paste) and (1, *shape) == expr.shape:
        filled = [(at[1:], part) for at, part in expr.parts if part.numel]
        return Paste(shape, expr.dtype, tuple((at, reshape(part, part.shape[1:])) for at, part in filled))
    if isinstance(expr, Paste) and shape == (1, *expr.shape):
        return Paste(shape, expr.dtype, tuple(((0, *at), reshape(part, (1, *part.shape))) for at, part in expr.parts))
    return reshape(expr.source, shape) if isinstance(expr, Reshape) else Reshape(expr, shape)


def permute(expr: Expr, dims: Shape) -> Expr:
    """Dimensions in another order: dimension i of the result is dimension dims[i]."""
    if dims == tuple(range(len(dims))):
        return expr
    if isinstance(expr, Stored):
        strides = tuple(expr.strides[dim] for dim in dims)
        return replace(expr, _shape=tuple(expr.shape[dim] for dim in dims), strides=strides)
    return Permute(expr, dims)


def cast(expr: Expr, to: DType) -> Expr:
    """Another dtype; where a tensor was widened from that very one, the tensor that it was."""
    if expr.dtype == to:
        return expr
    if isinstance(expr, Cast) and expr.source.dtype == to and to.is_floating and to.itemsize < expr.to.itemsize:
        return expr.source
    return Cast(expr, to)


def select(expr: Expr, dim: int, index: int) -> Expr:
    """One row of dimension `dim`, without that dimension."""
    row = narrow(expr, dim, index, 1)
    return reshape(row, row.shape[:dim] + row.shape[dim + 1 :])


def cat(parts: Sequence[Expr], dim: int) -> Expr:
    """Tensors one after the other along `dim`. All other dimensions are the same."""
    first = parts[0]
    if len(parts) == 1:
        return first
    placed: list[tuple[Shape, Expr]] = []
    at = 0
    for part in parts:
        placed.append((tuple(at if d == dim else 0 for d in range(len(first.shape))), part))
        at += part.shape[dim]
    shape = tuple(at if d == dim else size for d, size in enumerate(first.shape))
    return Paste(shape, first.dtype, tuple(placed))


def stack(parts: Sequence[Expr]) -> Expr:
    """Tensors of one shape along a new first dimension."""
    return cat([reshape(part, (1, *part.shape)) for part in parts], 0)


def rows_of(expr: Expr) -> list[Expr]:
    """Every row of dimension 0, without that dimension; of a paste of single rows in one pass over its parts."""
    count = expr.shape[0]
    if not isinstance(expr, Paste) or any(part.shape[0] != 1 for _, part in expr.parts):
        return [select(expr, 0, index) for index in range(count)]
    parts: list[list[tuple[Shape, Expr]]] = [[] for _ in range(count)]
    for offset, part in expr.parts:
        parts[offset[0]].append((offset[1:], reshape(part, part.shape[1:])))
    shape = expr.shape[1:]
    return [
        row[0][1] if len(row) == 1 and row[0][1].shape == shape else Paste(shape, expr.dtype, tuple(row))
        for row in parts
    ]


def walk(expr: Expr) -> Iterator[Expr]:
    """The node and all below it, each as often as it is used."""
    yield expr
    for source in expr.sources:
        yield from walk(source)


def substitute(expr: Expr, inputs: Mapping[str, Expr]) -> Expr:
    """The expression with every Input that `inputs` names replaced by that tensor, and views taken of what it is."""
    if isinstance(expr, Input):
        return inputs.get(expr.name, expr)
    old = expr.sources
    if not old:
        return expr
    new = tuple(substitute(source, inputs) for source in old)
    if all(a is b for a, b in zip(old, new, strict=True)):
        return expr
    if isinstance(expr, Slice):
        return slice_of(new[0], expr.box)
    if isinstance(expr, Permute):
        return permute(new[0], expr.dims)
    if isinstance(expr, Reshape):
        return reshape(new[0], expr.shape)
    return expr.with_sources(new)


def input_names(expr: Expr) -> list[str]:
    """The names of the Inputs below the node, each once, in order."""
    return list(dict.fromkeys(node.name for node in walk(expr) if isinstance(node, Input)))


def fingerprint(expr: Expr) -> Iterator[str]:
    """Words that tell the expression from any other: its nodes, and every field of each that shapes its bytes."""
    for node in walk(expr):
        yield type(node).__name__
        for item in fields(node):  # type: ignore[arg-type]  # every node is a dataclass
            if item.name not in ("source", "parts", "inputs", "function"):
                yield str(getattr(node, item.name))
        if isinstance(node, Paste):
            yield str([offset for offset, _ in node.parts])


def is_copy(expr: Expr) -> bool:
    """Whether the tensor's bytes are all copied or constant: no cast and no computation in it."""
    return not any(isinstance(node, (Cast, Compute, Input)) for node in walk(expr))
