"""Which rule of a family's table a tensor falls under, by its canonical name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from nbmerge.naming.megatron.family import Family, Stack
from nbmerge.naming.megatron.rules import Copy, Rule, Sizes

_NUMBER = re.compile(r"(\d{1,9})\.(.+)")
_EXPERT = re.compile(r"^(.*\bexperts)\.(\d{1,9})\.(.+)$")
_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")
_UNCHANGED = Copy("")


@dataclass(frozen=True)
class Match:
    """The rule that a tensor falls under: the published names to make, and the numbers of its layer and expert."""

    rule: Rule
    names: tuple[str, ...]
    expert: int | None = None
    loaded: bool = True


def match_of(family: Family, name: str, sizes: Sizes) -> Match | None:
    """The rule for a canonical name."""
    for prefix, target in family.unchanged.items():
        if name.startswith(prefix):
            return Match(_UNCHANGED, (sizes.spelled(target + name.removeprefix(prefix)),))
    if name in family.ends:
        return Match(family.ends[name], tuple(map(sizes.spelled, family.ends[name].targets)))
    for stack in family.stacks:
        if name.startswith(stack.source) and (numbered := _NUMBER.fullmatch(name.removeprefix(stack.source))):
            return _in_stack(stack, int(numbered[1]), numbered[2], sizes)
    return None


def _in_stack(stack: Stack, number: int, row: str, sizes: Sizes) -> Match | None:
    expert = None
    if match := _EXPERT.match(row):
        expert, row = int(match[2]), f"{match[1]}.{{e}}.{match[3]}"
    rule = stack.rows.get(row)
    if rule is None:
        return None
    layer = number + (sizes.need(stack.after) if stack.after else 0)
    names = tuple(
        sizes.spelled(f"{stack.target}{layer}.{target if expert is None else target.replace('{e}', str(expert))}")
        for target in rule.targets
    )
    return Match(rule, names, expert, stack.loaded)


def rows_of(family: Family) -> Iterator[tuple[str, Rule]]:
    """Every row of a table under the name that it has in a checkpoint, N for numbers."""
    yield from family.ends.items()
    for stack in family.stacks:
        for row, rule in stack.rows.items():
            yield f"{stack.source}N.{row.replace('{e}', 'N')}", rule


def any_number(name: str) -> str:
    """The name with N for the numbers of layers and experts: one for all that differ in nothing else."""
    return _NUMBERS.sub("N", name)
