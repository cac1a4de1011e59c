"""What a pattern is asked, what it answers, and how strongly its evidence speaks. Pure integers and strings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from math import prod
from typing import Any, TypeVar

from nbmerge.errors import listing
from nbmerge.geometry import Shape


class Strength(IntEnum):
    """How strongly the evidence speaks for a candidate.

    STRONG: something beyond the two shapes confirms it (the number of ranks, a size of the config, a name that is
    there), or the shapes alone leave no room for chance; FAIR: the shapes fit, and what else is known does not
    decide; WEAK: the numbers fit, which they often do by chance.
    """

    WEAK = 1
    FAIR = 2
    STRONG = 3

    def __str__(self) -> str:
        return {self.WEAK: "possible", self.FAIR: "likely", self.STRONG: "strong"}[self]


_Made = TypeVar("_Made")
Key = Callable[[str], str | None]  # of a name, what it shares with its partners


@dataclass(frozen=True)
class Known:
    """What is known beside the two shapes.

    ranks: how many wrote the checkpoint; config: of the model that was expected, a name being looked for in its text
    part first; held, wanted: names and shapes that the checkpoint has, and that the model has; differing: sizes of
    the model by name, (the checkpoint's, the config's), where other tensors show that they differ; other_family: what
    shows that the config is of another family, if it is; recorded: whether the checkpoint says how every tensor was
    cut, and its pieces make up exactly the shape that is asked about.
    """

    ranks: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    held: Mapping[str, Shape] = field(default_factory=dict)
    wanted: Mapping[str, Shape] = field(default_factory=dict)
    differing: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    other_family: str = ""
    recorded: bool = False

    def size(self, *names: str) -> int | None:
        """The first of these sizes that the config has, as a positive integer."""
        text = self.config.get("text_config")
        for part in (text if isinstance(text, Mapping) else {}, self.config):
            for name in names:
                value = part.get(name)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None

    @cached_property
    def only_held(self) -> Mapping[str, Shape]:
        """What the checkpoint has and the model has not."""
        return {name: shape for name, shape in self.held.items() if name not in self.wanted}

    @cached_property
    def only_wanted(self) -> Mapping[str, Shape]:
        """What the model has and the checkpoint has not."""
        return {name: shape for name, shape in self.wanted.items() if name not in self.held}

    @cached_property
    def _made(self) -> dict[object, Any]:
        return {}

    def once(self, make: Callable[[Known], _Made]) -> _Made:
        """What a function of a module makes of all names, made once for all questions that share this."""
        if make not in self._made:
            self._made[make] = make(self)
        made: _Made = self._made[make]
        return made

    def alone(self, key: Key, *, held: bool) -> Mapping[str, list[str]]:
        """The names that only the checkpoint has (held), or only the model, by their key. Made once for all questions.

        key: a function of its own, not one that is made for each question; None leaves a name out.
        """
        table: dict[str, list[str]] | None = self._made.get((held, key))
        if table is None:
            table = self._made[held, key] = {}
            for name in self.only_held if held else self.only_wanted:
                if (found := key(name)) is not None:
                    table.setdefault(found, []).append(name)
        return table


@dataclass(frozen=True)
class Mismatch:
    """The question: a tensor that is not as it was expected.

    got: its shape in the checkpoint, None where nothing is there; expected: the shape that the model has, None where
    the model has no such tensor; name: the tensor's, or empty where only shapes are known.
    """

    got: Shape | None
    expected: Shape | None
    name: str = ""
    known: Known = field(default_factory=Known)

    @property
    def is_one_sided(self) -> bool:
        """Whether only one side has the tensor."""
        return (self.got is None) != (self.expected is None)

    @property
    def shapes(self) -> tuple[Shape, Shape] | None:
        """Both shapes, where both are known and differ."""
        if self.got is None or self.expected is None or self.got == self.expected:
            return None
        return self.got, self.expected

    def other_dim(self) -> tuple[int, int, int] | None:
        """(dimension, got, expected) where both shapes differ in exactly one dimension."""
        if self.shapes is None or len(self.shapes[0]) != len(self.shapes[1]):
            return None
        differ = [(d, a, b) for d, (a, b) in enumerate(zip(*self.shapes, strict=True)) if a != b]
        return differ[0] if len(differ) == 1 else None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One possible cause.

    pattern: its name in the table; sentence: what happened; evidence: the arithmetic first (`3600 = 24 · ⌈3584/24⌉`),
    then what else speaks for it; fix: what to do; counts: the numbers of ranks with which the arithmetic is true,
    where it has one; seen: threads in which users met it; other: the name on the other side, of a tensor that is there
    under another one.
    """

    pattern: str
    sentence: str
    evidence: tuple[str, ...]
    strength: Strength
    fix: str
    counts: tuple[int, ...] = ()
    seen: tuple[str, ...] = ()
    other: str = ""

    def __str__(self) -> str:
        return f"{self.evidence[0]}: {self.sentence}" if self.evidence else self.sentence


Pattern = Callable[[Mismatch], Iterator[Candidate]]


def ranked(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Strongest first; among equals in the order of the table."""
    return tuple(sorted(candidates, key=lambda candidate: -candidate.strength))


@dataclass(frozen=True, slots=True)
class Fit:
    """How numbers of ranks that make an arithmetic true agree with the number that is known."""

    strength: Strength
    counts: tuple[int, ...]
    said: str

    @property
    def words(self) -> str:
        """`24 ranks`, or `24 ranks, or another number that fits: 40, 48, 18 and 29 more`."""
        first, *others = sorted(self.counts, key=likeliness)
        said = "1 rank" if first == 1 else f"{first} ranks"
        return f"{said}, or another number that fits: {listing(others)}" if others else said

    @property
    def likeliest(self) -> int:
        """The number to write the arithmetic with."""
        return min(self.counts, key=likeliness)


def fit_ranks(counts: Sequence[int], ranks: int | None, otherwise: Strength) -> Fit | None:
    """How much the number of ranks confirms; None where it rules every one of the counts out.

    counts: numbers, from 2 on, with which the arithmetic is true. A number that divides the ranks can be the size of
    one dimension of their mesh. otherwise: the strength where the number of ranks is not known.
    """
    if not counts:
        return None
    if ranks is None:
        return Fit(otherwise, tuple(counts), "")
    if ranks in counts:
        return Fit(Strength.STRONG, (ranks,), f"{ranks} ranks wrote the checkpoint")
    parts = tuple(count for count in counts if ranks % count == 0)
    if not parts:
        return None
    said = f"{listing(parts)} divides the {ranks} ranks, as a dimension of their mesh would"
    return Fit(Strength.FAIR, parts, said)


def likeliness(count: int) -> tuple[bool, int]:
    """Numbers of ranks in the order in which one meets them: whole nodes of 8 first, then the smaller ones."""
    return count % 8 != 0, count


def numel(shape: Shape) -> int:
    """Elements of a tensor of the shape."""
    return prod(shape)


def product(shape: Shape) -> str:
    """`62 · 18`; `1` for a 0-d tensor."""
    return " · ".join(map(str, shape)) or "1"


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def dim_words(shape: Shape, dim: int) -> str:
    """` along dimension 1`; nothing for a vector, which has one."""
    return f" along dimension {dim}" if len(shape) > 1 else ""


def evidence(*said: str) -> tuple[str, ...]:
    """The parts that say something."""
    return tuple(part for part in said if part)
