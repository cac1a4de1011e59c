"""Looks up names that stand in files, which may be anything at all, and never raises."""

from __future__ import annotations

from pathlib import Path

from nbmerge.errors import CheckpointError
from nbmerge.loaders.reading import is_file
from nbmerge.receipt import sha256_of


def size_of(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        return path.stat().st_size if is_file(path) else None
    except (OSError, ValueError):
        return None


def content_of(path: Path) -> bytes | None:
    """The content of a small file; None where it is missing or cannot be read."""
    try:
        return path.read_bytes() if is_file(path) else None
    except (OSError, ValueError):
        return None


def digest_of(path: Path) -> str:
    """The sha256 of a file; empty where it is missing or cannot be read."""
    try:
        return sha256_of(path) if is_file(path) else ""
    except (OSError, ValueError):
        return ""


def unreadable(directory: Path, error: OSError) -> CheckpointError:
    """The error for a directory that the user named and that this process may not read."""
    return CheckpointError(
        f"the directory cannot be read: {(error.strerror or type(error).__name__).lower()}",
        where=str(error.filename or directory),
        fix="change its permissions, or read it as the user who owns it",
    )


def is_inside(name: object) -> bool:
    """Whether it names a file below a directory."""
    return isinstance(name, str) and bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts
