"""Reads files in parallel and tells the listener of each."""

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
Content = TypeVar("Content")


def read_all(sizes: Mapping[Key, int], options: OpenOptions, read: Callable[[Key], Content]) -> dict[Key, Content]:
    """What `read` makes of each key, in the order of `sizes`: the bytes that each counts for in the progress.

    Raises what `read` raises for the first that it cannot read.
    """
    options.listener(Started("reading", sum(sizes.values())))
    contents: dict[Key, Content] = {}
    with ThreadPoolExecutor(max(1, options.workers)) as pool:
        for (key, size), content in zip(sizes.items(), pool.map(read, sizes), strict=True):
            contents[key] = content
            _log.debug("%s: a %s", key, type(content).__name__)
            options.listener(Advanced(size))
    options.listener(Ended("reading"))
    return contents


def is_file(path: Path) -> bool:
    """Whether there is a file; False for a name that no file can have: too long, or with a NUL in it."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_files(files: Mapping[Key, Path], options: OpenOptions, read: Callable[[Path], Any]) -> dict[Key, Any]:
    """What `read` makes of each file, by the file's key and in the order of `files`. Raises as `read_all`."""
    contents = read_all({path: path.stat().st_size for path in files.values()}, options, read)
    return {key: contents[path] for key, path in files.items()}
