"""Follows a run along its checkpoints, and compares each with the one before, three at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from nbmerge.comparing.alignment import Alignment, align
from nbmerge.comparing.collector import Collector
from nbmerge.comparing.differ import Looking, check_options, patterns_of
from nbmerge.comparing.elements import Values, as_float64
from nbmerge.comparing.kernel import PIECE
from nbmerge.comparing.statistics import fixed
from nbmerge.comparing.trajectory import Step, Trajectory, UpdateProducts
from nbmerge.dtypes import DType
from nbmerge.engine.events import Listener, silent
from nbmerge.engine.read import Words
from nbmerge.engine.scan import Walk
from nbmerge.errors import OptionError
from nbmerge.expressions import Expr
from nbmerge.geometry import Box
from nbmerge.weights import Weights


def trajectory_of(
    sources: Iterable[Weights],
    *,
    frozen: str | Iterable[str] = (),
    sample: float = 1.0,
    workers: int | None = None,
    listener: Listener = silent,
) -> Trajectory:
    """The trajectory along these models, in their order; an iterator is asked for each when its turn comes.

    Reads each block of a model in up to three passes, beside those of the two models before. frozen, sample: as for
    `diff_weights`, for every step. Raises OptionError for fewer than two models, and what reading raises.
    """
    check_options(sample=sample, rank_one=False, workers=workers)
    patterns = patterns_of(frozen)
    steps: list[Step] = []
    models = iter(sources)
    first = next(models, None)
    earlier: Weights | None = None
    before = first
    for now in models:
        if before is not None:
            steps.append(_step(earlier, before, now, patterns, sample, workers, listener))
        earlier, before = before, now
    if first is None or not steps:
        raise OptionError("a trajectory needs two checkpoints or more", fix="pass a run's directory, or a list of them")
    return Trajectory(first.label, tuple(steps))


class _Updates:
    """Sums the scalar products of two successive updates. Thread-safe; the order of blocks does not matter."""

    def __init__(self) -> None:
        self.products: dict[str, UpdateProducts] = {}
        self._lock = threading.Lock()

    def add(self, name: str, words: Sequence[Words], dtypes: Sequence[DType]) -> None:
        """Looks at a block of three tensors; what is not finite in one of them is left out."""
        total = UpdateProducts()
        flat = [each.reshape(-1) for each in words]
        for start in range(0, len(flat[0]), PIECE):
            pieces = [each[start : start + PIECE] for each in flat]
            if any((a != b).any() for a, b in pairwise(pieces)) or len(set(dtypes)) > 1:
                total += _products(*(as_float64(piece, dtype) for piece, dtype in zip(pieces, dtypes, strict=True)))
        with self._lock:
            self.products[name] = self.products.get(name, UpdateProducts()) + total


def _products(first: Values, second: Values, third: Values) -> UpdateProducts:
    with np.errstate(all="ignore"):
        before, now = second - first, third - second
    finite = np.isfinite(before) & np.isfinite(now)
    if not finite.all():
        before, now = before[finite], now[finite]
    largest = max(np.abs(before).max(initial=0.0), np.abs(now).max(initial=0.0))
    exponent = int(np.frexp(largest)[1])  # so that the squares of float64s do not overflow either
    before, now = np.ldexp(before, -exponent), np.ldexp(now, -exponent)
    sums = (float(np.einsum("i,i->", x, y)) for x, y in ((now, now), (before, before), (before, now)))
    return UpdateProducts(*(fixed(value, 2 * exponent) for value in sums))


def _step(
    earlier: Weights | None, before: Weights, now: Weights, patterns: Sequence[str], sample: float,
    workers: int | None, listener: Listener,
) -> Step:  # fmt: skip
    start = time.perf_counter()
    alignment = align(before, now)
    collector, updates = Collector(alignment.pairs), _Updates()
    looking = Looking(alignment, patterns, sample, workers, listener)
    walks = list(_walks(alignment, align(earlier, before) if earlier is not None else None))
    dtypes = {walk.name: [expr.dtype for expr in walk.exprs] for walk in walks}

    def visit(name: str, region: Box, words: tuple[Words, ...]) -> None:
        if len(words) > 2:
            updates.add(name, words, dtypes[name])
        collector.add(name, region, words[-2], words[-1])

    looked = looking.scan(walks, visit)
    diff = looking.report(before.label, now.label, collector, looked)
    diff = replace(diff, looked=replace(looked, seconds=time.perf_counter() - start))
    return Step(now.label, diff, updates.products).summed_up()


def _walks(alignment: Alignment, last: Alignment | None) -> Iterator[Walk]:
    """The pairs of a step, each with the tensor of the checkpoint before where the same one was paired then."""
    earlier: dict[str, tuple[Expr, Expr]] = {pair.name: (pair.a, pair.b) for pair in last.pairs} if last else {}
    for pair in alignment.pairs:
        exprs: tuple[Expr, ...] = (pair.a, pair.b)
        if pair.name in earlier and pair.dtype.is_floating:
            first, second = earlier[pair.name]
            if second == pair.a and first.dtype.is_floating:
                exprs = (first, *exprs)
        yield Walk(pair.name, exprs)
