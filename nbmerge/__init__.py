"""Merge sharded training checkpoints into Hugging Face directories, from a notebook, with proof.

    import nbmerge
    ckpt = nbmerge.open_checkpoint("global_step_100/actor")   # how is it sharded?
    plan = nbmerge.plan_merge(ckpt)                           # what would be written?
    report = nbmerge.merge(plan, "merged")                    # write it, and prove it

Importing this costs no torch, transformers or matplotlib.
"""

from __future__ import annotations

from nbmerge.api import merge, open_checkpoint, plan_merge
from nbmerge.errors import (
    AmbiguousCheckpointError,
    CheckpointError,
    ConfigError,
    CorruptFileError,
    IncompleteCheckpointError,
    InconsistentCheckpointError,
    NbmergeError,
    NotACheckpointError,
    OptionError,
    PlanError,
    Problem,
    SpaceError,
    TargetError,
    UnsafePickleError,
    UnsupportedCheckpointError,
    VerificationError,
)
from nbmerge.layout import Checkpoint, Chunk, LazyTensor
from nbmerge.plan import MergePlan
from nbmerge.report import MergeReport

__version__ = "0.1.0"

__all__ = [
    "AmbiguousCheckpointError",
    "Checkpoint",
    "CheckpointError",
    "Chunk",
    "ConfigError",
    "CorruptFileError",
    "IncompleteCheckpointError",
    "InconsistentCheckpointError",
    "LazyTensor",
    "MergePlan",
    "MergeReport",
    "NbmergeError",
    "NotACheckpointError",
    "OptionError",
    "PlanError",
    "Problem",
    "SpaceError",
    "TargetError",
    "UnsafePickleError",
    "UnsupportedCheckpointError",
    "VerificationError",
    "merge",
    "open_checkpoint",
    "plan_merge",
]
