"""What a directory of a training run holds: which checkpoints are where, of which steps, and which are whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbmerge.errors import NbmergeError, Problem
from nbmerge.layout import Checkpoint
from nbmerge.loaders import inventory, is_recognised, votes
from nbmerge.loaders.base import existing_directory
from nbmerge.opening import PathLike, open_checkpoint
from nbmerge.options import expanded_path
from nbmerge.run_search import search, step_below, step_of, subdirectories
from nbmerge.shown import Displayed

_TRACKERS = ("latest_checkpointed_iteration.txt", "latest")
_LONGEST_STEP = 64  # characters
_MOST = 100  # directories that are opened, of the highest steps


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

    unopened: further directories that were recognised and not opened, of lower steps; is_cut: whether there are more
    directories below than were looked at.
    """

    path: Path
    found: tuple[Found, ...]
    unopened: tuple[Path, ...] = ()
    is_cut: bool = False

    def __iter__(self) -> Iterator[Found]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    @property
    def steps(self) -> list[int]:
        """The steps that have a directory, each once, in order."""
        steps = {*(each.step for each in self.found), *(step_below(path, self.path) for path in self.unopened)}
        return sorted(step for step in steps if step is not None)

    @property
    def newest(self) -> tuple[Found, ...]:
        """The whole checkpoints of the highest step that has one, by name: actor and critic, say."""
        whole = [each for each in self.found if each.is_whole]
        highest = max((_order(each.step) for each in whole), default=None)
        return tuple(each for each in whole if _order(each.step) == highest)

    @property
    def latest(self) -> Found | None:
        """The first of `newest`; None where nothing is whole."""
        return next(iter(self.newest), None)


def inspect(path: PathLike, **options: Any) -> Checkpoint | Run:
    """The checkpoint in a directory, or, for one that holds several, what is where. Reads no tensor data.

        nbmerge.inspect("checkpoints/my_run")             # steps, layouts, what is whole, and which path to pass
        nbmerge.inspect("checkpoints/my_run/global_step_100/actor")

    A directory that holds one itself (as Trainer's do, and those with a tracker file) is told as a run where there are
    other steps below it. options: the keywords of `open_checkpoint`. Raises NotACheckpointError where neither the
    directory nor one below it holds anything that a loader recognises, and for the checkpoint in the directory itself
    what opening raises.
    """
    directory = existing_directory(expanded_path(os.fspath(path)))
    if options.get("backend", "auto") != "auto":
        return open_checkpoint(path, **options)
    if is_recognised(directory) and (itself := _itself(directory, options)) is not None:
        return itself
    run = survey(directory, **options)
    return run if any(each.backends for each in run) else open_checkpoint(path, **options)


def survey(path: PathLike, **options: Any) -> Run:
    """What is where in a directory and below: every checkpoint is opened, and what keeps one from being whole is told.

    options: the keywords of `open_checkpoint`. Raises NotACheckpointError where there is no such directory.
    """
    directory = existing_directory(expanded_path(os.fspath(path)))
    below = search(directory)
    recognised = sorted(below.recognised, key=lambda each: (-_order(step_below(each, directory)), str(each)))
    found = [_opened(each, directory, options) for each in recognised[:_MOST]]
    found += [_empty(each) for each in below.empty_steps]
    if is_recognised(directory):
        itself = _opened(directory, directory, options)
        if itself.checkpoint is None or not _is_made_of(itself.checkpoint, recognised):
            found.append(itself)
    found.sort(key=lambda each: (_order(each.step), str(each.path)))
    return Run(directory, tuple(found), tuple(recognised[_MOST:]), below.is_cut)


def _order(step: int | None) -> int:
    return -1 if step is None else step


def _itself(directory: Path, options: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint in the directory itself; None where there are steps below it that it is not read from."""
    steps = [each for each in subdirectories(directory) if step_of(each) is not None and is_recognised(each)]
    if not steps:
        return open_checkpoint(directory, **options)
    if len(steps) > 1:
        return None
    try:
        checkpoint = open_checkpoint(directory, **options)
    except (NbmergeError, OSError):
        return None
    return checkpoint if _is_made_of(checkpoint, steps) else None


def _is_made_of(checkpoint: Checkpoint, steps: list[Path]) -> bool:
    """Whether the checkpoint's files are those of a step below: a tracker file names it."""
    inside = {step.absolute() for step in steps}
    return any(not inside.isdisjoint(file.path.absolute().parents) for file in checkpoint.files)


def _opened(path: Path, root: Path, options: dict[str, Any]) -> Found:
    backends = tuple(loader.name for loader, _ in votes(path))
    checkpoint, problem = None, None
    try:
        checkpoint = open_checkpoint(path, **{"progress": False, **options})
    except NbmergeError as error:
        problem = error.problem
    except OSError as error:
        problem = Problem(f"it cannot be read: {error.strerror}", where=str(error.filename))
    step = step_below(path, root)
    return Found(path, step, backends, checkpoint, problem, step is not None and step in _tracked(path, root))


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
            step = int(said) if said.isdecimal() else step_of(Path(said))
            if step is not None:
                found.add(step)
    return found


def _empty(path: Path) -> Found:
    """A directory that is named after a step and holds nothing that can be opened."""
    problem = Problem(
        "nothing in it is a checkpoint that can be read", where=str(path), why=f"it holds {inventory(path)}",
        fix="copy it again from the machines that trained, or pass another step",
    )  # fmt: skip
    return Found(path, step_of(path), (), None, problem)
