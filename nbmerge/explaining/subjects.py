"""From questions to subjects: alike ones together, and what several of them say jointly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from nbmerge.explaining.alike import alike
from nbmerge.explaining.candidates import Candidate, Mismatch, Strength, ranked
from nbmerge.explaining.explanation import MISMATCH, Subject, in_order
from nbmerge.explaining.table import candidates
from nbmerge.geometry import Shape

_FEWEST = 2  # different pairs of shapes before they can confirm one another


def subjects_of(asked: Sequence[Mismatch]) -> tuple[Subject, ...]:
    """The subjects of the questions, with what all of them say together."""
    name: Callable[[Mismatch], str] = lambda each: each.name  # noqa: E731
    groups = alike(asked, name, lambda each: each.got, lambda each: each.expected)
    made = [
        Subject(first.name, first.got, first.expected, candidates(first), tuple(each.name for each in group))
        for group in groups
        for first in group[:1]
    ]
    recorded = any(each.known.recorded for each in asked)
    return in_order(made if recorded else corroborated(made))


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
