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

    about: the name of which causes are to be told, in place of the first one's of its like.
    """
    name: Callable[[Mismatch], str] = lambda each: each.name  # noqa: E731
    groups = alike(asked, name, lambda each: each.got, lambda each: each.expected)
    made = [_subject(group, about) for group in groups]
    recorded = any(each.known.recorded for each in asked)
    return in_order(paired(made if recorded else corroborated(made), about))


def _subject(group: Sequence[Mismatch], about: str | None) -> Subject:
    told = next((each for each in group if each.name == about), group[0])
    return Subject(told.name, told.got, told.expected, candidates(told), tuple(each.name for each in group))


def paired(subjects: Sequence[Subject], about: str | None = None) -> list[Subject]:
    """What is missing, and what is too much because it is the same under another name, as one subject.

    Only where nothing is in doubt: one strong cause on each side, which names the other, in the same layers.
    """
    extra = {name: subject for subject in subjects if subject.kind == UNEXPECTED for name in subject.names}
    joined: dict[str, Subject] = {}
    for subject in subjects:
        other = extra.get(_other_name(subject)) if subject.kind == MISSING else None
        if other is not None and (both := _joined(subject, other, about)):
            joined[subject.names[0]] = joined[other.names[0]] = both
    left = [each for each in subjects if each.kind != UNEXPECTED or each.names[0] not in joined]
    return [joined.get(each.names[0], each) if each.names else each for each in left]


def _joined(missing: Subject, extra: Subject, about: str | None) -> Subject | None:
    """Both as one, where the same cause pairs each name of the one with a name of the other; else None."""
    held = {numbers_of(name): name for name in extra.names}
    held_as = tuple(held.pop(numbers_of(name), "") for name in missing.names)
    pairs = dict(zip(held_as, missing.names, strict=True))
    if held or "" in pairs or pairs.get(_other_name(missing)) != missing.name:
        return None
    if pairs[extra.name] != _other_name(extra):
        return None
    if about in pairs:  # by the name that the checkpoint has
        missing = replace(missing, name=pairs[extra.name], candidates=extra.candidates)
    return replace(missing, got=extra.got, held_as=held_as)


def _other_name(subject: Subject) -> str:
    """What the other side calls the tensor, where that is beyond doubt; else empty."""
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
