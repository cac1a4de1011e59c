"""What the engine says while it works. Progress bars and logs listen; the engine prints nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Started:
    """A phase begins: `reading`, `writing`, `verifying`; `total` bytes of it lie ahead."""

    phase: str
    total: int


@dataclass(frozen=True, slots=True)
class Advanced:
    """So many more bytes of the phase are done."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class FileDone:
    """An output file is whole and synced; reused where an earlier run had written it."""

    name: str
    nbytes: int
    reused: bool


@dataclass(frozen=True, slots=True)
class Ended:
    """The phase is over."""

    phase: str


Event = Started | Advanced | FileDone | Ended
Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """A listener that does nothing."""
