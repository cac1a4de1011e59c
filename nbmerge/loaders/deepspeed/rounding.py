"""Master weights must round to the model's own: else the files are of two saves, or of two parameters.

ZeRO stages 1 and 2, and a universal checkpoint, have both. Measured on real files: rounding a master gives the 16-bit
weight bit for bit. (DeepSpeed's conversion to the universal form mixes parameters up where round_robin_gradients was
on, and says nothing.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import add

from nbmerge import expressions as ex
from nbmerge.engine.lower import blocks
from nbmerge.expressions import Stored
from nbmerge.geometry import Box
from nbmerge.layout import Chunk, Equality, LazyTensor

_BYTES = 64 * 2**10  # of a master, that are compared


def roundings(masters: Mapping[str, LazyTensor], module: Mapping[str, Stored]) -> tuple[Equality, ...]:
    """What must be equal: of each file of masters, the beginning of its largest piece that the module has too."""
    largest: dict[str, tuple[str, Chunk]] = {}
    for name, chunk in _pieces(masters, module):
        file = chunk.stored.file
        if file not in largest or chunk.box.numel > largest[file][1].box.numel:
            largest[file] = name, chunk
    return tuple(_equality(name, chunk, module[name]) for name, chunk in largest.values())


def _pieces(masters: Mapping[str, LazyTensor], module: Mapping[str, Stored]) -> Iterator[tuple[str, Chunk]]:
    for name, tensor in masters.items():
        held = module.get(name)
        if held is None or held.shape != tensor.shape or not held.dtype.is_floating:
            continue
        if held.dtype.itemsize <= tensor.dtype.itemsize:
            yield from ((name, chunk) for chunk in tensor.chunks if chunk.box.numel)


def _equality(name: str, chunk: Chunk, held: Stored) -> Equality:
    block = next(blocks(chunk.stored.shape, chunk.stored.dtype.itemsize, _BYTES))
    box = Box(tuple(map(add, chunk.box.offset, block.offset)), block.shape)
    master = ex.cast(ex.slice_of(chunk.stored, block), held.dtype)
    return Equality(name, master, ex.slice_of(held, box), box=box, master=chunk.stored.file)
