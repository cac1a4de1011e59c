"""The composable functions. Each takes what the other returns, or a path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbmerge.errors import OptionError
from nbmerge.layout import Checkpoint
from nbmerge.opening import PLAN_TIME, PathLike, listener_of, make_plan_of, merge_options, refuse_given
from nbmerge.plan import MergePlan
from nbmerge.report import MergeReport


def merge(
    checkpoint: Checkpoint | MergePlan | PathLike,
    target_dir: PathLike | None = None,
    *,
    backend: str = "auto",
    hf_model_config_path: PathLike | None = None,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    dialect: str = "hub",
    workers: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    digests: bool = False,
    is_value_model: bool = False,
    tie_word_embedding: bool = False,
    trust_remote_code: bool = False,
    trust_pickle: bool = False,
    mesh_dim_names: str | tuple[str, ...] | None = None,
    mesh_shape: str | tuple[int, ...] | None = None,
    placements: PathLike | Mapping[str, Any] | None = None,
    allow_drift: bool = False,
    base_model: PathLike | None = None,
    lora: str | None = None,
    weights: str | None = None,
    hf_upload_path: str | None = None,
    private: bool = False,
    use_cpu_initialization: bool = False,
    progress: bool | None = None,
) -> MergeReport:
    """Merges a checkpoint into a Hugging Face directory, and proves that the directory is complete.

        nbmerge.merge("global_step_100/actor", "merged")

    checkpoint: a directory, an opened checkpoint, or a plan (whose options then hold, but for target_dir,
    overwrite and dry_run). target_dir appears only when all is written and verified. The keywords are the flags
    of the command line; `nbmerge.options.MergeOptions` describes each.

    Raises NbmergeError: PlanError with all problems before anything is written, TargetError, SpaceError,
    VerificationError, and what `open_checkpoint` raises.
    """
    given = dict(locals())
    for name in ("checkpoint", "target_dir", "progress"):
        del given[name]
    options = merge_options(given)
    if isinstance(checkpoint, MergePlan):
        refuse_given(options, PLAN_TIME - {"overwrite", "dry_run"}, "a plan", "plan_merge")
    plan = checkpoint if isinstance(checkpoint, MergePlan) else make_plan_of(checkpoint, options, progress)
    return carry_out(plan, target_dir, overwrite=overwrite, dry_run=dry_run, progress=progress)


def carry_out(
    plan: MergePlan,
    target_dir: PathLike | None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool | None = None,
) -> MergeReport:
    """Writes a plan to `target_dir`, verifies it and publishes it. Raises as `merge` does."""
    from nbmerge.engine.target import check_target
    from nbmerge.merging import write_and_publish

    plan.raise_if_problems()
    if target_dir is None and not dry_run:
        raise OptionError("there is no target", fix="pass the directory to write: target_dir (--target_dir DIR)")
    target = check_target(plan, Path(target_dir), overwrite=overwrite) if target_dir is not None else None
    if dry_run or target is None:
        return MergeReport(plan)
    with listener_of(progress) as listen:
        return write_and_publish(plan, target, listen)
