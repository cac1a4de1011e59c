"""Repeated names as one: `model.layers.{0..35}.self_attn.q_proj.weight` for the same tensor of 36 layers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

_LISTED = 4  # numbers that are listed one by one where they make no range


@dataclass(slots=True)
class Group:
    """Names that differ in their numbers only, and that have the same key.

    parts: of the name between dots, None where a number is; numbers: for each None the numbers found there.
    """

    parts: tuple[str | None, ...]
    key: Hashable
    numbers: tuple[set[int], ...]
    members: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """All names of the group, as one."""
        if len(self.members) == 1:
            return self.members[0]
        sets = iter(self.numbers)
        return ".".join(_in_words(next(sets)) if part is None else part for part in self.parts)


def collapse(named: Iterable[tuple[str, Hashable]]) -> list[Group]:
    """The groups of (name, key) pairs, in the order in which each begins."""
    groups: dict[tuple[tuple[str | None, ...], Hashable], Group] = {}
    for name, key in named:
        parts: list[str | None] = []
        found: list[int] = []
        for part in name.split("."):
            if _is_number(part):
                found.append(int(part))
                parts.append(None)
            else:
                parts.append(part)
        template = tuple(parts)
        group = groups.get((template, key))
        if group is None:
            group = groups[template, key] = Group(template, key, tuple(set() for _ in found))
        for numbers, number in zip(group.numbers, found, strict=True):
            numbers.add(number)
        group.members.append(name)
    return list(groups.values())


def _is_number(part: str) -> bool:
    """Whether the part is a number whose digits would survive `int`."""
    return part.isdigit() and part.isascii() and len(part) < 10 and (part[0] != "0" or len(part) == 1)


def _in_words(numbers: set[int]) -> str:
    """`{0..35}`, `{0, 2, 5}`, `{0..94 step 2}`, `7`, or both ends and how many."""
    ordered = sorted(numbers)
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
