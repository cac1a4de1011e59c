"""Writes the files of a plan into a directory, with threads, and reuses those that an earlier run finished."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nbmerge.engine import copy
from nbmerge.engine.comparison import Comparison
from nbmerge.engine.events import Advanced, Ended, FileDone, Listener, Started, silent
from nbmerge.engine.sources import LocalFiles
from nbmerge.errors import InconsistentCheckpointError
from nbmerge.plan import Drift, Equality, MergePlan, OutputFile

_log = logging.getLogger(__name__)
PART = ".part"
_PENDING_PER_WORKER = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the engine did: seconds, bytes written, files that an earlier run had written, copies that differ."""

    seconds: float
    written_bytes: int
    reused: tuple[str, ...]
    drift: tuple[Drift, ...]


class Pool:
    """Runs jobs on threads with a bounded queue; the first failure, or an interrupt, stops the rest."""

    def __init__(self, workers: int) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="nbmerge")
        self._limit = workers * _PENDING_PER_WORKER
        self._pending: set[Future[None]] = set()
        self._stopped = threading.Event()

    def submit(self, work: Callable[[], None]) -> None:
        """Queues a job; waits while the queue is full. Raises what an earlier job raised."""
        while len(self._pending) >= self._limit:
            self._collect()
        self._pending.add(self._pool.submit(self._unless_stopped, work))

    def drain(self) -> None:
        """Waits for all jobs. Raises what the first failed one raised."""
        while self._pending:
            self._collect()

    def _collect(self) -> None:
        done, self._pending = wait(self._pending, return_when=FIRST_COMPLETED)
        for future in done:
            try:
                future.result()
            except BaseException:
                # Whoever waits for the jobs closes their file next, so none may still be running.
                self._stopped.set()
                wait(self._pending)
                self._pending = set()
                raise

    def _unless_stopped(self, work: Callable[[], None]) -> None:
        if not self._stopped.is_set():
            work()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


def write_files(plan: MergePlan, directory: Path, listener: Listener = silent) -> Outcome:
    """Writes the plan's safetensors files into the directory and compares what the plan says must be equal.

    A file that is there whole is reused. Raises OSError, CorruptFileError or InconsistentCheckpointError; files
    that were finished before stay, unfinished ones are removed.
    """
    start = time.perf_counter()
    total = plan.data_bytes + sum(equality.nbytes for equality in plan.equalities)
    listener(Started("writing", total))
    reused: list[str] = []
    written = 0
    with LocalFiles() as sources, Pool(plan.execution.workers) as pool:
        for file in plan.files:
            path = directory / file.name
            if _is_whole(path, file):
                reused.append(file.name)
                _log.debug("%s: whole already", file.name)
                listener(Advanced(file.data_bytes))
                listener(FileDone(file.name, file.size, True))
                continue
            _write_file(file, path, plan.execution.buffer_bytes, sources, pool, listener)
            written += file.size
        drift = _compare(plan, sources, pool, listener)
    listener(Ended("writing"))
    return Outcome(time.perf_counter() - start, written, tuple(reused), drift)


def _is_whole(path: Path, file: OutputFile) -> bool:
    """Whether an earlier run of the same plan finished the file: only then has it its final name."""
    return path.is_file() and path.stat().st_size == file.size


def _write_file(
    file: OutputFile, path: Path, buffer_bytes: int, sources: LocalFiles, pool: Pool, listener: Listener
) -> None:
    part = path.with_name(path.name + PART)
    start = time.perf_counter()
    try:
        with _created(part, file.size) as target:
            copy.write_all(target, memoryview(file.header), 0)
            try:
                for job in copy.batched(_jobs(file, buffer_bytes)):
                    pool.submit(_task(job, target, sources, listener))
            finally:
                pool.drain()
            os.fsync(target)
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _log.debug(
        "%s: %d bytes, %d tensors in %.2f s", file.name, file.size, len(file.tensors), time.perf_counter() - start
    )
    listener(FileDone(file.name, file.size, False))


@contextmanager
def _created(path: Path, size: int) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def _jobs(file: OutputFile, buffer_bytes: int) -> Iterator[copy.Job]:
    for tensor in file.tensors:
        yield from copy.jobs_of(tensor.expr, len(file.header) + tensor.offset, buffer_bytes)


def _task(job: copy.Job, target: int, sources: LocalFiles, listener: Listener) -> Callable[[], None]:
    def work() -> None:
        copy.carry_out(job, target, sources)
        listener(Advanced(job.nbytes))

    return work


def _compare(plan: MergePlan, sources: LocalFiles, pool: Pool, listener: Listener) -> tuple[Drift, ...]:
    """Compares what the plan says must be compared. Raises InconsistentCheckpointError where it forbids the merge."""
    found = Comparison()

    def task(equality: Equality) -> Callable[[], None]:
        def work() -> None:
            found.compare(equality, plan.execution.buffer_bytes, sources)
            listener(Advanced(equality.nbytes))

        return work

    for equality in plan.equalities:
        pool.submit(task(equality))
    pool.drain()
    if found.problems:
        title = f"{len(found.problems)} tensors differ from what they are tied to"
        raise InconsistentCheckpointError(title, problems=found.problems)
    return tuple(found.drift)
