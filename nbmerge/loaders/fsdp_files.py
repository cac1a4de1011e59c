"""The files of a directory of per-rank FSDP files: whose they are, and whether they are one complete set."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbmerge.errors import (
    AmbiguousCheckpointError,
    IncompleteCheckpointError,
    InconsistentCheckpointError,
    listing,
    plural,
)

_FILE = re.compile(r"(model|optim|extra_state)_world_size_(0|[1-9]\d*)_rank_(0|[1-9]\d*)\.pt")
_ACCELERATE = re.compile(r"((pytorch_model_fsdp|optimizer)(?:_\d+)?)_rank(0|[1-9]\d*)\.bin")
ROLES = {"model": "weights", "optim": "optimizer", "extra_state": "extra state"}


@dataclass(frozen=True)
class RankDirectory:
    """The files of a checkpoint directory by role, world size and rank. others: models beside the one of the files."""

    path: Path
    files: Mapping[tuple[str, int], Mapping[int, Path]]  # (role, world size) → rank → path
    others: tuple[str, ...] = ()

    @staticmethod
    def scan(path: Path) -> RankDirectory:
        files: dict[tuple[str, int], dict[int, Path]] = {}
        for child in sorted(path.iterdir()):
            if (match := _FILE.fullmatch(child.name)) and child.is_file():
                role, world_size, rank = match[1], int(match[2]), int(match[3])
                files.setdefault((role, world_size), {})[rank] = child
        if not any(role == "model" for role, _ in files):
            return _of_accelerate(path)
        return RankDirectory(path, files)

    @property
    def world_sizes(self) -> list[int]:
        return sorted(size for role, size in self.files if role == "model")

    def weights(self) -> tuple[int, dict[int, Path]]:
        """World size and the weight file of each rank. Raises where they are not one complete set."""
        self._refuse_others()
        if len(self.world_sizes) > 1:
            counts = [f"{len(self.files['model', n])} files of world size {n}" for n in self.world_sizes]
            raise InconsistentCheckpointError(
                "two checkpoints lie in one directory: " + " and ".join(counts),
                where=str(self.path),
                why="a run with another number of GPUs saved into the same directory",
                fix="move the files of one world size to a directory of their own",
            )
        (world_size,) = self.world_sizes
        ranks = self.files["model", world_size]
        absent = [rank for rank in range(world_size) if rank not in ranks]
        if absent:
            raise self._lost(absent, world_size)
        beyond = [path.name for rank, path in ranks.items() if rank >= world_size]
        if beyond:
            raise InconsistentCheckpointError(
                f"files of ranks beyond the world size {world_size}", where=f"{self.path}: {listing(beyond)}",
                fix="move them away; they belong to another checkpoint",
            )  # fmt: skip
        return world_size, {rank: ranks[rank] for rank in range(world_size)}

    def refuse_lost_last(self, world_size: int) -> None:
        """Raises where tensors lie on more ranks than there are files: names of Accelerate's do not say how many."""
        held = self.world_sizes[0]
        if world_size > held:
            raise self._lost(range(held, world_size), world_size)

    def _lost(self, absent: Sequence[int], world_size: int) -> IncompleteCheckpointError:
        """The error for ranks without a file."""
        ranks = self.files["model", self.world_sizes[0]]
        pattern = re.sub(r"rank(_?)\d+(?=\.\w+$)", r"rank\1{}", next(iter(ranks.values())).name)
        return IncompleteCheckpointError(
            f"{plural(len(absent), 'rank')} of {world_size} {'is' if len(absent) == 1 else 'are'} missing",
            where=f"{self.path}: " + listing(pattern.format(r) for r in absent),
            why="each node saves to its own disk, or saving was stopped",
            fix="copy the missing files from the machines that trained; without them the weights are incomplete",
        )

    def _refuse_others(self) -> None:
        if self.others:
            raise AmbiguousCheckpointError(
                f"{plural(len(self.others) + 1, 'model')} are in the directory", where=str(self.path),
                why="the run trained several models, and each is saved into files of its own",
                fix=f"move {listing(f'{name}_rank*.bin' for name in self.others)} to a directory of their own",
            )  # fmt: skip


def _of_accelerate(path: Path) -> RankDirectory:
    """Accelerate's files; there are as many ranks as the highest number says."""
    models: dict[str, dict[int, Path]] = {}
    optimizers: list[Path] = []
    for child in sorted(path.iterdir()):
        if (match := _ACCELERATE.fullmatch(child.name)) and child.is_file():
            if match[2] == "optimizer":
                optimizers.append(child)
            else:
                models.setdefault(match[1], {})[int(match[3])] = child
    if not models:
        return RankDirectory(path, {})
    first, *others = models
    files = {("model", max(models[first]) + 1): models[first]}
    if optimizers:
        files["optim", len(optimizers)] = dict(enumerate(optimizers))
    return RankDirectory(path, files, tuple(others))
