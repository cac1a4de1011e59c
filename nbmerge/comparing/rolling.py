"""Rolls tensors up: by layer, by kind of module, and into the few parts that a sentence names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from nbmerge.comparing.statistics import Statistics, combined

if TYPE_CHECKING:
    from nbmerge.comparing.model_diff import TensorDiff

MATRICES, EMBEDDINGS, NORMS, BIASES, OTHERS = "matrices", "embeddings", "norms", "biases", "other tensors"
PARTS = (MATRICES, EMBEDDINGS, NORMS, BIASES, OTHERS)

Key = TypeVar("Key", bound=Hashable)

# What the containers of repeated layers are called by the models of transformers, Megatron, and vision towers.
_LAYER = re.compile(
    r"^(?P<stack>(?:.+?\.)?(?:layers|layer|h|blocks|block|resblocks))\.(?P<number>\d{1,6})\.(?P<rest>.+)$"
)
_LEAF = re.compile(r"(?:^|\.)(weight|bias)$")
_NUMBERED = re.compile(r"\.\d{1,9}(?=\.|$)")
_EXPERTS = re.compile(r"^((?:.+\.)?experts)\..*$")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NORM = re.compile(r"(^|[._])(\w*norm\w*|ln_?\w*)$", re.IGNORECASE)
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|lm_head|embed_out|output_layer)$"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor belongs. stack: the container of its layer, and layer its number; None outside of layers.

    kind: of module, such as `self_attn.q_proj`, `mlp.experts` for every expert, `norms`; part: one of `PARTS`.
    """

    stack: str
    layer: int | None
    kind: str
    part: str


def place_of(name: str, dims: int) -> Place:
    """The place of a tensor by its name and the number of its dimensions.

    place_of("model.layers.3.mlp.experts.17.up_proj.weight", 2)
    # Place(stack="model.layers", layer=3, kind="mlp.experts", part="matrices")
    """
    found = _LAYER.match(name)
    rest = found["rest"] if found else name
    module = _LEAF.sub("", rest) or rest
    part = _part(name, module, dims)
    kind = NORMS if part == NORMS else _NUMBERED.sub("", _EXPERTS.sub(r"\1", module))
    if found is None:
        return Place("", None, kind.removeprefix("model."), part)
    return Place(found["stack"], int(found["number"]), kind, part)


def _part(name: str, module: str, dims: int) -> str:
    if dims <= 1 and _NORM.search(module):
        return NORMS
    if name.endswith("bias"):
        return BIASES
    if _EMBEDDING.search(module):
        return EMBEDDINGS
    return MATRICES if dims > 1 else OTHERS


_STAGES = ("attn", "attention"), ("mlp", "expert", "feed_forward", "ffn")


def kind_order(kind: str) -> tuple[int, int, str]:
    """Sorts kinds as a layer computes: attention, MLP or experts, the rest, norms; projections as they are used."""
    last = kind.rpartition(".")[2]
    stage = 3 if kind == NORMS else next((n for n, words in enumerate(_STAGES) if any(w in kind for w in words)), 2)
    return stage, _PROJECTIONS.index(last) if last in _PROJECTIONS else len(_PROJECTIONS), kind


def is_vocabulary(name: str) -> bool:
    """Whether the rows of the tensor are tokens: an embedding or an output layer, weight or bias."""
    return bool(_EMBEDDING.search(_LEAF.sub("", name)))


@dataclass(frozen=True, slots=True)
class Together:
    """Tensors of one place: how many, how many of them changed, and their statistics as if they were one."""

    tensors: int
    changed: int
    statistics: Statistics


def together(tensors: Iterable[TensorDiff]) -> dict[Place, Together]:
    """The tensors of each place, in the order in which the places appear; of a layer, all experts share one."""
    groups: dict[Place, list[Statistics]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.place, []).append(tensor.statistics)
    return {
        place: Together(len(parts), sum(1 for one in parts if one.changed), combined(parts))
        for place, parts in groups.items()
    }


def rolled(places: Mapping[Place, Together], key: Callable[[Place], Key]) -> dict[Key, Statistics]:
    """The statistics of places with the same key together, in the order in which the keys appear."""
    groups: dict[Key, list[Statistics]] = {}
    for place, found in places.items():
        groups.setdefault(key(place), []).append(found.statistics)
    return {found: combined(parts) for found, parts in groups.items()}


def main_stack(places: Mapping[Place, Together]) -> str:
    """The container whose layers hold most elements; empty where there are none."""
    sizes: Counter[str] = Counter()
    for place, found in places.items():
        if place.layer is not None:
            sizes[place.stack] += found.statistics.elements
    return max(sizes, key=lambda stack: sizes[stack], default="")


def kind_sizes(places: Mapping[Place, Together]) -> Counter[str]:
    """The elements of each kind of module."""
    sizes: Counter[str] = Counter()
    for place, found in places.items():
        sizes[place.kind] += found.statistics.elements
    return sizes


def largest_kinds(sizes: Mapping[str, int], most: int) -> list[str]:
    """The kinds with the most elements, in the order in which a layer computes."""
    kinds = sorted(sizes, key=lambda kind: (-sizes[kind], kind_order(kind)))
    return sorted(kinds[:most], key=kind_order)
