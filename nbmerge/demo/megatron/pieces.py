"""Which boxes of each Megatron tensor a rank holds, and which of several holders saves a box. Pure integers.

From megatron-core: tensor_parallel/layers.py and transformer/mlp.py (`sharded_state_dict`), moe/experts.py, and
parallel_state.py for the order of ranks (tp, then dp, then pp; experts: etp, then ep, then their own dp).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nbmerge.geometry import Box

# The linear modules by the way they are cut. A value head of one row and everything else is on every rank.
_COLUMNS = ("word_embeddings", "output_layer", "linear_qkv", "linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj",
            "eh_proj")  # fmt: skip
_ROWS = ("linear_proj", "linear_fc2")
_LAYER = re.compile(r"(?:^|\.)layers\.(?:(\d+)\.)?")
_EXPERT = re.compile(r"\.experts\.experts\.(?:(\d+)\.)?")
# Modules of which transformer_engine keeps a state beside their weights; the tables of the vocabulary have none.
_MODULE = re.compile(r"((?:.*\.)?(linear_\w+|[a-z_]*layernorm|eh_proj|enorm|hnorm))\.weight(?:_[wv])?")
_PARAMETER = re.compile(r"(?:^|\.)(\w+)\.(weight|bias)(_[wv])?$")


@dataclass(frozen=True, kw_only=True)
class ParallelSizes:
    """How a model of so many layers and experts is spread.

    tp, pp, ep: tensor, pipeline and expert parallel sizes. etp: tensor parallel size inside the experts, as large
    as tp unless given. A stage has the fewest ranks that both need: tp · dp of them, with ep folded into dp. The
    layers need not divide by pp: the first stages have one more.
    """

    layers: int
    experts: int = 0
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None

    @property
    def expert_tp(self) -> int:
        """Tensor parallel size inside the experts."""
        return self.tp if self.etp is None else self.etp

    @property
    def stage(self) -> int:
        """Ranks of one pipeline stage."""
        return math.lcm(self.tp, self.expert_tp * self.ep)

    @property
    def world_size(self) -> int:
        """Ranks of all stages."""
        return self.stage * self.pp

    @property
    def coordinates(self) -> Iterator[Coordinates]:
        """The place of every rank, in their order."""
        return (Coordinates.of(rank, self) for rank in range(self.world_size))


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """The place of a rank: among those of the dense tensors (tp, dp), of the experts (etp, ep, edp), and its stage."""

    tp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int

    @staticmethod
    def of(rank: int, sizes: ParallelSizes) -> Coordinates:
        """The place of a rank, as megatron-core orders them."""
        pp, inside = divmod(rank, sizes.stage)
        dp, tp = divmod(inside, sizes.tp)
        rest, etp = divmod(inside, sizes.expert_tp)
        edp, ep = divmod(rest, sizes.ep)
        return Coordinates(tp=tp, dp=dp, pp=pp, etp=etp, ep=ep, edp=edp)


def local_pieces(name: str, shape: Sequence[int], at: Coordinates, sizes: ParallelSizes) -> list[Box]:
    """The boxes of a tensor that this rank saves: one for each layer, for each expert and for each half of a gated fc1.

    name, shape: of the whole tensor; axes [layers, experts, ...] where the name has no numbers of them. Of several
    ranks that hold the same box only the first saves it, as Megatron's replica ids have it.
    """
    expert = _EXPERT.search(name)
    tp, size = (at.etp, sizes.expert_tp) if expert else (at.tp, sizes.tp)
    leading: list[Sequence[int]] = []
    layer = _LAYER.search(name)
    if layer is None or "mtp.layers." in name:
        if at.pp != (0 if "embedding." in name else sizes.pp - 1):
            return []
    elif layer[1] is None:
        leading.append(layers_of(at.pp, shape[0], sizes.pp))
    elif int(layer[1]) not in layers_of(at.pp, sizes.layers, sizes.pp):
        return []
    if expert:
        count = shape[len(leading)] if expert[1] is None else sizes.experts
        owned = _experts_of(at.ep, count, sizes.ep)
        if expert[1] is None:
            leading.append(owned)
        elif int(expert[1]) not in owned:
            return []
    boxes = _cut(name, tuple(shape[len(leading) :]), tp, size)
    replica = at.edp if expert else at.dp
    if replica or (tp and boxes is None):
        return []
    boxes = boxes if boxes is not None else [Box.whole(tuple(shape[len(leading) :]))]
    ones = (1,) * len(leading)
    return [Box((*first, *box.offset), (*ones, *box.shape)) for first in itertools.product(*leading) for box in boxes]


def _cut(name: str, shape: tuple[int, ...], rank: int, size: int) -> list[Box] | None:
    """A tensor-parallel rank's boxes of one layer's tensor; None where every rank holds all of it."""
    found = _PARAMETER.search(name)
    if found is None:
        return [_block(shape, 0, rank, size)] if name.endswith("softmax_offset") else None
    module, kind, half = found.groups()
    if module in _COLUMNS and shape[0] != 1:
        return [_block(shape, 0, rank, size)]
    if module in _ROWS and kind == "weight":
        return [_block(shape, len(shape) - 1, rank, size)]
    if module == "linear_fc1":
        if half:
            return [_block(shape, 0, rank, size)]
        return [_block(shape, 0, part * size + rank, 2 * size) for part in (0, 1)]
    return None


def _block(shape: tuple[int, ...], dim: int, index: int, count: int) -> Box:
    """The index-th of `count` equal blocks along a dimension. Raises ValueError where they cannot be equal."""
    if shape[dim] % count:
        raise ValueError(f"{shape[dim]} rows or columns cannot be cut into {count} equal parts")
    length = shape[dim] // count
    offset = tuple(index * length if d == dim else 0 for d in range(len(shape)))
    return Box(offset, tuple(length if d == dim else n for d, n in enumerate(shape)))


def layers_of(stage: int, layers: int, stages: int) -> range:
    """The layers of a pipeline stage: as equal as can be, the first stages have one more."""
    length, more = divmod(layers, stages)
    start = stage * length + min(stage, more)
    return range(start, start + length + (stage < more))


def _experts_of(rank: int, experts: int, ranks: int) -> range:
    """The experts of an expert-parallel rank."""
    if experts % ranks:
        raise ValueError(f"{experts} experts cannot be spread over {ranks} ranks")
    count = experts // ranks
    return range(rank * count, (rank + 1) * count)


def extra_state_keys(name: str, shape: Sequence[int], at: Coordinates, sizes: ParallelSizes) -> list[str]:
    """The keys of the `_extra_state` objects that this rank saves of the module that has this tensor.

    One for each layer and expert: `decoder.layers.mlp.linear_fc1._extra_state/shard_0_4` is of the first of four
    layers. The first tensor parallel rank saves them. None for a tensor of another kind, and for the norm inside a
    linear module.
    """
    found = _MODULE.fullmatch(name)
    if found is None or (at.etp if _EXPERT.search(name) else at.tp):
        return []
    module, last = found.groups()
    axes = tuple(shape[: len(shape) - (1 if last.endswith("norm") else 2)])
    places = {box.offset[: len(axes)] or (0,) for box in local_pieces(name, shape, at, sizes)}
    end = ".".join(map(str, axes or (1,)))
    return [f"{module}._extra_state/shard_{'.'.join(map(str, place))}_{end}" for place in sorted(places)]
