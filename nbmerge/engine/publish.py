"""The last steps of a merge: a locked sibling of the target to write in, and its renaming at the end.

A directory under the target's name is complete. The sibling's name carries the plan's digest, so that a second
run of the same plan finds the files that the first one finished.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nbmerge.engine.target import Target, check_replaceable
from nbmerge.errors import SpaceError, TargetError

_log = logging.getLogger(__name__)
_OLD = ".old"
# What file systems of clusters answer where they have no locks, or no way to sync a directory.
_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def workspace(target: Target) -> Iterator[Path]:
    """The locked sibling directory. Raises TargetError where another process is writing it, or has just finished."""
    target.path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(target.lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        if not _taken(lock, target.lock):
            raise TargetError(
                "another process is merging the same checkpoint to the same target", where=str(target.path),
                fix="wait for it, or choose another target",
            )  # fmt: skip
        try:
            _undo_interrupted_swap(target)
            check_replaceable(target.path, overwrite=target.overwrite)  # another process may just have finished
            _make_own(target.work)
            yield target.work
        finally:
            target.lock.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _taken(lock: int, path: Path) -> bool:
    """Whether this process now holds the lock, and its file is still the one that others would open."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            _log.warning("%s: this file system has no locks; do not merge to one target twice at a time", path.parent)
            return True
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False


def _make_own(directory: Path) -> None:
    """The directory, made or found. One that was there must be no link, and not somebody else's."""
    try:
        directory.mkdir()
    except FileExistsError:
        if directory.is_symlink() or directory.stat().st_uid != os.getuid():
            raise TargetError(
                "the working directory beside the target belongs to somebody else", where=str(directory),
                fix="choose a target in a directory of your own",
            ) from None  # fmt: skip


def publish(target: Target) -> None:
    """Gives the finished sibling the target's name; what was there before is kept until that is done.

    Raises TargetError where something came to be there that must not be replaced.
    """
    sync_directory(target.work)
    check_replaceable(target.path, overwrite=target.overwrite)  # another plan's merge may have finished meanwhile
    old: Path | None = None
    if target.path.is_dir() and any(target.path.iterdir()):  # a rename replaces an empty directory by itself
        old = target.work.with_name(target.work.name + _OLD)
        target.path.rename(old)
    try:
        target.work.rename(target.path)
    except BaseException:
        if old is not None and not target.path.exists():
            old.rename(target.path)
        raise
    sync_directory(target.path.parent)
    _log.debug("published %s", target.path)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    _remove_abandoned(target)


def _remove_abandoned(target: Target) -> None:
    """Removes what interrupted merges of other plans left for this target. A running one has its lock file there."""
    stem = re.escape(target.work.name.rpartition("-")[0])
    for sibling in target.work.parent.iterdir():
        is_sibling = re.fullmatch(rf"{stem}-[0-9a-f]{{12}}", sibling.name) and not sibling.is_symlink()
        if is_sibling and sibling.is_dir() and not sibling.with_name(sibling.name + ".lock").exists():
            shutil.rmtree(sibling, ignore_errors=True)


def _undo_interrupted_swap(target: Target) -> None:
    """After a crash between the two renames, or before the old directory was removed: none of it is lost or left."""
    old = target.work.with_name(target.work.name + _OLD)
    if not old.is_dir():
        return
    if target.path.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.rename(target.path)


def write_synced(path: Path, content: bytes) -> None:
    """A small file, on disk when this returns."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def copy_synced(source: Path, path: Path) -> None:
    """A copy of a file of any size, on disk when this returns. Its permissions are those of a new file."""
    shutil.copyfile(source, path)
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """The directory's entries, on disk when this returns, where the file system can do that."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(fd)


def discard(target: Target) -> None:
    """Removes the sibling, where what is in it must not be reused."""
    shutil.rmtree(target.work, ignore_errors=True)


def full_disk(error: OSError, target: Target) -> SpaceError | None:
    """The error to tell where writing failed because the disk, or the user's quota on it, is full."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return None
    whole = sorted(path.name for path in target.work.glob("*.safetensors")) if target.work.is_dir() else []
    return SpaceError(
        f"the disk became full: {os.strerror(error.errno or 0)}", where=str(target.work),
        why=f"{len(whole)} finished files are kept there" if whole else "nothing was finished",
        fix="free some space and run the same merge again; it takes up where it stopped",
    )  # fmt: skip
