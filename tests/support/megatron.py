"""Megatron's torch_dist containers, written in one process with torch's own classes, for any number of pretend ranks.

A container is `.metadata` (a pickle of torch.distributed.checkpoint's Metadata) and `__R_T.distcp` (archives of
torch.save, one after the other). What changed from version to version is in `Version`.
"""

from __future__ import annotations

import io
import itertools
import json
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from nbmerge.demo.megatron.pieces import ParallelSizes, local_pieces
from nbmerge.geometry import Box
from tests.support.megatron_classes import megatron_classes

Pieces = Callable[[str, torch.Tensor], Iterable[tuple[int, Box]]]
Objects = Mapping[str, tuple[int, bytes]]  # by key: the rank that writes it, and its bytes


@dataclass(frozen=True)
class Version:
    """What a version of megatron-core writes differently.

    plans: class of the plans in the extra attribute `all_local_plans` ("" for no such attribute);
    metadata_class: class of the whole pickle; path_object: checkpoint_id is a PosixPath; common: common.pt and the
    long metadata.json (0.19 has an object `common_state` instead); index: chunks are numbered in their indices.
    """

    plans: str = "SavePlan"
    metadata_class: str = "Metadata"
    path_object: bool = False
    common: bool = True
    index: bool = False
    metadata_json: bool = True


VERSIONS: Mapping[str, Version] = {
    "0.12": Version(plans="MCoreSavePlan", path_object=True),
    "0.14": Version(plans="MCoreSavePlan"),
    "0.15": Version(plans="MCoreSavePlan", metadata_class="MCoreMetadata"),
    "0.16": Version(),
    "0.19": Version(common=False),
    "fsdp_dtensor": Version(plans="", path_object=True, common=False, index=True, metadata_json=False),
    "torch": Version(plans="", common=False, index=True, metadata_json=False),
}


def megatron_pieces(sizes: ParallelSizes) -> Pieces:
    """The pieces that Megatron cuts, with the rank that saves each."""

    def pieces(name: str, tensor: torch.Tensor) -> Iterator[tuple[int, Box]]:
        for rank, at in enumerate(sizes.coordinates):
            for box in local_pieces(name, tensor.shape, at, sizes):
                yield rank, box

    return pieces


