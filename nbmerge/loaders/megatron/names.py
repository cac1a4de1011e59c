"""From the names in one rank's file to those of the whole model: layers and experts are numbered anew.

A pipeline stage counts its layers from 0, and so does each of its virtual stages; an expert parallel rank counts
its experts from 0 (megatron/core/transformer/transformer_block.py and moe/experts.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from nbmerge.errors import Problem, listing, plural
from nbmerge.expressions import Stored
from nbmerge.loaders.megatron.files import COPY_AGAIN
from nbmerge.loaders.megatron.grid import At
from nbmerge.loaders.standins import StandIn

_LAYER = re.compile(r"((?:.*?\.)?layers\.)(\d{1,9})(\..+)")
# sequential experts, and those of transformer_engine's grouped layers
_SEQUENTIAL = re.compile(r"((?:.*\.)?experts\.)(local_experts\.)(\d{1,9})(\..+)")
_GROUPED = re.compile(r"((?:.*\.)?experts\.)(linear_fc[12]\.(?:weight|bias))(\d{1,9})()")

Chunks = Sequence[Mapping[str, Any]]
"""The state dicts of a file's virtual pipeline stages; one without virtual stages."""


@dataclass(frozen=True, slots=True)
class Held:
    """What one file holds of a tensor."""

    at: At
    stored: Stored


@dataclass
class Gathered:
    """tensors: what the files hold under each name of the whole model, in rank order; experts: those names whose
    tensors are one expert's; objects: names of entries that are no tensors.
    """

    tensors: dict[str, list[Held]] = field(default_factory=dict)
    experts: set[str] = field(default_factory=set)
    objects: dict[str, None] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def gather(models: Mapping[At, Chunks], files: Mapping[At, Path]) -> Gathered:
    """All tensors of all files by the names that they have in the whole model. `models` is in rank order."""
    found = Gathered()
    first_layers = _first_layers(models, found.problems)
    counts = _expert_counts(models, found.problems)
    for virtual in range(max(len(chunks) for chunks in models.values())):  # outermost, so that layers come in order
        for at, chunks in models.items():
            for name, value in _entries(chunks[virtual]):
                if not isinstance(value, Stored):
                    _note_object(found, name, value, files[at])
                    continue
                layered = _with_layer(name, first_layers, (virtual, at.pp))
                whole, is_expert = _with_expert(layered, name, counts, (virtual, at))
                found.tensors.setdefault(whole, []).append(Held(at, value))
                if is_expert:
                    found.experts.add(whole)
    found.tensors = {name: sorted(held, key=lambda one: one.at) for name, held in _experts_together(found.tensors)}
    return found


def _experts_together(tensors: Mapping[str, list[Held]]) -> list[tuple[str, list[Held]]]:
    """The tensors in the order in which they were found, but for the experts of other ranks, which join their kind."""
    kinds: dict[str, int] = {}
    order: dict[str, tuple[int, int]] = {}
    for name in tensors:
        match = _expert(name)
        order[name] = kinds.setdefault(kind_of(name), len(kinds)), int(match[3]) if match else 0
    return sorted(tensors.items(), key=lambda item: order[item[0]])


