"""Looks through tensors block by block on threads: what validation and comparison do with every element."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nbmerge.engine.events import Advanced, Ended, Listener, Started, silent
from nbmerge.engine.lower import regions, turned
from nbmerge.engine.pool import Pool, default_workers
from nbmerge.engine.read import Words, read
from nbmerge.engine.sources import LocalFiles
from nbmerge.expressions import Expr
from nbmerge.geometry import Box

BLOCK_BYTES = 2**20  # of one tensor: two such blocks and what is made of them stay in a processor's cache

Visit = Callable[[str, Box, tuple[Words, ...]], None]

_KEPT_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Walk:
    """Tensors of one shape that are looked at together, the same block of each at a time. Their dtypes may differ."""

    name: str
    exprs: tuple[Expr, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(expr.nbytes for expr in self.exprs)

    def regions(self, limit: int) -> Iterator[Box]:
        """The blocks: at most `limit` bytes of the widest; tiles where one of them lies turned in its source."""
        widest = max(self.exprs, key=lambda expr: expr.dtype.itemsize)
        return regions(next((expr for expr in self.exprs if turned(expr) is not None), widest), limit)


@dataclass(frozen=True, slots=True)
class Scanned:
    """How much of the tensors was looked at: blocks, and bytes of all tensors of a walk together."""

    blocks: int
    all_blocks: int
    nbytes: int
    all_bytes: int

    @property
    def whole(self) -> bool:
        """Whether nothing was left out."""
        return self.blocks == self.all_blocks


def scan(
    walks: Iterable[Walk],
    visit: Visit,
    *,
    phase: str,
    workers: int | None = None,
    block_bytes: int = BLOCK_BYTES,
    sample: float = 1.0,
    listener: Listener = silent,
) -> Scanned:
    """Calls `visit(name, region, words)` with every block of every walk, `words` having an array for each tensor.

    visit: called from several threads, in no order; the arrays hold elements as unsigned integers of their size.
    sample: the share of the blocks of each tensor to look at; its first and its last block are always among them, and
    the same ones are taken each time. Raises what reading or `visit` raises.
    """
    every = list(walks)
    _keep_freed_memory()
    listener(Started(phase, sum(walk.nbytes for walk in every)))
    blocks = all_blocks = nbytes = 0
    with LocalFiles() as sources, Pool(workers or default_workers()) as pool:
        for walk in every:
            found = list(walk.regions(block_bytes))
            chosen = found if sample >= 1 else _sampled(walk.name, found, sample)
            for region in chosen:
                pool.submit(_job(walk, region, visit, sources, listener))
                nbytes += _bytes_of(walk, region)
            listener(Advanced(walk.nbytes - sum(_bytes_of(walk, region) for region in chosen)))
            blocks, all_blocks = blocks + len(chosen), all_blocks + len(found)
        pool.drain()
    listener(Ended(phase))
    return Scanned(blocks, all_blocks, nbytes, sum(walk.nbytes for walk in every))


def _keep_freed_memory() -> None:
    """Lets glibc keep what is freed between blocks, a few megabytes for each thread.

    It gives memory back to the system above a threshold, which grows with the largest allocation that was ever freed;
    without this one, every block costs a page fault for each 4 KiB of its temporaries: up to half of the time.
    """
    np.empty(_KEPT_BYTES, np.uint8)


def _sampled(name: str, found: Sequence[Box], share: float) -> list[Box]:
    chance = random.Random(name)
    last = len(found) - 1
    return [box for number, box in enumerate(found) if chance.random() < share or number in (0, last)]


def _bytes_of(walk: Walk, region: Box) -> int:
    return region.numel * sum(expr.dtype.itemsize for expr in walk.exprs)


def _job(walk: Walk, region: Box, visit: Visit, sources: LocalFiles, listener: Listener) -> Callable[[], None]:
    def work() -> None:
        visit(walk.name, region, tuple(read(expr, region, sources) for expr in walk.exprs))
        listener(Advanced(_bytes_of(walk, region)))

    return work
