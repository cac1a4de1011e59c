"""Tensors that differ only in the number of a layer or an expert: told once, with how many there are."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

_NUMBER = re.compile(r"(?:(?<![^.])|(?<=\.weight)|(?<=\.bias))[0-9]{1,9}(?![^.])")
_Item = TypeVar("_Item")


def row_of(name: str) -> str:
    """`model.layers.N.mlp.experts.N.up_proj.weight`: one for all names that differ in nothing but numbers."""
    return _NUMBER.sub("N", name)


def numbers_of(name: str) -> tuple[str, ...]:
    """The numbers that `row_of` leaves out: of the layer, of the expert."""
    return tuple(_NUMBER.findall(name))


def alike(
    items: Iterable[_Item], name: Callable[[_Item], str], *same: Callable[[_Item], Hashable]
) -> list[list[_Item]]:
    """The items in groups of one row, in the order in which each begins. same: what must be equal beside it."""
    groups: dict[tuple[Hashable, ...], list[_Item]] = {}
    for item in items:
        groups.setdefault((row_of(name(item)), *(key(item) for key in same)), []).append(item)
    return list(groups.values())


def and_more(count: int) -> str:
    """` … and 95 more like it`, for a group of so many; nothing for one alone."""
    return f" … and {count - 1:,} more like it" if count > 1 else ""