def _entries(chunk: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Extra states (of fp8 scaling) and entries without a value are no part of the model."""
    for key, value in chunk.items():
        name = str(key)
        if value is not None and not name.endswith("_extra_state"):
            yield name, value


def _note_object(found: Gathered, name: str, value: Any, path: Path) -> None:
    if isinstance(value, StandIn):
        found.problems.append(
            Problem(
                f"{name} is a {type(value).__name__}, not a plain tensor",
                where=str(path),
                why="rank files hold each rank's local tensors; this entry was made by another kind of parallelism",
                fix="save with --ckpt-format torch_dist, and merge that",
                kind="unsupported",
            )
        )
    found.objects[name] = None


def _first_layers(models: Mapping[At, Chunks], problems: list[Problem]) -> dict[tuple[str, int, int], int]:
    """The number in the whole model of layer 0 of each (prefix, virtual stage, stage).

    Layers follow each other through the stages, and through all stages again for each virtual stage. Counting those
    that are there is right for uneven stages, custom layouts and stages without layers.
    """
    local: dict[tuple[str, int, int], set[int]] = {}
    for at, chunks in models.items():
        for virtual, chunk in enumerate(chunks):
            for name, _ in _entries(chunk):
                if match := _layer(name):
                    local.setdefault((match[1], virtual, at.pp), set()).add(int(match[2]))
    first: dict[tuple[str, int, int], int] = {}
    following: dict[str, int] = {}
    for (prefix, virtual, stage), numbers in sorted(local.items()):
        first[prefix, virtual, stage] = following.get(prefix, 0)
        following[prefix] = first[prefix, virtual, stage] + len(numbers)
        if max(numbers) + 1 != len(numbers):
            where = f"pipeline stage {stage}" + (f", virtual stage {virtual}" if virtual else "")
            problems.append(_not_from_zero(f"layers of {prefix.removesuffix('.')}", numbers, where))
    return first


def _not_from_zero(what: str, numbers: Iterable[int], where: str) -> Problem:
    return Problem(
        f"the {what} are numbered {listing(sorted(numbers), shown=6)}, and not from 0 on without a gap",
        where=where, why="each rank counts from 0; some entries are missing, or the file was edited", fix=COPY_AGAIN,
        kind="missing",
    )  # fmt: skip


def _with_layer(name: str, first: Mapping[tuple[str, int, int], int], stage: tuple[int, int]) -> str:
    match = _layer(name)
    return f"{match[1]}{first[match[1], stage[0], stage[1]] + int(match[2])}{match[3]}" if match else name


@lru_cache(1 << 16)  # the files of a stage have the same names
def _layer(name: str) -> re.Match[str] | None:
    return _LAYER.fullmatch(name)


@lru_cache(1 << 16)
def _expert(name: str) -> re.Match[str] | None:
    return _SEQUENTIAL.fullmatch(name) or _GROUPED.fullmatch(name)


def kind_of(name: str) -> str:
    """The name without the number of an expert: one for all experts of a layer."""
    match = _expert(name)
    return f"{match[1]}{match[2]}{match[4]}" if match else name


def _expert_counts(models: Mapping[At, Chunks], problems: list[Problem]) -> dict[tuple[str, int, int], int]:
    """How many experts a file holds of each (prefix in the file, virtual stage, stage): on all ranks the same."""
    local: dict[tuple[str, int, int], dict[At, set[int]]] = {}
    for at, chunks in models.items():
        for virtual, chunk in enumerate(chunks):
            for name, _ in _entries(chunk):
                if match := _expert(name):
                    by_file = local.setdefault((match[1], virtual, at.pp), {})
                    by_file.setdefault(at, set()).add(int(match[3]))
    counts: dict[tuple[str, int, int], int] = {}
    for key, by_file in local.items():
        counts[key] = max(len(numbers) for numbers in by_file.values())
        for at, numbers in by_file.items():
            if max(numbers) + 1 != len(numbers):
                problems.append(_not_from_zero(f"experts {key[0]}*", numbers, str(at)))
            elif len(numbers) != counts[key]:
                problems.append(
                    Problem(
                        f"{key[0]}* has {plural(len(numbers), 'expert')} on one rank and {counts[key]} on another",
                        where=str(at),
                        why="expert parallel ranks hold equally many",
                        fix=COPY_AGAIN,
                        kind="contradiction",
                    )
                )
    return counts


def _with_expert(
    layered: str, name: str, counts: Mapping[tuple[str, int, int], int], where: tuple[int, At]
) -> tuple[str, bool]:
    """The name with the expert's number in the whole model, and whether it is an expert's at all."""
    match, local = _expert(layered), _expert(name)
    if match is None or local is None:
        return layered, False
    virtual, at = where
    number = at.ep * counts[local[1], virtual, at.pp] + int(match[3])
    return f"{match[1]}{match[2]}{number}{match[4]}", True


def experts_by_layer(names: Iterable[str]) -> dict[str, int]:
    """How many experts the names of the whole model have behind each `….experts.`."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        if match := _expert(name):
            numbers.setdefault(match[1], set()).add(int(match[3]))
    return {prefix: len(found) for prefix, found in numbers.items()}
