"""Takes blocks of paired tensors from many threads, and keeps one tally for each pair."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from nbmerge.comparing.alignment import Pair
from nbmerge.comparing.elements import converted, is_held, rounded
from nbmerge.comparing.kernel import compare
from nbmerge.comparing.statistics import Statistics
from nbmerge.comparing.tally import Tally
from nbmerge.dtypes import DType
from nbmerge.engine.read import Words
from nbmerge.geometry import Box, ravel, unravel


class Collector:
    """The tallies of pairs while their blocks are looked at. Thread-safe; the order of blocks does not matter."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        self._pairs = {pair.name: pair for pair in pairs}
        self._tallies = {name: Tally() for name in self._pairs}
        self._lock = threading.Lock()

    def add(self, name: str, region: Box, a: Words, b: Words) -> None:
        """Looks at a block of a pair."""
        pair = self._pairs[name]
        tally = Tally()
        a, b = a.reshape(-1), b.reshape(-1)
        if narrow := narrower(pair):
            tally.rounded = _differ_rounded(a, b, pair, narrow)
        compare(converted(a, pair.a.dtype, pair.dtype), converted(b, pair.b.dtype, pair.dtype), pair.dtype, tally)
        if tally.largest is not None:
            inside = unravel(tally.largest.place, region.shape)
            at = tuple(start + i for start, i in zip(region.offset, inside, strict=True))
            tally.largest = replace(tally.largest, place=ravel(at, pair.a.shape))
        with self._lock:
            self._tallies[name].add(tally)

    def statistics(self, name: str) -> Statistics:
        """What all blocks of a pair came to."""
        pair = self._pairs[name]
        return self._tallies[name].statistics(
            floating=pair.dtype.is_floating, has_narrower=narrower(pair) is not None
        )  # fmt: skip


def narrower(pair: Pair) -> DType | None:
    """The narrower of two floating dtypes, one of which holds all values of the other; None where there is none."""
    a, b = pair.a.dtype, pair.b.dtype
    if a == b or not pair.dtype.is_floating:
        return None
    return a if is_held(a, b) else b if is_held(b, a) else None


def _differ_rounded(a: Words, b: Words, pair: Pair, narrow: DType) -> int:
    """How many elements differ once those of the wider dtype are rounded to the narrower one."""
    if pair.a.dtype != narrow:
        return int(np.count_nonzero(rounded(a, pair.a.dtype, narrow) != b))
    return int(np.count_nonzero(a != rounded(b, pair.b.dtype, narrow)))
