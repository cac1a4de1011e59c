"""Repeated names as one: `model.layers.{0..35}.self_attn.q_proj.weight` for the same tensor of 36 layers."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

_NUMBER = re.compile(r"(?<![^.])(0|[1-9][0-9]{0,8})(?![^.])")  # a whole part of the name, between dots
_LISTED = 4  # numbers that are listed one by one where they make no range


@dataclass(slots=True)
class Group:
    """Names that differ in their numbers only, and that have the same key.

    parts: the text of the name between its numbers; numbers: for each gap the numbers found there, as digits.
    """

    parts: tuple[str, ...]
    key: Hashable
    numbers: tuple[set[str], ...]
    members: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """All names of the group, as one."""
        if len(self.members) == 1:
            return self.members[0]
        first, *rest = self.parts
        return first + "".join(_in_words(found) + part for found, part in zip(self.numbers, rest, strict=True))


def collapse(named: Iterable[tuple[str, Hashable]]) -> list[Group]:
    """The groups of (name, key) pairs, in the order in which each begins."""
    groups: dict[tuple[Hashable, ...], Group] = {}
    for name, key in named:
        pieces = _NUMBER.split(name)  # text, number, text, …, text
        template = (key, *pieces[::2])
        group = groups.get(template)
        if group is None:
            group = groups[template] = Group(tuple(pieces[::2]), key, tuple(set() for _ in pieces[1::2]))
        for found, number in zip(group.numbers, pieces[1::2], strict=True):
            found.add(number)
        group.members.append(name)
    return list(groups.values())


def _in_words(digits: set[str]) -> str:
    """`{0..35}`, `{0, 2, 5}`, `{0..94 step 2}`, `7`, or both ends and how many."""
    ordered = sorted(map(int, digits))
    if len(ordered) == 1:
        return str(ordered[0])
    step = ordered[1] - ordered[0]
    if len(ordered) > 2 and all(b - a == step for a, b in pairwise(ordered)):
        return f"{{{ordered[0]}..{ordered[-1]}}}" if step == 1 else f"{{{ordered[0]}..{ordered[-1]} step {step}}}"
    if len(ordered) == 2 and step == 1:
        return f"{{{ordered[0]}..{ordered[1]}}}"
    if len(ordered) <= _LISTED:
        return f"{{{', '.join(map(str, ordered))}}}"
    return f"{{{len(ordered):,} of {ordered[0]}..{ordered[-1]}}}"
