"""The nodes of an expression: what each knows of itself."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nbmerge.dtypes import DType
from nbmerge.geometry import Box, Shape, contiguous_strides

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
