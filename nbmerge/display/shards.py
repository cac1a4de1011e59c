"""How a tensor is cut: evenly or not, with empty pieces or without, and on how many ranks each piece lies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from nbmerge.errors import plural
from nbmerge.layout import LazyTensor


@dataclass(frozen=True, slots=True)
class Cut:
    """kind: one of KINDS; pieces that hold something; copies: ranks that hold the same piece, at most.

    `empty` means that at least one rank of the mesh holds nothing, whatever the other pieces' shapes.
    """

    KINDS: ClassVar[tuple[str, ...]] = ("even", "uneven", "empty", "whole")

    kind: str
    pieces: int
    copies: int
    without: int

    @property
    def in_words(self) -> str:
        """`into 4 uneven pieces, each on 2 ranks`."""
        if self.kind == "whole":
            return "whole" + (f", the same on {plural(self.copies, 'rank')}" if self.copies > 1 else "")
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
    copies = max((1 + len(chunk.replicas) for chunk in filled), default=1)
    holders = sum(1 + len(chunk.replicas) for chunk in filled)
    ranks = math.prod(axis.size for axis in tensor.mesh) if tensor.mesh else holders
    # A tensor on a part of the mesh lies on more ranks than its own axes have: there the empty chunks tell.
    empty = sum(1 + len(chunk.replicas) for chunk in tensor.chunks if not chunk.box.numel)
    without = max(empty, ranks - holders, 0)
    if without:
        return Cut("empty", len(filled), copies, without)
    if len(filled) <= 1:
        return Cut("whole", len(filled), copies, 0)
    even = len({chunk.box.shape for chunk in filled}) == 1
    return Cut("even" if even else "uneven", len(filled), copies, 0)
