"""Reads the files of all ranks in parallel and tells the listener of each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from nbmerge.engine.events import Advanced, Ended, Started
from nbmerge.loaders.base import OpenOptions

_log = logging.getLogger(__name__)
Key = TypeVar("Key")


def read_files(files: Mapping[Key, Path], options: OpenOptions, read: Callable[[Path], Any]) -> dict[Key, Any]:
    """What `read` makes of each file, by the file's key and in the order of `files`.

    Raises what `read` raises for the first file that it cannot read.
    """
    options.listener(Started("reading", sum(path.stat().st_size for path in files.values())))
    contents: dict[Key, Any] = {}
    with ThreadPoolExecutor(max(1, options.workers)) as pool:
        for (key, path), content in zip(files.items(), pool.map(read, files.values()), strict=True):
            contents[key] = content
            _log.debug("%s: a %s", path, type(content).__name__)
            options.listener(Advanced(path.stat().st_size))
    options.listener(Ended("reading"))
    return contents
