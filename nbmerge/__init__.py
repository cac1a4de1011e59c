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

Importing this costs no torch, transformers or matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbmerge.api import average, diff, merge, trajectory, validate
from nbmerge.comparing.model_diff import ModelDiff, TensorDiff
from nbmerge.comparing.trajectory import Trajectory
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
from nbmerge.explainer import explain
from nbmerge.explaining.explanation import Explanation
from nbmerge.export.hub import PushReport, push_to_hub
from nbmerge.layout import Checkpoint, Chunk, LazyTensor
from nbmerge.mergers import BaseModelMerger, FSDPModelMerger, MegatronModelMerger, ModelMergerConfig
from nbmerge.opening import open_checkpoint, plan_merge
from nbmerge.plan import MergePlan
from nbmerge.report import MergeReport
from nbmerge.runs import Run, inspect
from nbmerge.tracing import Location, where
from nbmerge.validation.report import ValidationReport
from nbmerge.validator import Validator

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

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
    "Location",
    "MegatronModelMerger",
    "MergePlan",
    "MergeReport",
    "ModelDiff",
    "ModelMergerConfig",
    "NbmergeError",
    "NotACheckpointError",
    "NotSupportedError",
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
    "trajectory",
    "validate",
    "where",
]


def load_ipython_extension(shell: InteractiveShell) -> None:
    """`%load_ext nbmerge`: the magics, of which `%nbmerge` lists all."""
    from nbmerge.magics import register

    register(shell)
