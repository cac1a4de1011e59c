"""What each rank of a Megatron checkpoint holds: which layers and experts, and what lies outside the layers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from nbmerge.collapse import numbers_in_words
from nbmerge.display import words
from nbmerge.display.model import Cell, Column, Section, Table
from nbmerge.display.shards import file_label, is_stored_once
from nbmerge.errors import listing, plural
from nbmerge.geometry import Box
from nbmerge.layout import Checkpoint, LazyTensor

_RANKS = 16
_OPENED = 8  # ranks up to which the table starts unfolded
_LAYER = re.compile(r"(?:^|\.)(?<!vision_model\.)decoder\.layers\.(?:(\d+)\.)?")
_EXPERT = re.compile(
    r"\.experts\.(?:local_experts\.(\d+)\.|experts\.(?:(\d+)\.)?|linear_fc[12]\.(?:weight|bias)(\d+)$)"
)


@dataclass(slots=True)
class _Held:
    """What one rank holds. beside: the modules that are in no layer."""

    pieces: int = 0
    nbytes: int = 0
    layers: set[int] = field(default_factory=set)
    experts: set[int] = field(default_factory=set)
    beside: dict[str, None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Axes:
    """Where a tensor's layer and expert numbers are: in its name, or in a dimension, or nowhere."""

    layer: int | None
    expert: int | None
    layer_dim: int | None
    expert_dim: int | None
    module: str

    @staticmethod
    def of(name: str) -> _Axes:
        layer, expert = _LAYER.search(name), _EXPERT.search(name)
        dims = iter(range(2))
        layer_number = int(layer[1]) if layer and layer[1] else None
        expert_number = next((int(digits) for digits in expert.groups() if digits), None) if expert else None
        layer_dim = next(dims) if layer and layer_number is None else None
        expert_dim = next(dims) if expert and expert_number is None else None
        module = "" if layer else ".".join(name.split(".")[-2:-1])
        return _Axes(layer_number, expert_number, layer_dim, expert_dim, module)


def _along(ranks: Sequence[int], boxes: Sequence[Box], dim: int) -> Iterator[tuple[int, range]]:
    """Ranks with the indices of a dimension that they hold; none of a dimension that the boxes have not."""
    if not boxes or dim >= len(boxes[0].shape):  # a tensor's boxes all have its dimensions
        return iter(())
    starts, sizes = ([box.offset[dim] for box in boxes], [box.shape[dim] for box in boxes])
    spans = set(zip(ranks, starts, sizes, strict=True))
    return ((rank, range(start, start + size)) for rank, start, size in spans)


def ranks_section(checkpoint: Checkpoint) -> Iterator[Section]:
    """A row for each rank; nothing where the files do not say who stored what, or where all ranks hold the same."""
    first = next(iter(checkpoint.tensors.values()), None)
    if checkpoint.names != "megatron" or checkpoint.world_size == 1 or first is None or not first.ranked:
        return
    held: dict[int, _Held] = {}
    for tensor in checkpoint.tensors.values():
        _add(held, tensor)
    once = is_stored_once(first)
    yield Section(
        "Ranks",
        f"what {'each of ' if len(held) > 1 else ''}{plural(len(held), 'rank')} {'wrote' if once else 'holds'}",
        tables=(_table(held, {} if once else _files(checkpoint)),),
        notes=(_WROTE,) if once else (),
        opened=len(held) <= _OPENED,
    )


_WROTE = "one copy of everything is stored: what several ranks held is counted at the one that wrote it"


def _add(held: dict[int, _Held], tensor: LazyTensor) -> None:
    """Adds what each rank holds of the tensor. An index has tens of thousands of pieces: each is looked at once."""
    filled = [chunk for chunk in tensor.chunks if 0 not in chunk.box.shape]
    copies = [(rank, chunk) for chunk in filled for rank, _ in chunk.replicas]
    ranks = [chunk.rank for chunk in filled] + [rank for rank, _ in copies]
    boxes = [chunk.box for chunk in filled] + [chunk.box for _, chunk in copies]
    axes, itemsize = _Axes.of(tensor.name), tensor.dtype.itemsize
    for (rank, shape), count in Counter(zip(ranks, [box.shape for box in boxes], strict=True)).items():
        one = held.get(rank) or held.setdefault(rank, _Held())
        one.pieces += count
        one.nbytes += count * math.prod(shape) * itemsize
        if axes.layer is not None:
            one.layers.add(axes.layer)
        if axes.expert is not None:
            one.experts.add(axes.expert)
        if axes.module:
            one.beside.setdefault(axes.module)
    if axes.layer_dim is not None:
        for rank, found in _along(ranks, boxes, axes.layer_dim):
            held[rank].layers.update(found)
    if axes.expert_dim is not None:
        for rank, found in _along(ranks, boxes, axes.expert_dim):
            held[rank].experts.update(found)


def _files(checkpoint: Checkpoint) -> dict[int, str]:
    """A file of each rank."""
    chunks = [chunk for tensor in checkpoint.tensors.values() for chunk in tensor.chunks]
    held = {chunk.rank: chunk.stored.file for chunk in chunks}
    return held | {rank: stored.file for chunk in chunks for rank, stored in chunk.replicas}


def _table(held: dict[int, _Held], files: Mapping[int, str]) -> Table:
    """files: whose name tells a rank's directory; none where the ranks have no files of their own."""
    total = sum(one.nbytes for one in held.values())
    has_experts = any(one.experts for one in held.values())
    columns = [Column("rank"), Column("layers")]
    columns += [Column("experts")] if has_experts else []
    columns += [Column("beside the layers", code=True), Column("pieces", number=True), Column("bytes", number=True),
                Column("share", number=True)]  # fmt: skip
    rows = []
    for rank, one in sorted(held.items())[:_RANKS]:
        name = f"{rank:,}" + (f" ({file_label(files[rank]).partition('/')[0]})" if files else "")
        beside = listing(one.beside, shown=3) if one.beside else "·"
        texts = [words.elide(name, 40), numbers_in_words(one.layers)]
        texts += [numbers_in_words(one.experts)] if has_experts else []
        texts += [words.elide(beside), f"{one.pieces:,}", words.byte_size(one.nbytes)]
        share = Cell(words.percent(one.nbytes, total), bar=one.nbytes / (total or 1))
        rows.append((*map(Cell, texts), share))
    return Table(tuple(columns), tuple(rows), hidden=max(len(held) - _RANKS, 0), rows_are="ranks")
