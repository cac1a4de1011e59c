"""What every loader is: it votes on a directory with its evidence, and builds the index of one it recognises."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from nbmerge.engine.events import Listener, silent
from nbmerge.errors import (
    AmbiguousCheckpointError,
    CheckpointError,
    IncompleteCheckpointError,
    InconsistentCheckpointError,
    NotACheckpointError,
    Problem,
    UnsupportedCheckpointError,
    listing,
    plural,
)
from nbmerge.geometry import Placement, Shape
from nbmerge.layout import Checkpoint
from nbmerge.shown import Displayed


class ExpectedShapes(Protocol):
    """What the model of config.json says about a tensor of a checkpoint, asked only where bytes don't decide."""

    def expected_shape(self, name: str) -> Shape | None:
        """Global shape of the tensor, or None for a name that the model does not have."""


@dataclass(frozen=True)
class Overrides:
    """What the user says about the layout where the files don't, or say it wrong.

    mesh_dim_names, mesh_shape: the device mesh, ranks in row-major order; placements: by name pattern
    (fnmatch), one placement for each mesh dimension.
    """

    mesh_dim_names: tuple[str, ...] | None = None
    mesh_shape: Shape | None = None
    placements: Mapping[str, tuple[Placement, ...]] = field(default_factory=dict)

    def as_record(self) -> dict[str, object]:
        """For the plan and the receipt: only what was given."""
        record: dict[str, object] = {}
        if self.mesh_dim_names:
            record["mesh_dim_names"] = list(self.mesh_dim_names)
        if self.mesh_shape:
            record["mesh_shape"] = list(self.mesh_shape)
        if self.placements:
            record["placements"] = {name: [str(p) for p in ps] for name, ps in self.placements.items()}
        return record


@dataclass(frozen=True)
class OpenOptions:
    """How to open a checkpoint.

    config_dir: where config.json is, if not in the checkpoint; shapes: what the model expects;
    weights: `master` or `model` where a checkpoint holds both; workers: threads that read headers; listener: told of
    each file that has been read.
    """

    config_dir: Path | None = None
    shapes: Callable[[Path | None], ExpectedShapes | None] = lambda config_dir: None
    overrides: Overrides = field(default_factory=Overrides)
    trust_pickle: bool = False
    weights: str | None = None
    workers: int = 4
    listener: Listener = silent


class Loader(Displayed, ABC):
    """Recognises one layout and builds its index from headers and pickles, reading no tensor data."""

    name: ClassVar[str]
    """The back end's name on the command line."""
    recognises: ClassVar[str]
    """What it recognises, in a sentence."""
    directory: Path | None = None
    """The directory that it was chosen for, for its display; opening takes any."""

    def at(self, directory: Path) -> Loader:
        """The same loader, to be shown with its evidence in a directory."""
        chosen = copy.copy(self)
        chosen.directory = directory
        return chosen

    @abstractmethod
    def evidence(self, directory: Path) -> tuple[str, ...]:
        """What in the directory says that this loader can open it; empty where nothing does.

        Looks at names and small JSON files only.
        """

    def gives_way(self, directory: Path) -> bool:
        """Whether what it recognises goes with another layout's files, which are taken where there are any."""
        return False

    def config_directory(self, directory: Path) -> Path | None:
        """Where the model's config.json and tokenizer are, if in the checkpoint."""
        return config_directory(directory)

    @abstractmethod
    def open(self, directory: Path, options: OpenOptions) -> Checkpoint:
        """The index of the checkpoint. Raises CheckpointError and its kin, with all that is wrong."""


def existing_directory(path: Path) -> Path:
    """The directory itself. Raises NotACheckpointError where there is none, naming what is near."""
    if path.is_dir():
        return path
    parent = path.parent
    near = sorted(child.name for child in parent.iterdir() if child.is_dir()) if parent.is_dir() else []
    raise NotACheckpointError(
        "there is no such directory" if not path.exists() else "this is a file; a checkpoint is a directory",
        where=str(path),
        why=f"{parent} holds {listing(near, shown=5)}" if near else "",
        fix=f"pass {parent}" if path.is_file() else "pass the directory that holds the files of all ranks",
    )


def config_directory(directory: Path) -> Path | None:
    """Where config.json is: `huggingface/` beside the shards, as verl writes it, or among them."""
    for candidate in (directory / "huggingface", directory):
        if (candidate / "config.json").is_file():
            return candidate
    return None


def index_error(problems: Sequence[Problem], directory: Path) -> CheckpointError:
    """One error for all problems of an index, of the class that its gravest problem has."""
    title = f"the checkpoint cannot be put together: {plural(len(problems), 'problem')} in {directory}"
    kinds = {problem.kind for problem in problems}
    for kind, error in (
        ("missing", IncompleteCheckpointError),
        ("contradiction", InconsistentCheckpointError),
        ("ambiguous", AmbiguousCheckpointError),
    ):
        if kind in kinds:
            return error(title, problems=problems)
    return UnsupportedCheckpointError(title, problems=problems)
