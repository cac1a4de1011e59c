"""What must be equal, or is expected to be: copies of one piece, and tied weights. Small ones are compared at once."""

from __future__ import annotations

from collections.abc import Iterator

from nbmerge.engine.comparison import Comparison
from nbmerge.engine.sources import LocalFiles
from nbmerge.errors import Problem
from nbmerge.layout import Checkpoint, Drift, Equality
from nbmerge.naming.notes import Tie

_BLOCK = 2**20  # bytes that are compared at a time
_PROBED = 2**20  # bytes of one tensor's replicas that are compared while planning
_PROBED_IN_ALL = 64 * 2**20


def comparisons(
    checkpoint: Checkpoint, ties: tuple[Tie, ...], *, allow_drift: bool
) -> tuple[tuple[Equality, ...], tuple[Equality, ...]]:
    """What must be equal: replicas of one piece, both sides of a tie, and what the loader says. Small ones are compared
    while planning.

    allow_drift: whether replicas may differ even where the framework keeps them equal. As many replicas of a tensor as
    fit in 1 MiB are compared, and at least one.
    """
    small: list[Equality] = []
    large: list[Equality] = []
    budget = _PROBED_IN_ALL
    strict = checkpoint.strict_copies and not allow_drift
    said = (each for each in checkpoint.compared if not (each.master and allow_drift))
    for equality in (*_replicas(checkpoint, strict), *_ties(ties), *said):
        if equality.nbytes <= _PROBED and budget >= equality.nbytes:
            small.append(equality)
            budget -= equality.nbytes
        else:
            large.append(equality)
    return tuple(small), tuple(large)


def _replicas(checkpoint: Checkpoint, strict: bool) -> Iterator[Equality]:
    for tensor in checkpoint.tensors.values():
        for chunk in tensor.chunks:
            if not chunk.box.numel:
                continue
            count = max(_PROBED // max(chunk.stored.nbytes, 1), 1)
            for rank, replica in chunk.replicas[:count]:
                yield Equality(tensor.name, chunk.stored, replica, (chunk.rank, rank), chunk.box, strict)


def _ties(ties: tuple[Tie, ...]) -> Iterator[Equality]:
    for tie in ties:
        a, b = tie.stored, tie.kept_stored
        if a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype and a != b:
            yield Equality(tie.name, a, b, kept=tie.kept)


def probe(equalities: tuple[Equality, ...]) -> tuple[tuple[Drift, ...], list[Problem]]:
    """Compares the small ones now."""
    found = Comparison()
    with LocalFiles() as sources:
        for equality in equalities:
            found.compare(equality, _BLOCK, sources)
    return tuple(found.drift), found.problems
