"""The progress bar: listens to the engine's events and shows bytes, rate and time left."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nbmerge.engine.events import Advanced, Ended, Event, Listener, Started, silent

_DELAY = 1.0  # seconds of work before a bar appears


class ProgressBar:
    """One tqdm bar for a phase at a time. May be called from several threads."""

    def __init__(self, *, delay: float) -> None:
        self._delay = delay
        self._bar: Any = None
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        with self._lock:
            if isinstance(event, Started):
                self._open(event)
            elif isinstance(event, Advanced) and self._bar is not None:
                self._bar.update(event.nbytes)
            elif isinstance(event, Ended):
                self._close()

    def _open(self, event: Started) -> None:
        from tqdm.auto import tqdm

        self._close()
        self._bar = tqdm(total=event.total, desc=event.phase, unit="B", unit_scale=True, leave=False, delay=self._delay)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        """Takes the bar away, also after a failure."""
        with self._lock:
            self._close()


@contextmanager
def listener(progress: bool | None) -> Iterator[Listener]:
    """A listener for the engine: a bar at once (True), for longer work only (None), or nothing (False)."""
    if progress is False:
        yield silent
        return
    bar = ProgressBar(delay=0.0 if progress else _DELAY)
    try:
        yield bar
    finally:
        bar.close()
