"""Words for device meshes: which axes there are, in reading order, and what each does to a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nbmerge.display import words
from nbmerge.display.shards import holders_of, is_stored_once
from nbmerge.geometry import unravel
from nbmerge.layout import Checkpoint, LazyTensor, MeshAxis

_READING_ORDER = ("tp", "pp", "ep")  # as Megatron's users write it; ranks are numbered in another one
_EXPERT_TENSOR = "etp"
_PARALLEL = ("layers", "experts", "tensors")  # placements of the axes of a checkpoint that is divided by them


def ordered(mesh: Sequence[MeshAxis]) -> tuple[MeshAxis, ...]:
    """The axes in the order in which they are told: Megatron's tp, pp, ep; others outermost first."""
    if not any(axis.placement in _PARALLEL for axis in mesh):
        return tuple(mesh)
    return tuple(sorted(mesh, key=lambda axis: _READING_ORDER.index(axis.name) if axis.name in _READING_ORDER else 9))


def mesh_in_words(checkpoint: Checkpoint) -> str:
    """`fsdp=4 × tp=2`; `tp=2 × pp=2, experts over ep=2` where the expert ranks are some of the same ranks."""
    mesh = ordered(checkpoint.mesh)
    inside = [axis for axis in mesh if axis.placement == "experts"]
    if math.prod(axis.size for axis in mesh) == checkpoint.world_size:
        inside = []
    text = " × ".join(axis_label(axis) for axis in mesh if axis not in inside)
    over = ", ".join(f"experts over {axis_label(axis)}" for axis in inside)
    return words.elide(", ".join(filter(None, (text, over))))


def is_whole_mesh(checkpoint: Checkpoint) -> bool:
    """Whether the mesh that is known has a place for each rank: some checkpoints record only a part of its axes."""
    sizes = [axis.size for axis in checkpoint.mesh if axis.placement != "experts"]
    return checkpoint.world_size in (math.prod(sizes), math.prod(axis.size for axis in checkpoint.mesh))


def axis_label(axis: MeshAxis) -> str:
    """`tp=2`."""
    return f"{words.elide(axis.name, 24)}={axis.size:,}"


def placement_in_words(tensor: LazyTensor, checkpoint: Checkpoint) -> str:
    """`Shard(0)×4`; where one axis means layers and another experts, with their names: `pp:Shard(0), tp:Shard(2)`."""
    if checkpoint.names != "megatron":
        return tensor.placement
    return ", ".join(f"{axis.name}:{axis.placement}" for axis in tensor.mesh) or "not cut"


def table_axes(checkpoint: Checkpoint, meshes: Sequence[tuple[MeshAxis, ...]]) -> list[MeshAxis]:
    """An axis for each name and size that occurs, those of the checkpoint first."""
    sizes = {axis.name: axis.size for axis in checkpoint.mesh}
    found: dict[tuple[str, int], MeshAxis] = {}
    for mesh in (ordered(checkpoint.mesh), *meshes):
        for axis in mesh:
            if axis.name != _EXPERT_TENSOR or axis.size != sizes.get("tp"):  # else the same ranks as tp
                found.setdefault((axis.name, axis.size), axis)
    return list(found.values())


def on_axis(tensor: LazyTensor, axis: MeshAxis, checkpoint: Checkpoint) -> str:
    """What the axis does to the tensor: its placement, or in words that it is not cut along it, or where it lies."""
    names = {axis.name, _EXPERT_TENSOR} if axis.name == "tp" else {axis.name}
    for own in tensor.mesh:
        if own.name in names and own.size == axis.size:
            return own.placement
    if is_stored_once(tensor):
        return "not cut"
    return _where_on(tensor, axis, checkpoint) if checkpoint.names == "megatron" else "not on it"


def _where_on(tensor: LazyTensor, axis: MeshAxis, checkpoint: Checkpoint) -> str:
    """How many of the axis' ranks have it, by the numbers of the files: they count the mesh in row-major order."""
    sizes = tuple(one.size for one in checkpoint.mesh)
    if axis not in checkpoint.mesh or math.prod(sizes) != checkpoint.world_size:
        return "not cut"
    place = checkpoint.mesh.index(axis)
    held = {unravel(rank, sizes)[place] for chunk in tensor.chunks for rank in holders_of(chunk)}
    unit = "stage" if axis.placement == "layers" else "rank"
    return "Replicate" if len(held) == axis.size else f"on {len(held):,} {unit}{'s' if len(held) > 1 else ''}"
