"""How a tensor is cut: evenly or not, with empty pieces or without, and on how many ranks each piece lies."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nbmerge.errors import plural
from nbmerge.layout import Chunk, LazyTensor, MeshAxis
from nbmerge.loaders.rank_shards import SHARD

_SHARD = re.compile(r"Shard\((\d+)\)")
# __0_1.distcp and model_rank_3.pt, not model.pt nor 0.1, and not a universal checkpoint's NAME/fp32.pt
_SAYS_WHOSE = re.compile(r"(?!fp32\.pt$).*?(?:[A-Za-z_].*\d|\d.*[A-Za-z_])")


@dataclass(frozen=True, slots=True)
class Cut:
    """kind: one of KINDS; pieces that hold something; copies: ranks that hold the same piece, at most.

    `even` means that all ranks hold as many elements; of what is stored once, that all pieces have the same shape.
    `empty` means that at least one rank of the mesh holds nothing, whatever the other pieces' shapes.
    stored_once: the checkpoint keeps one copy of each piece, and how many ranks held it is not in the files.
    """

    KINDS: ClassVar[tuple[str, ...]] = ("even", "uneven", "empty", "whole")

    kind: str
    pieces: int
    copies: int
    without: int
    stored_once: bool = False
    holders: int = 0

    @property
    def in_words(self) -> str:
        """`into 4 uneven pieces, each on 2 ranks`; of what is stored once, `in 4 uneven pieces`."""
        if self.stored_once:
            return "in one piece" if self.kind == "whole" else f"in {self.pieces:,} {self.kind} pieces"
        if self.kind == "whole":
            return "whole" + (f", the same on {plural(self.copies, 'rank')}" if self.copies > 1 else "")
        if self.pieces > self.holders > 1 and self.kind != "empty":
            how = "as many elements on each" if self.kind == "even" else "not as many elements on each"
            return f"into {self.pieces:,} boxes on {plural(self.holders, 'rank')}, {how}"
        adjective = {"even": "even ", "uneven": "uneven ", "empty": ""}[self.kind]
        text = f"into {self.pieces:,} {adjective}pieces" if self.pieces != 1 else "into one piece"
        if self.copies > 1:
            text += f", each on {plural(self.copies, 'rank')}"
        if self.without:
            text += f"; {plural(self.without, 'rank')} {'holds' if self.without == 1 else 'hold'} nothing of it"
        return text


def cut_of(tensor: LazyTensor) -> Cut:
    """How the tensor is cut, from its chunks and its mesh."""
    filled = [chunk for chunk in tensor.chunks if chunk.box.numel]
    if is_stored_once(tensor):
        even = len({chunk.box.shape for chunk in filled}) == 1
        kind = "whole" if len(filled) <= 1 else "even" if even else "uneven"
        return Cut(kind, len(filled), 1, 0, stored_once=True)
    copies = max((1 + len(chunk.replicas) for chunk in filled), default=1)
    holders = len({rank for chunk in filled for rank in holders_of(chunk)})  # a rank may hold several pieces
    ranks = math.prod(axis.size for axis in tensor.mesh) if tensor.mesh else holders
    # A tensor on a part of the mesh lies on more ranks than its own axes have: there the empty chunks tell.
    empty = sum(1 + len(chunk.replicas) for chunk in tensor.chunks if not chunk.box.numel)
    without = max(empty, ranks - holders, 0)
    if without:
        return Cut("empty", len(filled), copies, without)
    if len(filled) <= 1:
        return Cut("whole", len(filled), copies, 0)
    return Cut("even" if _is_even(filled) else "uneven", len(filled), copies, 0, holders=holders)


def _is_even(filled: Sequence[Chunk]) -> bool:
    """Whether all ranks hold as many elements."""
    sizes: Counter[int] = Counter()
    for chunk in filled:
        sizes[chunk.rank] += chunk.box.numel
    return len(set(sizes.values())) == 1


def holders_of(chunk: Chunk) -> Iterable[int]:
    """The ranks that stored the piece."""
    return (chunk.rank, *(rank for rank, _ in chunk.replicas))


def is_stored_once(tensor: LazyTensor) -> bool:
    """Whether it lies in a checkpoint that keeps one copy of each piece, whoever held it: DCP's or zarr's."""
    return all(_is_dcp(chunk) or _is_zarr(chunk, tensor) for chunk in tensor.chunks[:1]) and bool(tensor.chunks)


def _is_dcp(chunk: Chunk) -> bool:
    name = Path(chunk.stored.file).name
    return name.endswith(".distcp") or SHARD.fullmatch(name) is not None


def _is_zarr(chunk: Chunk, tensor: LazyTensor) -> bool:
    """A chunk file 0.1.0 in a directory that has the tensor's name."""
    return Path(chunk.stored.file).parent.name == tensor.name


def file_label(file: str) -> str:
    """The file's name, with its directory's where the name alone does not say whose it is (mp_rank_00/model.pt)."""
    path = Path(file)
    return path.name if _SAYS_WHOSE.match(path.name) else f"{path.parent.name}/{path.name}"


def sharded_dim(axis: MeshAxis) -> int | None:
    """The dimension that the axis cuts; None for Replicate and what is not as plain as Shard(d)."""
    found = _SHARD.fullmatch(axis.placement)
    return int(found[1]) if found else None


def along(tensor: LazyTensor, axis: MeshAxis) -> str:
    """`4 pieces, 2 on each rank`, for a dimension in more pieces than ranks; empty where each rank has one piece."""
    dim = sharded_dim(axis)
    if dim is None:
        return ""
    by_rank: dict[int, set[int]] = {}
    for chunk in tensor.chunks:
        if chunk.box.numel:
            by_rank.setdefault(chunk.rank, set()).add(chunk.box.offset[dim])
    pieces = len(set().union(*by_rank.values()))
    if pieces <= math.prod(other.size for other in tensor.mesh if sharded_dim(other) == dim):
        return ""
    counts = {len(offsets) for offsets in by_rank.values()}
    text = f"{pieces:,} pieces"
    if not tensor.ranked or max(counts) == 1:
        return text
    return f"{text}, {min(counts)}{f' to {max(counts)}' if len(counts) > 1 else ''} on each rank"
