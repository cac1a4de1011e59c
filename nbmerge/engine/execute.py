"""Writes the files of a plan into a directory, with threads, and reuses those that an earlier run finished."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from nbmerge.engine import copy
from nbmerge.engine.comparison import Comparison
from nbmerge.engine.events import Advanced, Ended, FileDone, Listener, Started, silent
from nbmerge.engine.pool import Pool
from nbmerge.engine.sources import LocalFiles
from nbmerge.errors import InconsistentCheckpointError
from nbmerge.layout import Drift, Equality
from nbmerge.plan import MergePlan, OutputFile

_log = logging.getLogger(__name__)
PART = ".part"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the engine did: seconds, bytes written, files that an earlier run had written, copies that differ."""

    seconds: float
    written_bytes: int
    reused: tuple[str, ...]
    drift: tuple[Drift, ...]


class _Writing:
    """An output file while jobs write it. Whoever does the last job syncs it and gives it its final name."""

    def __init__(self, file: OutputFile, path: Path, listener: Listener) -> None:
        self._file, self._path, self._listener = file, path, listener
        self._part = path.with_name(path.name + PART)
        self._start = time.perf_counter()
        self._lock = threading.Lock()
        self._left = 1  # the one that `sealed` takes away, so that no job is the last before all are known
        self._running = 0  # the descriptor stays open while a job may write to it: its number could become another's
        self._over = self._closed = False
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
        self._target = os.open(self._part, flags, 0o666)
        try:
            os.ftruncate(self._target, file.size)
        except OSError:
            self.close()
            raise

    def job(self, job: copy.Job, sources: LocalFiles) -> Callable[[], None]:
        """The work of one job, to be run once by any thread."""
        with self._lock:
            self._left += 1

        def act() -> None:
            copy.carry_out(job, self._target, sources)
            self._listener(Advanced(job.nbytes))

        return lambda: self._run(act)

    def sealed(self) -> None:
        """Writes the header. All jobs are known now: whichever ends last finishes the file."""
        self._run(lambda: copy.write_all(self._target, memoryview(self._file.header), 0))

    def _run(self, act: Callable[[], None]) -> None:
        with self._lock:
            if self._over:
                return
            self._running += 1
        try:
            act()
            with self._lock:
                self._left -= 1
                last = self._left == 0
            if last:
                self._finish()
        finally:
            with self._lock:
                self._running -= 1
                self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._over and self._running == 0 and not self._closed:
            os.close(self._target)
            self._closed = True

    def _finish(self) -> None:
        os.fsync(self._target)
        self._part.rename(self._path)
        self._over = True
        _log.debug("%s: %d bytes in %.2f s", self._file.name, self._file.size, time.perf_counter() - self._start)
        self._listener(FileDone(self._file.name, self._file.size, False))

    def close(self) -> None:
        """Lets go of the file, and removes it where it was not finished. A job that still runs closes it last."""
        self._part.unlink(missing_ok=True)
        with self._lock:
            self._over = True
            self._close_if_idle()


def write_files(plan: MergePlan, directory: Path, listener: Listener = silent) -> Outcome:
    """Writes the plan's safetensors files into the directory and compares what the plan says must be equal.

    A file that is there whole is reused. Raises OSError, CorruptFileError or InconsistentCheckpointError; files
    that were finished before stay, unfinished ones are removed.
    """
    start = time.perf_counter()
    listener(Started("writing", plan.data_bytes + sum(equality.nbytes for equality in plan.equalities)))
    reused: list[str] = []
    written = 0
    with ExitStack() as unfinished, LocalFiles() as sources, Pool(plan.execution.workers) as pool:
        for file in plan.weight_files:
            path = directory / file.name
            path.parent.mkdir(exist_ok=True)
            if _is_whole(path, file):
                reused.append(file.name)
                listener(Advanced(file.data_bytes))
                listener(FileDone(file.name, file.size, True))
                continue
            writing = unfinished.enter_context(closing(_Writing(file, path, listener)))
            for job in copy.batched(_jobs(file, plan.execution.buffer_bytes)):
                pool.submit(writing.job(job, sources))
            pool.submit(writing.sealed)
            written += file.size
        drift = _compare(plan, sources, pool, listener)
    listener(Ended("writing"))
    return Outcome(time.perf_counter() - start, written, tuple(reused), drift)


def _is_whole(path: Path, file: OutputFile) -> bool:
    """Whether an earlier run of the same plan finished the file: only then has it its final name."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    with path.open("rb") as stream:
        return stream.read(len(file.header)) == file.header


def _jobs(file: OutputFile, buffer_bytes: int) -> Iterator[copy.Job]:
    for tensor in file.tensors:
        yield from copy.jobs_of(tensor.expr, len(file.header) + tensor.offset, buffer_bytes)


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
