"""Repeated names as one: `model.layers.{0..35}.self_attn.q_proj.weight` for the same tensor of 36 layers."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

# A whole part of the name, between dots, or what transformer_engine's grouped experts end in: `linear_fc1.weight17`.
_NUMBER = re.compile(r"(?:(?<![^.])|(?<=\.weight)|(?<=\.bias))(0|[1-9][0-9]{0,8})(?![^.])")
_LISTED = 4  # numbers that are listed one by one where they make no range


@dataclass(slots=True)
class Group:
    """Names that differ in their numbers only, and that have the same key.

    first: the name that came first; count: how many there are; parts: the text of the name between its numbers;
    numbers: for each gap the numbers found there, as digits.
    """

    first: str
    key: Hashable
    parts: tuple[str, ...]
    numbers: tuple[set[str], ...]
    count: int = 0

    @property
    def name(self) -> str:
        """All names of the group, as one."""
        if self.count == 1:
            return self.first
        first, *rest = self.parts
        return first + "".join(_braced(found) + part for found, part in zip(self.numbers, rest, strict=True))


@dataclass(slots=True)
class _Run:
    """Names of one key that differ in one number only. before: what stands before the number; None without one."""

    first: str
    key: Hashable
    before: str | None
    found: list[str]


class _Endings(dict[str, str | None]):
    """What is left of the last part of a name without the number that ends it; None where none does."""

    def __missing__(self, part: str) -> str | None:
        found = _NUMBER.search(f".{part}")
        left = self[part] = found and part[: found.start() - 1]
        return left


def collapse(named: Iterable[tuple[str, Hashable]]) -> list[Group]:
    """The groups of (name, key) pairs, in the order in which each begins."""
    groups: dict[tuple[Hashable, ...], Group] = {}
    for run in _runs(named):
        pieces = _NUMBER.split(run.first)  # text, number, text, …, text
        texts, numbers = tuple(pieces[::2]), pieces[1::2]
        group = groups.get((run.key, texts))
        if group is None:
            group = groups[run.key, texts] = Group(run.first, run.key, texts, tuple(set() for _ in numbers))
        group.count += len(run.found)
        for found, number in zip(group.numbers, numbers, strict=True):
            found.add(number)
        if run.before is not None:
            group.numbers[len(_NUMBER.findall(run.before))].update(run.found)
    return list(groups.values())


def _runs(named: Iterable[tuple[str, Hashable]]) -> Iterable[_Run]:
    """The names, with the experts of a layer together.

    A large model has a hundred thousand names, and nearly all differ from others in an expert's number alone, which
    begins the third last part or ends the last one. A split from the right is a fraction of the pattern's search.
    """
    runs: dict[Hashable, _Run] = {}
    endings = _Endings()
    before: str | None
    which: Hashable
    for name, key in named:
        before, which = None, name
        try:
            head, number, middle, last = name.rsplit(".", 3)
        except ValueError:
            number = ""
        else:
            if endings[number] == "":
                before, which = head, (head, middle, last)
            elif (ending := endings[last]) is not None:
                before, which = name[: len(name) - len(last) + len(ending)], (head, number, middle, ending)
                number = last[len(ending) :]
        run = runs.get(which)
        if run is not None and run.key != key:
            run = runs.get(which := (which, key))
        if run is None:
            runs[which] = _Run(name, key, before, [number])
        else:
            run.found.append(number)
    return runs.values()


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
