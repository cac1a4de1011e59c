"""The parallel sizes of a run, where something says them, and the mesh that a tensor of an index was cut on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nbmerge.geometry import Box
from nbmerge.layout import MeshAxis

_STACKED = re.compile(r"\blayers\.(?!\d)")
_EXPERTS = re.compile(r"\bexperts\.experts\.(?!\d)")


@dataclass(frozen=True)
class ParallelSizes:
    """Tensor, pipeline, expert and expert tensor parallel size; 1 where nothing is said."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    @staticmethod
    def of(settings: Mapping[str, Any]) -> ParallelSizes:
        """From verl's transformer_config.json, or Megatron-LM's saved arguments: they use the same names."""
        names = ("tensor_model", "pipeline_model", "expert_model", "expert_tensor")
        found = (settings.get(f"{name}_parallel_size") for name in names)
        return ParallelSizes(*(size if isinstance(size, int) and size > 0 else 1 for size in found))

    @property
    def mesh(self) -> tuple[MeshAxis, ...]:
        """The axes that are longer than 1, and what each divides."""
        axes = (("pp", self.pp, "layers"), ("ep", self.ep, "experts"), ("tp", self.tp, "tensors"))
        return tuple(MeshAxis(name, size, what) for name, size, what in axes if size > 1)

    def axes_of(self, name: str, boxes: Iterable[Box]) -> tuple[MeshAxis, ...]:
        """How a tensor of an index was cut: its layers over pipeline stages, its experts, and the tensor itself.

        A torch_dist checkpoint stores one copy of what several ranks hold, so that axes which only copy are left out.
        """
        dims: list[tuple[str, int | None]] = []
        if _STACKED.search(name):
            dims.append(("pp", self.pp))
        if _EXPERTS.search(name):
            dims.append(("ep", self.ep))
        axes: list[MeshAxis] = []
        offsets = [box.offset for box in boxes]
        for dim in range(len(offsets[0]) if offsets else 0):
            pieces = len({offset[dim] for offset in offsets})
            axis, size = dims[dim] if dim < len(dims) else ("tp", None)
            size = _ranks(pieces, self.etp if dims and dims[-1][0] == "ep" else self.tp) if size is None else size
            if pieces > 1 and size > 1:
                axes.append(MeshAxis(axis, size, f"Shard({dim})"))
        return tuple(axes)


def _ranks(pieces: int, said: int) -> int:
    """On how many ranks a dimension of so many pieces lies: gate and up halves are a piece each of every rank."""
    return said if said > 1 and pieces in (said, 2 * said) else pieces
