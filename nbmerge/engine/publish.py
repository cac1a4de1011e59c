"""The life of a target directory: checked, written as a locked sibling, renamed at the end.

A directory under the target's name is complete. The sibling's name carries the plan's digest, so that a second
run of the same plan finds the files that the first one finished.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nbmerge.errors import SpaceError, TargetError, listing
from nbmerge.plan import MergePlan
from nbmerge.receipt import RECEIPT_NAME

_log = logging.getLogger(__name__)
_MODEL_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt", ".md", ".bin", ".py", ".tiktoken"}
_MODEL_FOLDERS = {"lora_adapter", "additional_chat_templates"}
_HEADROOM = 2**20  # bytes for directory entries and the receipt


@dataclass(frozen=True)
class Target:
    """A target that was checked, as it was given and as an absolute path, and the sibling that it will be made of.

    overwrite: whether what is there may be replaced.
    """

    given: Path
    path: Path
    work: Path
    lock: Path
    overwrite: bool


def check_target(plan: MergePlan, target: Path, *, overwrite: bool) -> Target:
    """Whether the plan may be written to `target`; nothing is written yet.

    Raises TargetError or SpaceError.
    """
    given = target.expanduser()
    target = Path(os.path.abspath(given))  # noqa: PTH100 - resolve() would follow a link
    _refuse_the_source(plan, target)
    _check_replaceable(target, overwrite=overwrite)
    parent = _existing_parent(target)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise TargetError(
            "the target cannot be written: permission denied", where=str(parent),
            fix="choose another directory, or change its permissions",
        )  # fmt: skip
    name = f".{target.name}.nbmerge-{plan.digest[:12]}"
    work = target.parent / name
    _check_space(plan, parent, work)
    return Target(given, target, work, target.parent / f"{name}.lock", overwrite)


def _existing_parent(target: Path) -> Path:
    """The nearest directory above the target that is there. Raises TargetError where a file is in the way."""
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise TargetError("a file is in the way of the target", where=str(parent), fix="choose another directory")
    return parent


def _refuse_the_source(plan: MergePlan, target: Path) -> None:
    real, source = target.resolve(), plan.checkpoint.path.resolve()
    config = plan.checkpoint.config_dir.resolve() if plan.checkpoint.config_dir else None
    if real == config and real != source:
        raise TargetError(
            f"{target.name}/ is a part of the checkpoint: its config and tokenizer are read from it",
            where=str(target),
            why="the merged directory is a new one, so that the checkpoint stays as training left it",
            fix=f"choose another directory, for example {source.with_name(source.name + '-hf')}",
        )
    if real == source or real in source.parents:
        raise TargetError(
            "the target is the checkpoint itself" if real == source else "the target holds the checkpoint",
            where=str(target),
            why="what training left must not be replaced",
            fix=f"choose another directory, for example {source.with_name(source.name + '-hf')}",
        )
    if real == Path.home().resolve() or real == Path(real.anchor):
        raise TargetError("the target is your home directory, or the root", where=str(target),
                          fix="choose a new directory")  # fmt: skip


def _check_replaceable(target: Path, *, overwrite: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise TargetError(
            "the target exists and is a link" if target.is_symlink() else "the target exists and is a file",
            where=str(target), fix="choose another directory",
        )  # fmt: skip
    content = sorted(child.name for child in target.iterdir())
    if not content:
        return
    if not overwrite:
        raise TargetError(
            f"the target exists and holds {listing(content)}", where=str(target),
            why="nothing is overwritten without being asked",
            fix="choose another directory, or pass overwrite=True (--overwrite)",
        )  # fmt: skip
    if RECEIPT_NAME in content:
        return
    foreign = [child.name for child in target.iterdir() if not _is_model_file(child)]
    if foreign:
        raise TargetError(
            f"the target holds what is no part of a model: {listing(sorted(foreign))}", where=str(target),
            why="only a directory with a merge's receipt, or with nothing but model files, is replaced",
            fix="choose another directory, or move these files away",
        )  # fmt: skip


def _is_model_file(path: Path) -> bool:
    if path.is_dir():
        return path.name in _MODEL_FOLDERS
    return path.suffix in _MODEL_SUFFIXES


def _check_space(plan: MergePlan, parent: Path, work: Path) -> None:
    written = sum(child.stat().st_size for child in work.iterdir()) if work.is_dir() else 0
    need = plan.total_bytes + _HEADROOM - written
    free = shutil.disk_usage(parent).free
    if free < need:
        raise SpaceError(
            f"the result needs {need:,} bytes more, and the disk has {free:,} free", where=str(parent),
            fix="free some space, or choose a target on another disk",
        )  # fmt: skip


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
            _check_replaceable(target.path, overwrite=target.overwrite)  # another process may just have finished
            target.work.mkdir(exist_ok=True)
            if target.work.is_symlink() or target.work.stat().st_uid != os.getuid():
                raise TargetError(
                    "the working directory beside the target belongs to somebody else", where=str(target.work),
                    fix="choose a target in a directory of your own",
                )  # fmt: skip
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
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False


def publish(target: Target) -> None:
    """Gives the finished sibling the target's name; what was there before is kept until that is done.

    Raises TargetError where something came to be there that must not be replaced.
    """
    sync_directory(target.work)
    _check_replaceable(target.path, overwrite=target.overwrite)  # another plan's merge may have finished meanwhile
    old: Path | None = None
    if target.path.is_dir():
        old = target.work.with_name(target.work.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        target.path.rename(old)
    try:
        target.work.rename(target.path)
    except OSError:
        if old is not None:
            old.rename(target.path)
        raise
    sync_directory(target.path.parent)
    _log.debug("published %s", target.path)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def write_synced(path: Path, content: bytes) -> None:
    """A small file, on disk when this returns."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """The directory's entries, on disk when this returns."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
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
