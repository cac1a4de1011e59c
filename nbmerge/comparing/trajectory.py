"""How a model changed along the steps of a run: a comparison for each step, and whether updates point the same way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from nbmerge.comparing.model_diff import ModelDiff
from nbmerge.comparing.sentence import percent
from nbmerge.comparing.statistics import quotient
from nbmerge.errors import plural
from nbmerge.shown import Displayed, Plotted

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class UpdateProducts:
    """Scalar products of an update with itself, the one before with itself, and both; units of 2**-FRACTION."""

    now: int = 0
    before: int = 0
    both: int = 0

    def __add__(self, other: UpdateProducts) -> UpdateProducts:
        return UpdateProducts(self.now + other.now, self.before + other.before, self.both + other.both)

    @property
    def cosine(self) -> float | None:
        """The cosine between the two updates; None where one of them is zero."""
        if not self.now or not self.before:
            return None
        square = quotient(self.both * self.both, self.now * self.before)
        return math.sqrt(min(square, 1.0)) * (1 if self.both >= 0 else -1)


@dataclass(frozen=True)
class Step:
    """One step of a run. label: of the checkpoint that it led to; diff: from the checkpoint before;
    products: by tensor, of its update with the update before, for tensors that all three checkpoints hold.
    """

    label: str
    diff: ModelDiff
    products: Mapping[str, UpdateProducts]

    @cached_property
    def cosine(self) -> float | None:
        """The cosine between this update and the one before, over all tensors; None for the first step."""
        return sum(self.products.values(), UpdateProducts()).cosine

    @cached_property
    def cosines(self) -> Mapping[str, float | None]:
        """The same for each tensor."""
        return {name: products.cosine for name, products in self.products.items()}

    @cached_property
    def cosines_by_kind(self) -> Mapping[str, float | None]:
        """The same for each kind of module."""
        sums: dict[str, UpdateProducts] = {}
        for name, products in self.products.items():
            kind = self.diff.tensors[name].place.kind
            sums[kind] = sums.get(kind, UpdateProducts()) + products
        return {kind: products.cosine for kind, products in sums.items()}

    def summed_up(self) -> Step:
        """The same, with the sums over all tensors made now, as `ModelDiff.summed_up` makes them."""
        _ = self.diff.summed_up(), self.cosine, self.cosines_by_kind
        return self


@dataclass(frozen=True, repr=False)
class Trajectory(Displayed, Plotted):
    """The steps of a run. start: the label of the first checkpoint; steps: one for every further one."""

    start: str
    steps: tuple[Step, ...]

    def __getitem__(self, number: int) -> Step:
        return self.steps[number]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def sentence(self) -> str:
        """How far the run went, and whether its updates point the same way, in one sentence."""
        shares = [step.diff.statistics.share for step in self.steps]
        low, high = percent(min(shares, default=0.0)), percent(max(shares, default=0.0))
        share = f"{low} of all elements" if low == high else f"{low} to {high} of all elements"
        words = [f"each of {plural(len(self.steps), 'update')} changed {share}"]
        if len(self.steps) == 1:
            words = [f"1 update changed {share}"]
        cosines = [step.cosine for step in self.steps if step.cosine is not None]
        if cosines:
            words.append(
                f"successive updates have a cosine of {min(cosines):+.2f}"
                + (f" to {max(cosines):+.2f}" if len(cosines) > 1 else "")
            )
        frozen = sum(len(step.diff.frozen_moved) for step in self.steps)
        if frozen:
            words.append(f"tensors declared frozen moved {plural(frozen, 'time')}")
        elif self.steps and self.steps[0].diff.frozen:
            words.append("nothing declared frozen moved")
        return "; ".join(words)

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each tensor of each step. Raises NotSupportedError where pandas is not installed."""
        from nbmerge.comparing.frames import trajectory_frame

        return trajectory_frame(self)
