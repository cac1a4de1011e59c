"""The files that are read: one small interface, so that a remote one fits, and a cache of open local ones."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nbmerge.errors import CorruptFileError

_MAX_OPEN = 256  # below the usual limit of 1,024 open files

Bytes = npt.NDArray[np.uint8]


class Sources(Protocol):
    """Reads bytes of files by name. Safe to use from several threads."""

    def read_into(self, file: str, offset: int, buffer: Bytes) -> None:
        """Fills the contiguous buffer with the bytes from `offset` on. Raises CorruptFileError at the file's end."""

    def descriptor(self, file: str) -> object:
        """A context manager that gives the file's descriptor, or None where it has none."""


class LocalFiles:
    """Files of this machine, kept open while they are in use, and the most recent ones beyond that."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, list[int]] = OrderedDict()  # file → [descriptor, users]
        self._closed = False

    @contextmanager
    def descriptor(self, file: str) -> Iterator[int]:
        """The descriptor of a file, open for reading."""
        with self._lock:
            entry = self._open.get(file)
            if entry is None:
                entry = self._open[file] = [os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)), 0]
            self._open.move_to_end(file)
            entry[1] += 1
            self._close_idle(_MAX_OPEN)
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1
                self._close_idle(0 if self._closed else _MAX_OPEN)

    def _close_idle(self, keep: int) -> None:
        for file in [file for file, entry in self._open.items() if entry[1] == 0]:
            if len(self._open) <= keep:
                return
            os.close(self._open.pop(file)[0])

    def read_into(self, file: str, offset: int, buffer: Bytes) -> None:
        """Fills the buffer from the file. Raises CorruptFileError where the file ends before."""
        view = buffer.data.cast("B") if buffer.size else memoryview(b"")
        done = 0
        with self.descriptor(file) as fd:
            while done < len(view):
                count = pread_into(fd, view[done:], offset + done)
                if count == 0:
                    raise ends_early(file, offset + len(view))
                done += count

    def close(self) -> None:
        """Closes every file; one that a thread still reads is closed when it has read."""
        with self._lock:
            self._closed = True
            self._close_idle(0)

    def __enter__(self) -> LocalFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pread_into(fd: int, view: memoryview, offset: int) -> int:
    """Reads bytes at `offset` into the view and returns how many; 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], offset)
    data = os.pread(fd, len(view), offset)  # macOS has no preadv
    view[: len(data)] = data
    return len(data)


def ends_early(file: str, wanted: int) -> CorruptFileError:
    """The file became shorter than its index said."""
    return CorruptFileError(
        f"the file ends before byte {wanted:,}", where=file,
        why="it was cut short or replaced after its header was read",
        fix="merge again when nothing writes to the checkpoint",
    )  # fmt: skip
