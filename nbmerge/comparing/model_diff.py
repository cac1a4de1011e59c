"""The report of a comparison: what changed, where, how far, and what could not be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from nbmerge.comparing.left_out import A, B, Mismatch, Unmatched
from nbmerge.comparing.rolling import Place, Together, place_of, rolled, together
from nbmerge.comparing.statistics import Statistics, combined
from nbmerge.dtypes import DType
from nbmerge.geometry import Shape, unravel
from nbmerge.shown import Displayed, Explored, Plotted

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class TensorDiff(Displayed, Plotted):
    """How one tensor changed from A to B.

    shape: of what was compared; dtype_a, dtype_b: as stored; compared_as: the wider of the two; note: the rule that
    paired two tensors of different name or shape; frozen: whether it was declared frozen; rank_one: the share of
    ‖Δ‖² that the best outer product holds, at least, for a matrix that changed and where it was asked for.
    """

    name: str
    shape: Shape
    dtype_a: DType
    dtype_b: DType
    compared_as: DType
    statistics: Statistics
    note: str = ""
    frozen: bool = False
    rank_one: float | None = None

    @cached_property
    def place(self) -> Place:
        """Its layer, kind of module, and part of the model."""
        return place_of(self.name, len(self.shape))

    @property
    def changed(self) -> int:
        """Elements whose bits differ in the dtype of the comparison."""
        return self.statistics.changed

    @property
    def share(self) -> float:
        """Share of its elements that changed, from 0 to 1."""
        return self.statistics.share

    @property
    def largest_at(self) -> Shape | None:
        """The index of the largest |Δ|, the first one in row-major order; None where nothing moved."""
        largest = self.statistics.largest
        return None if largest is None else unravel(largest.place, self.shape)


@dataclass(frozen=True)
class Looked:
    """How much was looked at. share: of the elements that could be compared; asked: the `sample` that was asked for."""

    share: float = 1.0
    asked: float = 1.0
    nbytes: int = 0
    seconds: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether nothing was left out."""
        return self.share >= 1


@dataclass(frozen=True, repr=False)
class ModelDiff(Displayed, Explored, Plotted):
    """How a model changed from A to B.

    a, b: what was compared, as the user named it; tensors: what was compared, by published name; unmatched: tensors,
    or rows of a vocabulary, that only one holds; mismatched: those that both hold and that cannot be compared;
    frozen: patterns of names that were declared frozen; idle_patterns: those of them that no name is like;
    frozen_unseen: names that are, and that could not be compared as a whole; looked: how much was looked at;
    notes: how names were found.
    """

    a: str
    b: str
    tensors: Mapping[str, TensorDiff]
    unmatched: tuple[Unmatched, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    frozen: tuple[str, ...] = ()
    idle_patterns: tuple[str, ...] = ()
    frozen_unseen: tuple[str, ...] = ()
    looked: Looked = field(default_factory=Looked)
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> TensorDiff:
        return self.tensors[name]

    @property
    def is_empty(self) -> bool:
        """Whether both hold the same tensors with the same bits, as far as was looked."""
        return not (self.unmatched or self.mismatched or self.changed)

    @cached_property
    def statistics(self) -> Statistics:
        """All tensors together."""
        return combined(found.statistics for found in self.by_place.values())

    @cached_property
    def changed(self) -> tuple[TensorDiff, ...]:
        """The tensors of which an element changed."""
        return tuple(tensor for tensor in self.tensors.values() if tensor.changed)

    @cached_property
    def frozen_moved(self) -> tuple[TensorDiff, ...]:
        """Tensors that were declared frozen and changed."""
        return tuple(tensor for tensor in self.changed if tensor.frozen) if self.frozen else ()

    @cached_property
    def tensor_notes(self) -> tuple[str, ...]:
        """Which tensors were paired by a rule, and which."""
        return tuple(f"{tensor.name}: {tensor.note}" for tensor in self.tensors.values() if tensor.note)

    @property
    def only_a(self) -> tuple[Unmatched, ...]:
        """What only A holds."""
        return tuple(one for one in self.unmatched if one.side == A)

    @property
    def only_b(self) -> tuple[Unmatched, ...]:
        """What only B holds."""
        return tuple(one for one in self.unmatched if one.side == B)

    @cached_property
    def by_place(self) -> Mapping[Place, Together]:
        """The tensors by what the other sums go by: layer, kind of module, and part of the model."""
        return together(self.tensors.values())

    @cached_property
    def by_layer(self) -> Mapping[tuple[str, int | None], Statistics]:
        """The statistics of every layer, by (container, number); what is in no layer by ("", None)."""
        return rolled(self.by_place, lambda place: (place.stack, place.layer))

    @cached_property
    def by_kind(self) -> Mapping[str, Statistics]:
        """The statistics of every kind of module over all layers: `self_attn.q_proj`, `mlp.experts`, `norms`, …"""
        return rolled(self.by_place, lambda place: place.kind)

    @cached_property
    def by_part(self) -> Mapping[str, Statistics]:
        """The statistics of matrices, embeddings, norms, biases and other tensors."""
        return rolled(self.by_place, lambda place: place.part)

    @cached_property
    def compared_as(self) -> tuple[tuple[DType, DType, DType], ...]:
        """Each (dtype in A, dtype in B, dtype of the comparison) where the first two differ."""
        found = {
            (tensor.dtype_a, tensor.dtype_b, tensor.compared_as): None
            for tensor in self.tensors.values()
            if tensor.dtype_a != tensor.dtype_b
        }
        return tuple(found)

    @property
    def sentence(self) -> str:
        """What changed, in one sentence."""
        from nbmerge.comparing.sentence import diff_sentence

        return diff_sentence(self)

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each tensor. Raises NotSupportedError where pandas is not installed."""
        from nbmerge.comparing.frames import diff_frame

        return diff_frame(self)

    def largest_updates(self, count: int) -> Sequence[TensorDiff]:
        """The tensors that changed most, by relative L2, then by the share of changed elements."""
        return self._by_update[:count]

    @cached_property
    def _by_update(self) -> Sequence[TensorDiff]:
        return sorted(self.changed, key=lambda t: (t.statistics.relative_l2 or 0.0, t.share), reverse=True)

    def summed_up(self) -> ModelDiff:
        """The same, with the sums over all tensors made now. Of a hundred thousand they take seconds, for which the
        first display should not have to wait.
        """
        _ = self.statistics, self.compared_as, self.tensor_notes, self._by_update
        return self