def uneven_rows(pieces: Pieces, parts: int, tp: int = 1) -> Pieces:
    """Each matrix among the pieces cut once more, by rows: each part longer than the one before.

    So Megatron-FSDP's flat buffers cut them, over `parts` data parallel ranks of `tp` each.
    """

    def cut(name: str, tensor: torch.Tensor) -> Iterator[tuple[int, Box]]:
        for rank, box in pieces(name, tensor):
            rows = box.shape[0] if len(box.shape) > 1 else 0
            edges = [rows * n * (n + 1) // (parts * (parts + 1)) for n in range(parts + 1)]
            for number, (start, stop) in enumerate(itertools.pairwise(edges)):
                if stop > start:
                    first = (box.offset[0] + start, *box.offset[1:])
                    yield rank + number * tp, Box(first, (stop - start, *box.shape[1:]))
            if not rows:
                yield rank, box

    return cut


def whole(name: str, tensor: torch.Tensor) -> list[tuple[int, Box]]:
    """Everything in one piece, saved by rank 0."""
    return [(0, Box.whole(tuple(tensor.shape)))]


def write_torch_dist(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    pieces: Pieces | Mapping[str, Sequence[tuple[int, Box]]] = whole,
    *,
    objects: Objects | None = None,
    version: str | Version = "0.16",
    threads: int = 2,
    planner_data: Any = None,
) -> Path:
    """A container of these tensors. objects: as `extra_states`, `rng_states` and `saved_object` give them.

    pieces: the boxes of each tensor with the pretend rank that writes each; a rank's entries go to its `threads`
    files in turn.
    """
    form = VERSIONS[version] if isinstance(version, str) else version
    directory.mkdir(parents=True, exist_ok=True)
    every = dict(objects or {})
    if not form.common and form.metadata_json:
        every.setdefault("common_state/shard_0_1", (0, saved([{"content_metadata": _CONTENT}])))
    entries = list(_entries(tensors, pieces, every))
    stored = _write_files(directory, entries, form, threads)
    _write_metadata(directory, tensors, entries, stored, form, planner_data)
    if form.common:
        torch.save({"content_metadata": _CONTENT}, directory / "common.pt")
    if form.metadata_json:
        (directory / "metadata.json").write_text(json.dumps(metadata_json(common=form.common)))
    return directory


_CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


def metadata_json(*, backend: str = "torch_dist", common: bool = True) -> dict[str, Any]:
    """metadata.json's content."""
    content = {"sharded_backend": backend, "sharded_backend_version": 1}
    return {**content, "common_backend": "torch", "common_backend_version": 1} if common else content


# Entries and their files


@dataclass(frozen=True)
class _Entry:
    rank: int
    key: str
    data: bytes
    box: Box | None = None
    number: int = 0

    def index(self, form: Version) -> dcp.MetadataIndex:
        if self.box is None:
            return dcp.MetadataIndex(self.key)
        return dcp.MetadataIndex(self.key, self.box.offset, self.number if form.index else None)


def saved(value: Any) -> bytes:
    """What torch.save writes of a value."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def part(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """The box of a tensor, in a storage of its own."""
    slices = tuple(slice(a, b) for a, b in zip(box.offset, box.stop, strict=True))
    return tensor[slices].clone(memory_format=torch.contiguous_format)


def _entries(tensors: Mapping[str, torch.Tensor], pieces: Any, objects: Objects) -> Iterator[_Entry]:
    """Objects first, as torch writes them, then every piece of every tensor."""
    for key, (rank, data) in objects.items():
        yield _Entry(rank, key, data)
    for key, tensor in tensors.items():
        boxes = pieces(key, tensor) if callable(pieces) else pieces[key]
        for number, (rank, box) in enumerate(boxes):
            yield _Entry(rank, key, saved(part(tensor, box)), box, number)


def _write_files(
    directory: Path, entries: Iterable[_Entry], form: Version, threads: int
) -> dict[dcp.MetadataIndex, _StorageInfo]:
    files: dict[str, bytearray] = defaultdict(bytearray)
    turn: dict[int, int] = defaultdict(int)
    stored = {}
    for entry in entries:
        name = f"__{entry.rank}_{turn[entry.rank] % threads}.distcp"
        turn[entry.rank] += 1
        stored[entry.index(form)] = _StorageInfo(name, len(files[name]), len(entry.data))
        files[name] += entry.data
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return stored


# .metadata


def _write_metadata(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    entries: Sequence[_Entry],
    stored: Mapping[dcp.MetadataIndex, _StorageInfo],
    form: Version,
    planner_data: Any,
) -> None:
    with megatron_classes() as classes:
        about: dict[str, Any] = {}
        for entry in entries:
            if entry.box is None:
                about[entry.key] = dcp.BytesStorageMetadata()
            else:
                empty = dcp.TensorStorageMetadata(_properties(tensors[entry.key]), tensors[entry.key].shape, [])
                about.setdefault(entry.key, empty).chunks.append(_chunk(entry.box))
        where: Any = Path("/data/run/ckpt") if form.path_object else "/data/run/ckpt"
        meta = dcp.StorageMeta(checkpoint_id=where, save_id="0b5d1d8e-0000-4000-8000-000000000000")
        made = classes[form.metadata_class](about, planner_data, dict(stored), meta)
        made.version = "1.0.0"  # torch before 2.7 has no such field
        if form.plans:
            made.all_local_plans = _plans(classes[form.plans], tensors, entries, form)
        if form.plans.startswith("MCore"):
            made.mcore_data = {key: {} for key in tensors}
        (directory / ".metadata").write_bytes(pickle.dumps(made, protocol=4))


def _properties(tensor: torch.Tensor) -> dcp.TensorProperties:
    return dcp.TensorProperties(dtype=tensor.dtype)


def _chunk(box: Box) -> dcp.ChunkStorageMetadata:
    return dcp.ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape))


def _plans(cls: Any, tensors: Mapping[str, torch.Tensor], entries: Iterable[_Entry], form: Version) -> list[Any]:
    """What each rank meant to write, which Megatron keeps in the metadata."""
    items: dict[int, list[WriteItem]] = defaultdict(list)
    for entry in entries:
        if entry.box is None:
            items[entry.rank].append(WriteItem(entry.index(form), WriteItemType.BYTE_IO))
            continue
        tensor = tensors[entry.key]
        data = TensorWriteData(_chunk(entry.box), _properties(tensor), tensor.shape)
        items[entry.rank].append(WriteItem(entry.index(form), WriteItemType.SHARD, tensor_data=data))
    plans = [cls(items[rank], planner_data={}) for rank in range(max(items, default=0) + 1)]
    if cls is not SavePlan:
        for plan in plans:
            plan.mcore_data = {item.index.fqn: {} for item in plan.items if item.tensor_data is not None}
    return plans


def like(version: str, **changes: Any) -> Version:
    """A version with changes."""
    return replace(VERSIONS[version], **changes)
