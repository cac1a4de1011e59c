"""Rank files that hold what another rank's file holds: one was copied over the other, as all have one file name.

Only what must differ between two ranks is compared: cut tensors between tensor parallel ranks, experts between expert
parallel ranks, and all matrices between pipeline stages. The first bytes are read, of one or two tensors of each file,
and of more where those agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from nbmerge.engine.lower import blocks
from nbmerge.errors import Problem
from nbmerge.expressions import Stored
from nbmerge.geometry import Box
from nbmerge.loaders.megatron.files import COPY_AGAIN
from nbmerge.loaders.megatron.grid import At, Grid
from nbmerge.loaders.megatron.names import Chunks, kind_of
from nbmerge.loaders.megatron.parallel import is_cut

if TYPE_CHECKING:  # numpy, which importing the package does not cost
    from nbmerge.engine.read import Words
    from nbmerge.engine.sources import LocalFiles

_PROBED = 64 * 1024  # bytes of each tensor
_FEWEST = 64  # bytes that two ranks do not share by chance
_MATRIX = 2  # dimensions; vectors are norms and biases, which ranks may well share
_EXPERT = re.compile(r"\bexperts\.")  # a routed one: not shared_experts

_Key = tuple[int, str]
"""Virtual stage and name in the file."""


def copies(models: Mapping[At, Chunks], grid: Grid, writers: Mapping[At, int]) -> list[Problem]:
    """A problem for each file that is a copy of another.

    writers: the global ranks that wrote the files, where the files say it: those of two ranks are no copies.
    """
    from nbmerge.engine.sources import LocalFiles

    alike: dict[object, list[At]] = {}
    for at, chunks in models.items():
        names = frozenset((key, stored.shape, stored.dtype.name) for key, stored in _tensors(chunks).items())
        alike.setdefault((names, writers.get(at)), []).append(at)
    problems: list[Problem] = []
    with LocalFiles() as sources:
        probe = _Probe(models, sources)
        for members in alike.values():
            for same in probe.beginning_alike(members) if len(members) > 1 else ():
                pairs = combinations(same, 2)
                if found := next(((one, other) for one, other in pairs if probe.is_copy(one, other)), None):
                    problems.append(_copied(*found, grid))
    return problems


def _copied(one: At, other: At, grid: Grid) -> Problem:
    return Problem(
        f"the file of {other} holds the same weights as that of {one}",
        where=f"{grid.files[one]}; {grid.files[other]}",
        why="the two ranks hold different parts of the model; one file was copied over the other",
        fix=COPY_AGAIN,
        kind="contradiction",
    )


def _tensors(chunks: Chunks) -> dict[_Key, Stored]:
    return {
        (virtual, str(name)): value
        for virtual, chunk in enumerate(chunks)
        for name, value in chunk.items()
        if isinstance(value, Stored) and not str(name).endswith("_extra_state")
    }


def _must_differ(one: At, other: At, name: str, stored: Stored) -> bool:
    """Whether the two ranks hold different parts under one name."""
    if one.pp != other.pp:
        return len(stored.shape) >= _MATRIX
    if _EXPERT.search(name):
        return one.ep != other.ep
    return one.tp != other.tp and is_cut(name, stored.shape)


@dataclass(frozen=True)
class _Probe:
    """Reads first bytes of the files' tensors."""

    models: Mapping[At, Chunks]
    sources: LocalFiles

    def beginning_alike(self, members: list[At]) -> Iterator[list[At]]:
        """Groups of files whose largest cut tensor and whose largest expert begin alike."""
        held = _tensors(self.models[members[0]])
        cut = [key for key, stored in held.items() if is_cut(key[1], stored.shape) and not _EXPERT.search(key[1])]
        experts = [key for key, stored in held.items() if _EXPERT.search(key[1])]
        chosen = [max(keys, key=lambda key: held[key].nbytes) for keys in (cut, experts) if keys]
        groups: dict[tuple[bytes, ...], list[At]] = {}
        for at in members:
            tensors = _tensors(self.models[at])
            groups.setdefault(tuple(self._start(tensors[key]).tobytes() for key in chosen), []).append(at)
        return (group for group in groups.values() if len(group) > 1)

    def is_copy(self, one: At, other: At) -> bool:
        """Whether all that must differ begins alike, and any of it is more than a constant."""
        first, second = _tensors(self.models[one]), _tensors(self.models[other])
        kinds: dict[str, list[bytes]] = {}
        for key, stored in first.items():
            if not stored.numel or not _must_differ(one, other, key[1], stored):
                continue
            start = self._start(stored)
            if not (start == self._start(second[key])).all():
                return False
            if start.nbytes >= _FEWEST and (start != start.flat[0]).any():
                kinds.setdefault(f"{key[0]} {kind_of(key[1])}", []).append(start.tobytes())
        # Experts that were all made of one layer are alike until they are trained: that is no copied file.
        return any(len(starts) == 1 or len(set(starts)) > 1 for starts in kinds.values())

    def _start(self, stored: Stored) -> Words:
        from nbmerge.engine.read import read

        region = next(blocks(stored.shape, stored.dtype.itemsize, _PROBED), Box.whole(stored.shape))
        return read(stored, region, self.sources)
