"""Repeated names as one: `model.layers.{0..35}.self_attn.q_proj.weight` for the same tensor of 36 layers."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

# A whole part of the name, between dots, or what transformer_engine's grouped experts end in: `linear_fc1.weight17`.
_NUMBER = re.compile(r"(?:(?<![^.])|(?<=\.weight)|(?<=\.bias))(0|[1-9][0-9]{0,8})(?![^.])")
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
        return first + "".join(_braced(found) + part for found, part in zip(self.numbers, rest, strict=True))


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


def _braced(digits: set[str]) -> str:
    """`{0..35}`; a single number stays as it is."""
    words = numbers_in_words(map(int, digits))
    return words if len(digits) == 1 else f"{{{words}}}"


def numbers_in_words(numbers: Iterable[int]) -> str:
    """`0..35`, `0, 2, 5`, `0..94 step 2`, `7`, or both ends and how many; `·` for none."""
    ordered = sorted(set(numbers))
    if not ordered:
        return "·"
    if len(ordered) == 1:
        return str(ordered[0])
    step = even_step(ordered)
    if step is not None and (len(ordered) > 2 or step == 1):
        return f"{ordered[0]}..{ordered[-1]}" + (f" step {step}" if step > 1 else "")
    if len(ordered) <= _LISTED:
        return ", ".join(map(str, ordered))
    return f"{len(ordered):,} of {ordered[0]}..{ordered[-1]}"


def even_step(ordered: Sequence[int]) -> int | None:
    """What each number is above the one before it; None where that differs, or there are fewer than two."""
    steps = {b - a for a, b in pairwise(ordered)}
    return steps.pop() if len(steps) == 1 else None
