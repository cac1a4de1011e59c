"""What a reader of one of Megatron's layouts finds: the parts of a Checkpoint that depend on the layout."""

from __future__ import annotations

from dataclasses import dataclass, field

from nbmerge.layout import LazyTensor, MeshAxis, SourceFile, Stated


@dataclass(frozen=True)
class Contents:
    """The tensors of a checkpoint under Megatron's own names, with layer and expert numbers of the whole model.

    layout: what was read, in words; tensors: no optimizer state and no extra state; mesh: tensor, pipeline and
    expert parallel sizes, where they are known; notes: what was left alone; stated: what the run recorded of its model.
    """

    layout: str
    tensors: dict[str, LazyTensor]
    files: tuple[SourceFile, ...]
    world_size: int
    mesh: tuple[MeshAxis, ...] = ()
    notes: tuple[str, ...] = ()
    stated: Stated = field(default_factory=Stated)
