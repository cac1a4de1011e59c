"""From questions to subjects: alike ones together, and what several of them say jointly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from nbmerge.explaining.alike import alike, numbers_of
from nbmerge.explaining.candidates import Candidate, Mismatch, Strength, ranked
from nbmerge.explaining.explanation import MISMATCH, MISSING, UNEXPECTED, Subject, in_order
from nbmerge.explaining.table import candidates
from nbmerge.geometry import Shape

_FEWEST = 2  # different pairs of shapes before they can confirm one another


def subjects_of(asked: Sequence[Mismatch], about: str | None = None) -> tuple[Subject, ...]:
    """The subjects of the questions, with what all of them say together.

    about: the name of which causes are to be told, instead of the first one's like it.
    """
    asked = sorted(asked, key=lambda each: each.name != about)
    name: Callable[[Mismatch], str] = lambda each: each.name  # noqa: E731
    groups = alike(asked, name, lambda each: each.got, lambda each: each.expected)
    made = [
        Subject(first.name, first.got, first.expected, candidates(first), tuple(each.name for each in group))
        for group in groups
        for first in group[:1]
    ]
    recorded = any(each.known.recorded for each in asked)
    return in_order(paired(made if recorded else corroborated(made)))


def paired(subjects: Sequence[Subject]) -> list[Subject]:
    """What is missing, and what is too much because it is the same under another name, as one subject.

    Only where nothing is in doubt: one strong cause on each side, which names the other, in the same layers.
    """
    extra = {subject.name: subject for subject in subjects if subject.kind == UNEXPECTED}
    joined: dict[str, Subject] = {}
    for subject in subjects:
        other = extra.get(_other_name(subject)) if subject.kind == MISSING else None
        if other is None or _other_name(other) != subject.name:
            continue
        held = {numbers_of(name): name for name in other.names}
        held_as = [held.pop(numbers_of(name), "") for name in subject.names]
        if all(held_as) and not held:
            joined[subject.name] = replace(subject, got=other.got, held_as=tuple(held_as))
            joined[other.name] = joined[subject.name]
    return [joined.get(each.name, each) for each in subjects if each.kind != UNEXPECTED or each.name not in joined]


def _other_name(subject: Subject) -> str:
    """What the other side calls the first tensor, where that is beyond doubt; else empty."""
    best = subject.best
    return "" if best is None or subject.is_ambiguous or best.strength < Strength.STRONG else best.other


def corroborated(subjects: Sequence[Subject]) -> list[Subject]:
    """The subjects, with candidates raised that explain every mismatch with the same number of ranks.

    One shape alone fits many numbers of ranks; several shapes of one checkpoint must fit the same one.
    """
    wrong = [subject for subject in subjects if subject.kind == MISMATCH]
    pairs: set[tuple[Shape | None, Shape | None]] = {(subject.got, subject.expected) for subject in wrong}
    if len(pairs) < _FEWEST:
        return list(subjects)
    common: dict[str, set[int]] = {}
    for pattern in {candidate.pattern for subject in wrong for candidate in subject.candidates if candidate.counts}:
        counts = [
            {n for each in subject.candidates if each.pattern == pattern for n in each.counts} for subject in wrong
        ]
        if shared := set.intersection(*counts):
            common[pattern] = shared
    said = f"explains all {len(pairs)} shapes that differ"
    return [replace(s, candidates=ranked([_raised(c, common, said) for c in s.candidates])) for s in subjects]


def _raised(candidate: Candidate, common: dict[str, set[int]], said: str) -> Candidate:
    shared = common.get(candidate.pattern)
    if not shared:
        return candidate
    counts = tuple(n for n in candidate.counts if n in shared)
    ranks = " or ".join(str(n) for n in counts[:3]) + (f" and {len(counts) - 3} more" if counts[3:] else "")
    evidence = (*candidate.evidence, f"one number of ranks, {ranks}, {said}")
    return replace(candidate, counts=counts, evidence=evidence, strength=Strength.STRONG)
