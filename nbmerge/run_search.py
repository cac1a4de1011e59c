"""Where in a directory's tree checkpoints are, and of which steps, by names and by what loaders recognise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbmerge.loaders import is_recognised

# How frameworks name the directory of a step: verl, DeepSpeed, the Trainer, Megatron-LM, torchtitan.
_STEP = re.compile(r"(?:global_step|checkpoint|iter|step)[_-]?([0-9]{1,18})")
_DEPTH = 4
_DIRECTORIES = 2000  # a home directory given by mistake must not take minutes


@dataclass(frozen=True)
class Below:
    """recognised: directories with a checkpoint; empty_steps: such as are named after a step and have none in them.

    is_cut: whether there are more directories than were looked at.
    """

    recognised: tuple[Path, ...]
    empty_steps: tuple[Path, ...]
    is_cut: bool


def step_of(path: Path) -> int | None:
    """The step that a directory is of, by its own name: `global_step_100`, `checkpoint-100`, `iter_0000100`."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def step_below(path: Path, root: Path) -> int | None:
    """The step that a directory is of, by its own name or that of the nearest one around it, up to the root."""
    around = (each for each in (path, *path.parents) if each == root or root in each.parents)
    named = (each.resolve() if each == root else each for each in around)  # the root may be given as `..`
    return next((step for each in named if (step := step_of(each)) is not None), None)


def search(root: Path) -> Below:
    """The checkpoints below a directory, without what lies in one, nearest and highest steps first.

    A directory is taken once, however many links lead to it, and by its own path where that is below the root.
    """
    recognised: list[Path] = []
    steps: list[Path] = []
    level, seen, looked, real_root = [root], {root.resolve()}, 0, root.resolve()
    for _ in range(_DEPTH):
        following: list[Path] = []
        for child in (child for parent in level for child in subdirectories(parent)):
            real = child.resolve()
            if real in seen or (child.is_symlink() and real.is_relative_to(real_root)):
                continue
            seen.add(real)
            looked += 1
            if looked > _DIRECTORIES:
                return _below(recognised, steps, is_cut=True)
            if step_of(child) is not None:
                steps.append(child)
            if is_recognised(child):
                recognised.append(child)
            else:
                following.append(child)
        level = following
    return _below(recognised, steps, is_cut=False)


def _below(recognised: list[Path], steps: list[Path], *, is_cut: bool) -> Below:
    """Without the steps that a checkpoint is in; after a cut nobody knows which are empty."""
    taken = {around for path in recognised for around in (path, *path.parents)}
    return Below(tuple(recognised), () if is_cut else tuple(step for step in steps if step not in taken), is_cut)


def subdirectories(directory: Path) -> Iterator[Path]:
    """The directories in a directory, highest steps first; none where it may not be read."""
    try:
        children = [child for child in directory.iterdir() if child.is_dir()]
    except OSError:
        return
    yield from sorted(children, key=lambda child: (-_rank(child), child.name))


def _rank(path: Path) -> int:
    step = step_of(path)
    return -1 if step is None else step
