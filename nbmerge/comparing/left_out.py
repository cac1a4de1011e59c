"""What of two models cannot be compared."""

from __future__ import annotations

from dataclasses import dataclass

from nbmerge.dtypes import DType
from nbmerge.geometry import Shape

A, B = "A", "B"


@dataclass(frozen=True, slots=True)
class Unmatched:
    """A tensor that only one of the two holds. side: `A` or `B`; why: where it is known."""

    name: str
    side: str
    shape: Shape
    dtype: DType
    why: str = ""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A tensor that both hold, but not so that its elements could be compared. why: what differs."""

    name: str
    a: tuple[Shape, DType]
    b: tuple[Shape, DType]
    why: str
