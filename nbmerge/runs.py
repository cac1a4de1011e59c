"""What a directory of a training run holds: which checkpoints are where, of which steps, and which are whole."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbmerge.errors import NbmergeError, Problem
from nbmerge.layout import Checkpoint
from nbmerge.loaders import directories_below, inventory, is_recognised, votes
from nbmerge.loaders.base import existing_directory
from nbmerge.opening import PathLike, open_checkpoint
from nbmerge.options import expanded_path
from nbmerge.shown import Displayed

# How frameworks name the directory of a step: verl, DeepSpeed, the Trainer, Megatron-LM, torchtitan.
_STEP = re.compile(r"(?:global_step|checkpoint|iter|step)[_-]?(\d+)")
_TRACKERS = ("latest_checkpointed_iteration.txt", "latest")
_LONGEST_STEP = 64  # characters
_MOST = 100  # directories that are opened


@dataclass(frozen=True)
class Found:
    """A directory of a run that holds a checkpoint, or that should.

    step: by its name, None where no name says it; backends: of the loaders that recognise it; checkpoint: its index,
    None where it cannot be opened; problem: what is wrong with it; is_latest: whether a tracker file names its step.
    """

    path: Path
    step: int | None
    backends: tuple[str, ...]
    checkpoint: Checkpoint | None
    problem: Problem | None = None
    is_latest: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether every file of it is there and its tensors can be put together."""
        return self.checkpoint is not None and not self.checkpoint.problems


@dataclass(frozen=True, repr=False)
class Run(Displayed):
    """The checkpoints below a directory, in the order of their steps. Nothing of their tensors has been read.

    hidden: how many further directories were recognised and not opened.
    """

    path: Path
    found: tuple[Found, ...]
    hidden: int = 0

    def __iter__(self) -> Iterator[Found]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    @property
    def steps(self) -> list[int]:
        """The steps that have a directory, each once, in order."""
        return sorted({each.step for each in self.found if each.step is not None})

    @property
    def latest(self) -> Found | None:
        """The whole checkpoint of the highest step, of what can be merged the first by name; None without any."""
        whole = [each for each in self.found if each.is_whole]
        return max(reversed(whole), key=lambda each: -1 if each.step is None else each.step, default=None)


def inspect(path: PathLike, **options: Any) -> Checkpoint | Run:
    """The checkpoint in a directory, or, for one that holds several, what is where. Reads no tensor data.

        nbmerge.inspect("checkpoints/my_run")             # steps, layouts, what is whole, and which path to pass
        nbmerge.inspect("checkpoints/my_run/global_step_100/actor")

    options: the keywords of `open_checkpoint`. Raises NotACheckpointError where neither the directory nor one below it
    holds anything that a loader recognises, and for the checkpoint in the directory itself what opening raises.
    """
    directory = existing_directory(expanded_path(os.fspath(path)))
    if options.get("backend", "auto") == "auto" and not is_recognised(directory):
        run = survey(directory, **options)
        if any(each.backends for each in run):
            return run
    return open_checkpoint(path, **options)


def survey(path: PathLike, **options: Any) -> Run:
    """What is where below a directory: every checkpoint is opened, and what keeps one from being whole is told.

    options: the keywords of `open_checkpoint`. Raises NotACheckpointError where there is no such directory.
    """
    directory = existing_directory(expanded_path(os.fspath(path)))
    recognised = list(_recognised(directory))
    opened = [_opened(each, directory, options) for each in recognised[:_MOST]]
    found = [*opened, *_empty_steps(directory, recognised)]
    found.sort(key=lambda each: (-1 if each.step is None else each.step, str(each.path)))
    return Run(directory, tuple(found), max(len(recognised) - _MOST, 0))


def step_of(path: Path) -> int | None:
    """The step that a directory is of, by its own name: `global_step_100`, `checkpoint-100`, `iter_0000100`."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def _recognised(directory: Path) -> Iterator[Path]:
    """The directories below that a loader recognises, without what lies in such a directory."""
    taken: set[Path] = set()
    for child in directories_below(directory):
        if not taken.isdisjoint(child.parents):
            continue
        if is_recognised(child):
            taken.add(child)
            yield child


def _opened(path: Path, root: Path, options: dict[str, Any]) -> Found:
    backends = tuple(loader.name for loader, _ in votes(path))
    checkpoint, problem = None, None
    try:
        checkpoint = open_checkpoint(path, **{"progress": False, **options})
    except NbmergeError as error:
        problem = error.problem
    except OSError as error:
        problem = Problem(f"it cannot be read: {error.strerror}", where=str(error.filename))
    step = next((step for each in (path, *path.parents) if (step := _within(each, root)) is not None), None)
    return Found(path, step, backends, checkpoint, problem, step is not None and step in _tracked(path, root))


def _within(path: Path, root: Path) -> int | None:
    return step_of(path) if path == root or root in path.parents else None


def _tracked(path: Path, root: Path) -> set[int]:
    """The steps that tracker files name in the directories from the root to the checkpoint."""
    found = set()
    for directory in (parent for parent in path.parents if parent == root or root in parent.parents):
        for name in _TRACKERS:
            try:
                with (directory / name).open("rb") as stream:
                    said = stream.read(_LONGEST_STEP).decode("utf-8", "replace").strip()
            except OSError:
                continue
            match = _STEP.fullmatch(said)
            if said.isdecimal() or match:
                found.add(int(match[1] if match else said))
    return found


def _empty_steps(root: Path, recognised: list[Path]) -> Iterator[Found]:
    """Directories that are named after a step and hold nothing that can be opened."""
    for path in directories_below(root):
        step = step_of(path)
        inside = (path in each.parents or path == each or each in path.parents for each in recognised)
        if step is None or any(inside):
            continue
        problem = Problem(
            "nothing in it is a checkpoint that can be read", where=str(path), why=f"it holds {inventory(path)}",
            fix="copy it again from the machines that trained, or pass another step",
        )  # fmt: skip
        yield Found(path, step, (), None, problem)
