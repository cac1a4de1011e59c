"""What happens to a tensor beside a new name, as plan and receipt list it."""

from __future__ import annotations

from dataclasses import dataclass

from nbmerge.expressions import Expr


@dataclass(frozen=True, slots=True)
class Drop:
    """A source tensor that is not written, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Tie:
    """An output that is not written because `kept` holds the same values; the sources of both, if both exist."""

    name: str
    kept: str
    stored: Expr | None
    kept_stored: Expr | None


@dataclass(frozen=True, slots=True)
class Trim:
    """An output whose source has more rows: padding of the vocabulary, which is cut off."""

    name: str
    source: str
    rows: int
    kept: int


ZEROS = "zeros"


@dataclass(frozen=True, slots=True)
class Filled:
    """An output that the checkpoint does not hold, and what it is written from: ZEROS, or a base model's directory."""

    name: str
    origin: str
    reason: str
