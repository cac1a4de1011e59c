"""The tensors of whatever a user points at: a Hugging Face directory, a checkpoint, a plan, or a merge's report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nbmerge.errors import OptionError
from nbmerge.expressions import Expr
from nbmerge.layout import Checkpoint
from nbmerge.loaders.hf import holds_whole_tensors, lone_adapter, stored_tensors
from nbmerge.naming.model import HFModel
from nbmerge.naming.prefixes import stripped_names
from nbmerge.opening import PathLike, open_checkpoint, plan_merge
from nbmerge.options import OPEN_ONLY, OPEN_OPTIONS, expanded_path
from nbmerge.plan import MergePlan
from nbmerge.report import MergeReport

Source = PathLike | Checkpoint | MergePlan | MergeReport


@dataclass(frozen=True)
class Weights:
    """A model's tensors, wherever they are. Holds no data.

    label: what the user pointed at; tensors: by published name, where a config tells it, else by the names that the
    files have; kind: `directory` (of safetensors files) or `checkpoint`; config_dir: where config.json is.
    """

    label: str
    tensors: Mapping[str, Expr]
    kind: str
    config_dir: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def model(self) -> HFModel | None:
        """The model of the config; None where there is no config."""
        return HFModel(self.config_dir) if self.config_dir is not None else None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(expr.nbytes for expr in self.tensors.values())


def weights_of(source: Source, *, progress: bool | None = None, **options: Any) -> Weights:
    """The tensors of a source. options: keywords of `nbmerge.merge` that open and plan a checkpoint.

    A checkpoint's tensors are those that a merge would write; without a config, those that it holds.
    Raises NotACheckpointError, CheckpointError, and PlanError for a checkpoint that cannot be merged.
    """
    if isinstance(source, MergeReport):
        return weights_of(source.target if source.target is not None else source.plan)
    if isinstance(source, (str, os.PathLike)):
        path = expanded_path(os.fspath(source))
        if is_model_directory(path, options):
            return _of_directory(path, trust_pickle=bool(options.get("trust_pickle")))
        opening = {name: value for name, value in options.items() if name in OPEN_OPTIONS}
        source = open_checkpoint(path, progress=progress, **opening)
        options = {name: value for name, value in options.items() if name not in OPEN_ONLY}
    if isinstance(source, Checkpoint):
        return _of_checkpoint(source, options, progress)
    if isinstance(source, MergePlan):
        return _of_plan(source)
    raise OptionError(
        f"a {type(source).__name__} is no model", fix="pass a directory, an opened checkpoint, a plan or a report"
    )


def is_model_directory(path: Path, options: Mapping[str, Any] | None = None) -> bool:
    """Whether the directory's whole tensors are taken as they are: a model's, or those of an adapter alone.

    options: what is asked of adapters; an adapter of which anything is asked is a checkpoint to be planned.
    """
    return holds_whole_tensors(path) and not ((options or {}).get("lora") and lone_adapter(path) is not None)


def _of_directory(path: Path, *, trust_pickle: bool) -> Weights:
    config = path if (path / "config.json").is_file() else None
    tensors = stored_tensors(path, "a directory of safetensors or .bin files", trust_pickle=trust_pickle)
    return Weights(str(path), tensors, "directory", config)


def _of_plan(plan: MergePlan) -> Weights:
    plan.raise_if_problems()
    tensors = {name: tensor.expr for name, tensor in plan.tensors.items()}
    return Weights(str(plan.checkpoint.path), tensors, "checkpoint", plan.config_dir, plan.options.given())


def _of_checkpoint(checkpoint: Checkpoint, options: Mapping[str, Any], progress: bool | None) -> Weights:
    is_asked = checkpoint.is_adapter and options.get("lora") is not None
    if checkpoint.config_dir is not None or options.get("hf_model_config_path") or is_asked:
        return _of_plan(plan_merge(checkpoint, progress=progress, **options))
    names, _ = stripped_names(checkpoint.tensors, set())
    tensors = {new: checkpoint.tensors[old].expr for new, old in names.items()}
    return Weights(str(checkpoint.path), tensors, "checkpoint")
