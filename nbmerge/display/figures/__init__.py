"""Figures: what `.plot()` draws of an object, by matplotlib, on light and on dark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nbmerge.comparing.model_diff import ModelDiff, TensorDiff
from nbmerge.comparing.trajectory import Trajectory
from nbmerge.display.figures import diffs, sizes, tensors, trajectories
from nbmerge.display.figures.canvas import Picture, themed
from nbmerge.display.figures.showing import show_later
from nbmerge.errors import NotSupportedError, OptionError
from nbmerge.layout import Checkpoint, LazyTensor
from nbmerge.tensor_stats import TensorStats

Draw = Callable[[Any], Picture]

_KINDS: Mapping[type, Mapping[str, Draw]] = {  # the first is drawn where none is named
    Checkpoint: {"sizes": sizes.sizes_by_module},
    LazyTensor: {"shards": tensors.shards},
    TensorStats: {"histogram": tensors.histogram},
    ModelDiff: {"heat": diffs.heat_map, "histogram": diffs.histogram_of_model},
    TensorDiff: {"histogram": diffs.histogram_of_tensor},
    Trajectory: {"steps": trajectories.steps},
}


def figure_of(shown: object, kind: str | None = None, *, theme: str | None = None) -> Picture:
    """The figure of an object; a notebook shows it when the cell is over. Reads no tensor data.

    kind: one of those that its class has; theme: `light`, `dark`, or None for matplotlib's own settings.
    Raises OptionError for another kind or theme, NotSupportedError for an object that has no figure.
    """
    kinds = next((found for known, found in _KINDS.items() if isinstance(shown, known)), None)
    if kinds is None:
        raise NotSupportedError(
            f"a {type(shown).__name__} has no figure", fix=f"plot a {', '.join(known.__name__ for known in _KINDS)}"
        )
    if kind is not None and kind not in kinds:
        raise OptionError(f"a {type(shown).__name__} has no figure {kind!r}", fix=f"one of {', '.join(kinds)}")
    with themed(theme):
        made = kinds[kind or next(iter(kinds))](shown)
    show_later(made)
    return made
