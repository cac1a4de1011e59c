"""Merge sharded training checkpoints into Hugging Face directories, from a notebook, with proof.

    import nbmerge
    ckpt = nbmerge.open_checkpoint("global_step_100/actor")   # how is it sharded?
    plan = nbmerge.plan_merge(ckpt)                           # what would be written?
    report = nbmerge.merge(plan, "merged")                    # write it
    nbmerge.validate(report).raise_if_failed()                # prove it, every element against the shards
    nbmerge.diff("Qwen3-8B", ckpt)                            # what did training change, and where?
    nbmerge.average([ckpt, other], "averaged")                # the mean of several checkpoints of one model
    nbmerge.push_to_hub(report, "me/my-model")                # publish it
    nbmerge.explain(error)                                    # why do the shapes not match?

Importing this costs next to nothing: what a name needs is imported when it is first used, and torch, transformers
and matplotlib only by what computes, reads a config or draws.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from nbmerge.errors import (
    AmbiguousCheckpointError,
    CheckpointError,
    ConfigError,
    CorruptFileError,
    HubError,
    IncompleteCheckpointError,
    InconsistentCheckpointError,
    NbmergeError,
    NotACheckpointError,
    NotSupportedError,
    OptionError,
    PlanError,
    Problem,
    SpaceError,
    TargetError,
    UnsafePickleError,
    UnsupportedCheckpointError,
    VerificationError,
)

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbmerge.api import average, diff, merge, trajectory, validate
    from nbmerge.comparing.model_diff import ModelDiff, TensorDiff
    from nbmerge.comparing.trajectory import Trajectory
    from nbmerge.explainer import explain
    from nbmerge.explaining.explanation import Explanation
    from nbmerge.export.hub import PushReport, push_to_hub
    from nbmerge.layout import Checkpoint, Chunk, LazyTensor
    from nbmerge.loaders import register_loader
    from nbmerge.loaders.base import Loader, OpenOptions
    from nbmerge.mergers import BaseModelMerger, FSDPModelMerger, MegatronModelMerger, ModelMergerConfig
    from nbmerge.opening import open_checkpoint, plan_merge
    from nbmerge.plan import MergePlan
    from nbmerge.report import MergeReport
    from nbmerge.runs import Run, inspect
    from nbmerge.tracing import Location, where
    from nbmerge.validation.report import ValidationReport
    from nbmerge.validator import Validator

__version__ = "0.1.0"

__all__ = [
    "AmbiguousCheckpointError",
    "BaseModelMerger",
    "Checkpoint",
    "CheckpointError",
    "Chunk",
    "ConfigError",
    "CorruptFileError",
    "Explanation",
    "FSDPModelMerger",
    "HubError",
    "IncompleteCheckpointError",
    "InconsistentCheckpointError",
    "LazyTensor",
    "Loader",
    "Location",
    "MegatronModelMerger",
    "MergePlan",
    "MergeReport",
    "ModelDiff",
    "ModelMergerConfig",
    "NbmergeError",
    "NotACheckpointError",
    "NotSupportedError",
    "OpenOptions",
    "OptionError",
    "PlanError",
    "Problem",
    "PushReport",
    "Run",
    "SpaceError",
    "TargetError",
    "TensorDiff",
    "Trajectory",
    "UnsafePickleError",
    "UnsupportedCheckpointError",
    "ValidationReport",
    "Validator",
    "VerificationError",
    "average",
    "diff",
    "explain",
    "inspect",
    "load_ipython_extension",
    "merge",
    "open_checkpoint",
    "plan_merge",
    "push_to_hub",
    "register_loader",
    "trajectory",
    "validate",
    "where",
]

_HOMES = {
    "nbmerge.api": "average diff merge trajectory validate",
    "nbmerge.comparing.model_diff": "ModelDiff TensorDiff",
    "nbmerge.comparing.trajectory": "Trajectory",
    "nbmerge.explainer": "explain",
    "nbmerge.explaining.explanation": "Explanation",
    "nbmerge.export.hub": "PushReport push_to_hub",
    "nbmerge.layout": "Checkpoint Chunk LazyTensor",
    "nbmerge.loaders": "register_loader",
    "nbmerge.loaders.base": "Loader OpenOptions",
    "nbmerge.mergers": "BaseModelMerger FSDPModelMerger MegatronModelMerger ModelMergerConfig",
    "nbmerge.opening": "open_checkpoint plan_merge",
    "nbmerge.plan": "MergePlan",
    "nbmerge.report": "MergeReport",
    "nbmerge.runs": "Run inspect",
    "nbmerge.tracing": "Location where",
    "nbmerge.validation.report": "ValidationReport",
    "nbmerge.validator": "Validator",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """A public name at its first use (PEP 562); from then on it is an ordinary attribute."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'nbmerge' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(shell: InteractiveShell) -> None:
    """`%load_ext nbmerge`: the magics, of which `%nbmerge` lists all."""
    from nbmerge.magics import register

    register(shell)
