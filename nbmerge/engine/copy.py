"""Moves bytes: straight from file to file where nothing changes, put together in memory elsewhere."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from nbmerge.engine.lower import Piece, pieces, regions
from nbmerge.engine.read import fill, words
from nbmerge.engine.sources import LocalFiles, ends_early, pread_into
from nbmerge.expressions import Expr, Stored
from nbmerge.geometry import Box, Shape, ravel, runs_of_box

_UNIT = 32 * 2**20  # bytes of one job: large enough that its call costs nothing, small enough to stop soon
_RUNS_PER_JOB = 256
# Fits the processor's cache: on an ext4 disk two threads that read and write 1 MiB at a time copy twice as fast
# as copy_file_range, which moves single pages where offsets are not aligned, and five times as fast as with 8 MiB.
_COPY_BUFFER = 2**20


class _Thread(threading.local):
    """Each thread's copy buffer, made when it first copies."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(_COPY_BUFFER))


_thread = _Thread()


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes that go as they are: `length` bytes from `source_offset` of a file to `offset` of the output."""

    file: str
    source_offset: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Runs:
    """A job of copies."""

    runs: tuple[Run, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the job writes."""
        return sum(run.length for run in self.runs)

    @property
    def span(self) -> tuple[int, int]:
        """The first byte of the output that the job writes, and the one after the last."""
        return min(run.offset for run in self.runs), max(run.offset + run.length for run in self.runs)


@dataclass(frozen=True, slots=True)
class Block:
    """A job that puts a box of a tensor together in memory, and writes it. offset: of the tensor in the output."""

    region: Box
    parts: tuple[Piece, ...]
    expr: Expr
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes that the job writes."""
        return self.region.numel * self.expr.dtype.itemsize

    @property
    def span(self) -> tuple[int, int]:
        """The first byte of the output that the job writes, and the one after the last."""
        last = tuple(stop - 1 for stop in self.region.stop)
        first, end = ravel(self.region.offset, self.expr.shape), ravel(last, self.expr.shape) + 1
        return self.offset + first * self.expr.dtype.itemsize, self.offset + end * self.expr.dtype.itemsize


Job = Runs | Block


def jobs_of(expr: Expr, offset: int, buffer_bytes: int) -> Iterator[Job]:
    """The jobs that write a tensor at `offset` of the output file."""
    parts = pieces(expr)
    runs: list[Run] = []
    for piece in parts:
        run = _run(piece, expr.shape, expr.dtype.itemsize, offset)
        if run is None:
            yield from _blocks(expr, parts, offset, buffer_bytes)
            return
        runs.append(run)
    for run in runs:
        for start in range(0, run.length, _UNIT):
            length = min(_UNIT, run.length - start)
            yield Runs((Run(run.file, run.source_offset + start, run.offset + start, length),))


def _run(piece: Piece, shape: Shape, itemsize: int, offset: int) -> Run | None:
    """The piece as one run, or None where it is not contiguous in the source and in the output."""
    leaf = piece.leaf
    if not isinstance(leaf, Stored) or not leaf.is_contiguous or not _is_contiguous_in(shape, piece.box):
        return None
    return Run(leaf.file, leaf.offset, offset + ravel(piece.box.offset, shape) * itemsize, leaf.nbytes)


def _is_contiguous_in(shape: Shape, box: Box) -> bool:
    """Whether the box is one run of the flattened tensor."""
    seen_cut = False
    for size, length in zip(reversed(shape), reversed(box.shape), strict=True):
        if seen_cut and length != 1:
            return False
        seen_cut = seen_cut or length != size
    return True


def _blocks(expr: Expr, parts: list[Piece], offset: int, buffer_bytes: int) -> Iterator[Job]:
    for region in regions(expr, buffer_bytes):
        inside = tuple(piece for piece in parts if piece.box.intersect(region) is not None)
        yield Block(region, inside, expr, offset)


def batched(jobs: Iterator[Job]) -> Iterator[Job]:
    """The same jobs, small copies put together so that a job is worth its call."""
    waiting: list[Run] = []
    size = 0
    for job in jobs:
        if isinstance(job, Block):
            yield job
            continue
        waiting += job.runs
        size += job.nbytes
        if size >= _UNIT or len(waiting) >= _RUNS_PER_JOB:
            yield Runs(tuple(waiting))
            waiting, size = [], 0
    if waiting:
        yield Runs(tuple(waiting))


def carry_out(job: Job, target: int, sources: LocalFiles) -> None:
    """Does one job on the open output file. Raises OSError where the disk refuses."""
    if isinstance(job, Runs):
        for run in job.runs:
            with sources.descriptor(run.file) as source:
                copy_run(source, target, run)
    else:
        _make(job, target, sources)
    start, stop = job.span
    if stop - start == job.nbytes:
        _begin_write_out(target, start, stop - start)


def _make(job: Block, target: int, sources: LocalFiles) -> None:
    """Puts a block together in memory, and writes it."""
    buffer = words(job.region.shape, job.expr.dtype)
    fill(buffer, job.region, job.parts, sources)
    data, at, itemsize = buffer.reshape(-1).view(np.uint8).data, 0, job.expr.dtype.itemsize
    for start, length in runs_of_box(job.expr.shape, job.region):
        write_all(target, data[at : at + length * itemsize], job.offset + start * itemsize)
        at += length * itemsize


def copy_run(source: int, target: int, run: Run) -> None:
    """Copies one run between open files. Raises CorruptFileError where the source ends before it."""
    buffer = _thread.buffer
    done = 0
    while done < run.length:
        count = pread_into(source, buffer[: run.length - done], run.source_offset + done)
        if count == 0:
            raise ends_early(run.file, run.source_offset + run.length)
        write_all(target, buffer[:count], run.offset + done)
        done += count


def write_all(target: int, data: memoryview, offset: int) -> None:
    """Writes all of the data at `offset`."""
    done = 0
    while done < len(data):
        done += os.pwrite(target, data[done:], offset + done)


def _begin_write_out(target: int, offset: int, length: int) -> None:
    """Lets the disk begin with finished bytes while others are copied, so that the last sync finds little to do.

    A hint: what it does not do, or fails at, the sync does and tells.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            # Linux queues a range that is not wanted in memory for writing at once, and drops only what is clean.
            os.posix_fadvise(target, offset, length, os.POSIX_FADV_DONTNEED)
