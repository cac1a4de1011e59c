"""The files of a directory of Megatron rank files: which are weights, and the numbers in their folders' names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nbmerge.errors import (
    IncompleteCheckpointError,
    InconsistentCheckpointError,
    NotACheckpointError,
    listing,
    plural,
)
from nbmerge.layout import SourceFile

# mp_rank_TT, then _PPP where there are pipeline stages and _EEE where there are expert parallel ranks
# (megatron/training/checkpointing.py, get_checkpoint_name).
_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
ADAPTER_FILE = re.compile(_FOLDER.pattern + r"_adapter\.pt")  # verl's, of Megatron-Bridge's adapters
ADAPTER_FILES = "mp_rank_*_adapter.pt"
WEIGHTS = ("model_optim_rng.pt", "model_rng.pt", "model.pt")

COPY_AGAIN = "copy the files of all ranks again from one save"

Numbers = tuple[int, ...]
"""The numbers in a folder's name: tensor parallel rank, then pipeline stage, expert parallel rank, both or neither."""


@dataclass(frozen=True)
class RankFiles:
    """directory: what holds the folders; weights: the model's file of each; others: files that are left alone."""

    directory: Path
    weights: Mapping[Numbers, Path]
    others: tuple[SourceFile, ...]

    @staticmethod
    def scan(directory: Path) -> RankFiles:
        """Looks at names only. Raises where there is no folder, one without weights, or names of two kinds."""
        folders = _folders(directory)
        weights = {numbers: path for numbers, folder in folders.items() if (path := _weights_in(folder)) is not None}
        absent = [folder for numbers, folder in folders.items() if numbers not in weights]
        if absent:
            raise IncompleteCheckpointError(
                f"{plural(len(absent), 'folder')} of {len(folders)} without a file of weights",
                where=f"{directory}: {listing(folder.name for folder in absent)}",
                why=f"each holds {' or '.join(WEIGHTS)}; saving may have been stopped",
                fix="copy the files from the machines that trained, or use an older step",
            )
        _check_names(directory, weights)
        return RankFiles(directory, weights, _left_alone(directory, folders.values(), set(weights.values())))

    @staticmethod
    def scan_adapters(directory: Path) -> RankFiles:
        """verl's files of adapters. Raises where there is none, or where their names are of two kinds."""
        weights: dict[Numbers, Path] = {}
        for child in sorted(directory.iterdir()):
            if match := ADAPTER_FILE.fullmatch(child.name):
                weights[tuple(int(number) for number in match.groups() if number is not None)] = child
        if not weights:
            raise NotACheckpointError("there are no files mp_rank_*_adapter.pt", where=str(directory))
        _check_names(directory, {numbers: Path(path.name, ADAPTER_FILES) for numbers, path in weights.items()})
        return RankFiles(directory, dict(sorted(weights.items())), ())

    @property
    def sources(self) -> tuple[SourceFile, ...]:
        """Every file with its role, weights first."""
        return (*(SourceFile.of(path, "weights") for path in self.weights.values()), *self.others)


def _folders(directory: Path) -> dict[Numbers, Path]:
    found: dict[Numbers, Path] = {}
    for child in sorted(directory.iterdir()):
        if (match := _FOLDER.fullmatch(child.name)) and child.is_dir():
            numbers = tuple(int(number) for number in match.groups() if number is not None)
            if numbers in found:
                raise InconsistentCheckpointError(
                    f"two folders of one rank: {found[numbers].name} and {child.name}", where=str(directory),
                    fix="move the one that does not belong to this save away",
                )  # fmt: skip
            found[numbers] = child
    if not found:
        raise NotACheckpointError(
            "there are no folders mp_rank_*", where=str(directory),
            fix="pass the directory of one iteration, iter_NNNNNNN, or verl's model/",
        )  # fmt: skip
    return dict(sorted(found.items()))


def _weights_in(folder: Path) -> Path | None:
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if len(found) > 1:
        raise InconsistentCheckpointError(
            f"one rank has {len(found)} files of weights: {listing(path.name for path in found)}",
            where=str(folder),
            why="two frameworks or two versions saved into the same directory",
            fix="move one kind away",
        )
    return found[0] if found else None


def _check_names(directory: Path, weights: Mapping[Numbers, Path]) -> None:
    """All folders have as many numbers, and all files one name."""
    by_kind: dict[tuple[int, str], list[str]] = {}
    for numbers, path in weights.items():
        by_kind.setdefault((len(numbers), path.name), []).append(path.parent.name)
    if len(by_kind) > 1:
        kinds = [f"{len(names)} with {name} such as {names[0]}" for (_, name), names in by_kind.items()]
        raise InconsistentCheckpointError(
            "the folders are of two kinds: " + "; ".join(kinds),
            where=str(directory),
            why="runs with other parallel sizes saved into the same directory",
            fix="move the folders of one run to a directory of their own",
        )


def _left_alone(directory: Path, folders: Iterable[Path], weights: set[Path]) -> tuple[SourceFile, ...]:
    """Optimizer and random number files: in the folders, and verl's beside `model/`."""
    candidates: list[Path] = []
    for folder in folders:
        candidates += sorted(path for path in folder.glob("*.pt") if path not in weights)
    if directory.name == "model":
        for name in ("optim", "rng_states"):
            candidates += sorted((directory.parent / name).glob("**/*.pt"))
    return tuple(SourceFile.of(path, _role(path)) for path in candidates)


def _role(path: Path) -> str:
    """`optim/…`, `optim.pt`, `distrib_optim.pt`, `optim_states.pt` are the optimizer's."""
    return "optimizer" if "optim" in path.name or path.parent.name == "optim" else "extra state"
