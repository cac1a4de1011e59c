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
_GATE_AND_UP = re.compile(r"\blinear_fc1\.(?:weight|bias)\d*$")  # a piece each of every rank
_OF_AN_EXPERT = re.compile(r"\bexperts\.")  # a routed one: not shared_experts


@dataclass(frozen=True)
class ParallelSizes:
    """Tensor, pipeline, expert and expert tensor parallel size; None where nothing is said."""

    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    etp: int | None = None

    @staticmethod
    def of(settings: Mapping[str, Any]) -> ParallelSizes:
        """From verl's transformer_config.json, or Megatron-LM's saved arguments: they use the same names."""
        names = ("tensor_model", "pipeline_model", "expert_model", "expert_tensor")
        found = (settings.get(f"{name}_parallel_size") for name in names)
        return ParallelSizes(*(size if isinstance(size, int) and size > 0 else None for size in found))

    @property
    def mesh(self) -> tuple[MeshAxis, ...]:
        """The axes that are longer than 1, and what each divides."""
        axes = (("pp", self.pp, "layers"), ("ep", self.ep, "experts"), ("tp", self.tp, "tensors"))
        return tuple(MeshAxis(name, size, what) for name, size, what in axes if size and size > 1)

    def axes_of(self, name: str, boxes: Iterable[Box]) -> tuple[MeshAxis, ...]:
        """How a tensor of an index was cut: its layers over pipeline stages, its experts, and the tensor itself.

        A torch_dist checkpoint stores one copy of what several ranks hold, so that axes which only copy are left out.
        """
        leading = [("pp", self.pp or 1)] if _STACKED.search(name) else []
        leading += [("ep", self.ep or 1)] if _EXPERTS.search(name) else []
        said = self.etp if _OF_AN_EXPERT.search(name) else self.tp
        halves = 2 if _GATE_AND_UP.search(name) else 1
        axes: list[MeshAxis] = []
        offsets = [box.offset for box in boxes]
        for dim in range(len(offsets[0]) if offsets else 0):
            pieces = len({offset[dim] for offset in offsets})
            if pieces > 1:
                found = leading[dim : dim + 1] or _ranks(pieces, said, halves)
                axes += [MeshAxis(axis, size, f"Shard({dim})") for axis, size in found if size > 1]
        return tuple(axes)


def _ranks(pieces: int, said: int | None, halves: int) -> list[tuple[str, int]]:
    """On how many ranks a dimension of so many pieces lies: as is said, where the pieces bear that out.

    Megatron-FSDP cuts the piece of a tensor parallel rank again, for the data parallel ranks.
    """
    if said and pieces in (said, halves * said):
        return [("tp", said)]
    return [("tp", said), ("dp", pieces // said)] if said and pieces % said == 0 else [("tp", pieces)]
