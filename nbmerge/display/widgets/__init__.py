"""Explorers: what `.explore()` shows of an object, by ipywidgets, with a static twin for where no kernel runs."""

from __future__ import annotations

from nbmerge.comparing.model_diff import ModelDiff
from nbmerge.display.widgets.checkpoint import CheckpointExplorer
from nbmerge.display.widgets.diff import DiffExplorer
from nbmerge.display.widgets.explorer import Explorer
from nbmerge.errors import NotSupportedError
from nbmerge.layout import Checkpoint


def explorer_of(shown: object) -> Explorer:
    """The explorer of an object. Reads no tensor data. Raises NotSupportedError for an object that has none."""
    if isinstance(shown, Checkpoint):
        return CheckpointExplorer(shown)
    if isinstance(shown, ModelDiff):
        return DiffExplorer(shown)
    raise NotSupportedError(f"a {type(shown).__name__} has no explorer", fix="explore a Checkpoint or a ModelDiff")
