"""Where each rank file stands: its pipeline stage, expert parallel rank and tensor parallel rank."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from nbmerge.errors import IncompleteCheckpointError, InconsistentCheckpointError, listing, plural
from nbmerge.layout import MeshAxis
from nbmerge.loaders.megatron.files import Numbers, RankFiles
from nbmerge.loaders.megatron.settings import Settings
from nbmerge.loaders.megatron.sizes import ParallelSizes

_FINAL_NORM = re.compile(r"(?:^|\.)decoder\.final_(?:layer)?norm\.weight$")
_MOST_FILES = 1 << 20  # what arguments can claim before their product is taken for damage
_COPY = "copy the missing files from the machines that trained; without them the weights are incomplete"

_Pairs = set[tuple[int, int]]
"""Expert rank and tensor rank of files."""


class At(NamedTuple):
    """Where a file stands. Files are numbered in this order: by stage, in it by expert rank, then by tensor rank."""

    pp: int
    ep: int
    tp: int

    def __str__(self) -> str:
        return f"tp {self.tp}, pp {self.pp}, ep {self.ep}"


@dataclass(frozen=True)
class Grid:
    """files: in rank order; places: of each folder's numbers; pp, ep, tp: parallel sizes.

    notes: how the names were understood, where nothing says it.
    """

    files: Mapping[At, Path]
    places: Mapping[Numbers, At]
    pp: int
    ep: int
    tp: int
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(
        found: RankFiles,
        models: Mapping[Numbers, Sequence[Mapping[str, Any]]],
        settings: Settings,
        ends_model: Callable[[Sequence[Mapping[str, Any]]], bool] | None = None,
    ) -> Grid:
        """Raises IncompleteCheckpointError for missing files, InconsistentCheckpointError where arguments contradict.

        models: of each file the state dicts of its virtual pipeline stages; ends_model: whether those of one file
        reach to the model's end, where the final norm does not say it.
        """
        axes, notes = _axes(found, models, settings, ends_model or _ends_model)
        places = {numbers: _place(numbers, axes) for numbers in found.weights}
        files = {place: found.weights[numbers] for numbers, place in places.items()}
        sizes = {axis: _size(axis, axes, places.values(), found, settings) for axis in At._fields}
        if math.prod(sizes.values()) > _MOST_FILES:
            raise InconsistentCheckpointError(
                f"the files' arguments give parallel sizes that nobody trains with: {sizes}",
                where=str(found.directory),
                fix="the arguments are damaged; copy the files again",
            )
        grid = Grid(dict(sorted(files.items())), places, **sizes, notes=notes)
        grid._refuse_missing(axes, found.directory, settings.argument("expert_tensor_parallel_size"))
        lacks_end = ends_model is None and not any(_ends_model(chunks) for chunks in models.values())
        if not settings.arguments and len(axes) > 1 and lacks_end:
            raise IncompleteCheckpointError(
                "the last pipeline stage is missing: no file has decoder.final_layernorm.weight",
                where=f"{found.directory}: {plural(grid.pp, 'stage')} found", fix=_COPY,
            )  # fmt: skip
        return grid

    @cached_property
    def ranks(self) -> Mapping[At, int]:
        """The number of each file among all."""
        return {at: rank for rank, at in enumerate(self.files)}

    @cached_property
    def stages(self) -> Mapping[int, tuple[At, ...]]:
        """The files of each pipeline stage."""
        return {stage: tuple(at for at in self.files if at.pp == stage) for stage in range(self.pp)}

    @property
    def mesh(self) -> tuple[MeshAxis, ...]:
        """The axes that are longer than 1, and what each divides."""
        return ParallelSizes(tp=self.tp, pp=self.pp, ep=self.ep).mesh

    def _refuse_missing(self, axes: Sequence[str], directory: Path, expert_shards: int | None) -> None:
        expected = {At(pp, ep, tp) for pp in range(self.pp) for ep, tp in self._expected(expert_shards)}
        absent = sorted(expected - set(self.files))
        if absent:
            width = {"tp": 2, "pp": 3, "ep": 3}
            names = ["_".join(["mp_rank", *(f"{getattr(at, axis):0{width[axis]}}" for axis in axes)]) for at in absent]
            raise IncompleteCheckpointError(
                f"{plural(len(absent), 'file')} of {len(expected)} missing",
                where=f"{directory}: {listing(names, shown=12)}",
                why=f"tensor parallel size {self.tp}, pipeline stages {self.pp}, expert parallel size {self.ep}; "
                "each node saves to its own disk, or saving was stopped",
                fix=_COPY,
            )

    def _expected(self, expert_shards: int | None) -> _Pairs:
        """The pairs of expert and tensor rank that a stage needs files of: all, or fewer where experts fold over TP.

        Rank r of a stage has tensor rank r % TP and expert rank (r // ETP) % EP (megatron/core/parallel_state.py,
        order tp-cp-ep-dp-pp). The pattern repeats after lcm(TP, ETP * EP), and its first max(TP, ETP * EP) ranks, which
        newer versions alone write (megatron/training/checkpointing.py), hold the whole stage already.
        """
        present = {(at.ep, at.tp) for at in self.files}
        shards = [expert_shards] if expert_shards else [n for n in range(1, self.tp + 1) if self.tp % n == 0]
        every = {(ep, tp) for ep in range(self.ep) for tp in range(self.tp)}
        patterns: list[tuple[_Pairs, _Pairs]] = [(every, every)]  # what is needed, and what may be there
        for etp in shards:
            longest, repeat = max(self.tp, etp * self.ep), math.lcm(self.tp, etp * self.ep)
            pairs = [(r // etp % self.ep, r % self.tp) for r in range(repeat)]
            patterns += [(set(pairs), set(pairs)), (set(pairs[:longest]), set(pairs))]
        fitting = [(needed, allowed) for needed, allowed in patterns if allowed >= present]
        whole = [needed for needed, _ in fitting if needed <= present]
        return min(whole or [needed for needed, _ in fitting], key=len)


def _axes(
    found: RankFiles,
    models: Mapping[Numbers, Sequence[Mapping[str, Any]]],
    settings: Settings,
    ends_model: Callable[[Sequence[Mapping[str, Any]]], bool],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the numbers in the names count, and a note where that was not said but found out."""
    count = len(next(iter(found.weights)))
    if count != 2:
        return (("tp",) if count == 1 else ("tp", "pp", "ep")), ()
    pp, ep = settings.argument("pipeline_model_parallel_size"), settings.argument("expert_model_parallel_size")
    if (pp or ep) and ((pp or 1) > 1) != ((ep or 1) > 1):
        return ("tp", "pp" if (pp or 1) > 1 else "ep"), ()
    if pp and ep:
        raise InconsistentCheckpointError(
            "the folders have one number beside the tensor parallel rank, "
            f"and their arguments say pipeline stages {pp} and expert parallel size {ep}",
            where=str(found.directory),
            why="a number is written for each of the two that is over 1",
            fix="the folders were renamed, or files of two runs were mixed: copy them again",
        )
    if any(ends_model(chunks) for numbers, chunks in models.items() if numbers[1] == 0):
        return ("tp", "ep"), ("mp_rank_TT_NNN: NNN taken as expert parallel rank, as 000 has the model's last layer",)
    return ("tp", "pp"), ("mp_rank_TT_NNN: NNN taken as pipeline stage, as 000 has not the model's last layer",)


def _ends_model(chunks: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the language model's final norm is among them."""
    return any(_FINAL_NORM.search(str(name)) and "vision" not in str(name) for chunk in chunks for name in chunk)


_ARGUMENTS = {
    "pp": "pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "tp": "tensor_model_parallel_size",
}


def _place(numbers: Numbers, axes: Sequence[str]) -> At:
    by_axis = dict(zip(axes, numbers, strict=True))
    return At(by_axis.get("pp", 0), by_axis.get("ep", 0), by_axis["tp"])


def _size(axis: str, axes: Sequence[str], places: Iterable[At], found: RankFiles, settings: Settings) -> int:
    """The size of an axis: by the arguments where there are any, else by the names."""
    held = max(getattr(at, axis) for at in places) + 1
    said = settings.argument(_ARGUMENTS[axis]) or held
    if said < held or (said > held and axis not in axes):
        files = f"there are files up to {axis} rank {held - 1}" if axis in axes else "the folders have no number for it"
        raise InconsistentCheckpointError(
            f"the files' arguments say {_ARGUMENTS[axis]} {said}, and {files}",
            where=str(found.directory),
            why="files of two runs lie in one directory, or the folders were renamed",
            fix="copy the files of one run again, into a directory of their own",
        )
    return int(said)
