"""Threads with a bounded queue: whoever fills it waits, and the first failure stops the rest."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

_PENDING_PER_WORKER = 4
_MAX_WORKERS = 8


def default_workers() -> int:
    """One for each processor, from 2 to 8."""
    return min(max(os.cpu_count() or 1, 2), _MAX_WORKERS)


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
