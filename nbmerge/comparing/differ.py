"""Compares two models block by block, on threads, in memory that does not grow with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from nbmerge.comparing.alignment import Alignment, Pair, align
from nbmerge.comparing.collector import Collector
from nbmerge.comparing.model_diff import Looked, ModelDiff, TensorDiff
from nbmerge.comparing.rank_one import rank_one_share
from nbmerge.engine.events import Advanced, Ended, Listener, Started, silent
from nbmerge.engine.pool import Pool, default_workers
from nbmerge.engine.scan import Scanned, Visit, Walk, scan
from nbmerge.engine.sources import LocalFiles
from nbmerge.errors import OptionError
from nbmerge.options import check_share, check_workers
from nbmerge.weights import Weights

_PHASE = "comparing"
_BLOCK_BYTES = 2 * 2**20  # of the wider of two tensors: some pieces of the kernel


def diff_weights(
    a: Weights,
    b: Weights,
    *,
    frozen: str | Iterable[str] = (),
    rank_one: bool = False,
    sample: float = 1.0,
    workers: int | None = None,
    listener: Listener = silent,
) -> ModelDiff:
    """How the tensors of `a` became those of `b`.

    frozen: patterns of names (`*.embed_tokens.*`) that must not have changed; rank_one: also find, for every matrix
    that changed, how much of its update is one outer product; sample: the share of blocks to look at, where tensors
    declared frozen are looked at as a whole all the same. Raises OptionError, and what reading raises.
    """
    check_options(sample=sample, rank_one=rank_one, workers=workers)
    start = time.perf_counter()
    alignment = align(a, b)
    collector = Collector(alignment.pairs)
    looking = Looking(alignment, patterns_of(frozen), sample, workers, listener)
    walks = [Walk(pair.name, (pair.a, pair.b)) for pair in alignment.pairs]
    looked = looking.scan(walks, lambda name, region, words: collector.add(name, region, words[0], words[1]))
    diff = looking.report(a.label, b.label, collector, looked)
    if rank_one:
        diff = replace(diff, tensors=_with_rank_one(diff, walks, workers, listener))
    return replace(diff, looked=replace(diff.looked, seconds=time.perf_counter() - start)).summed_up()


def check_options(*, sample: float, rank_one: bool, workers: int | None) -> None:
    """Raises OptionError for a value that makes no sense."""
    check_share(sample)
    if rank_one and sample < 1:
        raise OptionError("rank_one needs whole matrices, and sample leaves blocks out", fix="leave one of them out")
    check_workers(workers)


def patterns_of(frozen: str | Iterable[str]) -> tuple[str, ...]:
    """The patterns; one that is given alone is one, not its letters."""
    return (frozen,) if isinstance(frozen, str) else tuple(frozen)


class Looking:
    """One comparison under way: what is paired, what is declared frozen, and how much is to be looked at."""

    def __init__(
        self, alignment: Alignment, patterns: Sequence[str], sample: float, workers: int | None, listener: Listener
    ) -> None:
        self._alignment, self._patterns = alignment, tuple(patterns)
        self._sample, self._workers, self._listener = sample, workers, listener
        self._names = alignment.names
        self._frozen = {name for name in self._names if any(fnmatchcase(name, pattern) for pattern in patterns)}

    def scan(self, walks: Sequence[Walk], visit: Visit) -> Looked:
        """Looks at all walks, or at a sample of them; always at the whole of what is declared frozen."""
        whole = [walk for walk in walks if walk.name in self._frozen and self._sample < 1]
        rest = [walk for walk in walks if not (walk.name in self._frozen and self._sample < 1)]
        done = [self._scan(rest, visit, self._sample)]
        if whole:
            done.append(self._scan(whole, visit, 1.0))
        nbytes, all_bytes = sum(one.nbytes for one in done), sum(one.all_bytes for one in done)
        return Looked(nbytes / all_bytes if all_bytes else 1.0, self._sample, nbytes)

    def _scan(self, walks: Sequence[Walk], visit: Visit, sample: float) -> Scanned:
        return scan(
            walks, visit, phase=_PHASE, block_bytes=_BLOCK_BYTES, workers=self._workers, sample=sample,
            listener=self._listener,
        )  # fmt: skip

    def report(self, a: str, b: str, collector: Collector, looked: Looked) -> ModelDiff:
        """The report of what the collector has."""
        alignment = self._alignment
        return ModelDiff(
            a=a,
            b=b,
            tensors={pair.name: self._tensor(pair, collector) for pair in alignment.pairs},
            unmatched=alignment.unmatched,
            mismatched=alignment.mismatched,
            frozen=self._patterns,
            idle_patterns=tuple(p for p in self._patterns if not any(fnmatchcase(name, p) for name in self._names)),
            frozen_unseen=tuple(name for name in alignment.left_out if name in self._frozen),
            looked=looked,
            notes=alignment.notes,
        )

    def _tensor(self, pair: Pair, collector: Collector) -> TensorDiff:
        return TensorDiff(
            name=pair.name,
            shape=pair.a.shape,
            dtype_a=pair.a.dtype,
            dtype_b=pair.b.dtype,
            compared_as=pair.dtype,
            statistics=collector.statistics(pair.name),
            note=pair.note,
            frozen=pair.name in self._frozen,
        )


def _with_rank_one(
    diff: ModelDiff, walks: Sequence[Walk], workers: int | None, listener: Listener
) -> dict[str, TensorDiff]:
    """The tensors of a report with the rank-one share of every matrix that moved, several matrices at a time."""
    tensors = dict(diff.tensors)
    moved = [walk for walk in walks if _is_moved_matrix(tensors[walk.name])]
    lock = threading.Lock()

    def job(walk: Walk, sources: LocalFiles) -> Callable[[], None]:
        def work() -> None:
            found = tensors[walk.name]
            largest, products = found.statistics.largest, found.statistics.products
            if largest is not None and products is not None:
                share = rank_one_share(walk, products.dd, largest.size, sources)
                with lock:
                    tensors[walk.name] = replace(found, rank_one=share)
            listener(Advanced(walk.nbytes))

        return work

    listener(Started("rank one", sum(walk.nbytes for walk in moved)))
    with LocalFiles() as sources, Pool(workers or default_workers()) as pool:
        for walk in moved:
            pool.submit(job(walk, sources))
        pool.drain()
    listener(Ended("rank one"))
    return tensors


def _is_moved_matrix(tensor: TensorDiff) -> bool:
    largest = tensor.statistics.largest
    return len(tensor.shape) == 2 and tensor.compared_as.is_floating and largest is not None and largest.size > 0
