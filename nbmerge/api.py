"""The composable functions. Each takes what the other returns, or a path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbmerge.errors import OptionError
from nbmerge.layout import Checkpoint
from nbmerge.opening import PLAN_TIME, PathLike, listener_of, make_plan_of, merge_options, refuse_given
from nbmerge.options import OPEN_ONLY
from nbmerge.plan import MergePlan
from nbmerge.report import MergeReport

if TYPE_CHECKING:
    from nbmerge.comparing.model_diff import ModelDiff
    from nbmerge.comparing.trajectory import Trajectory
    from nbmerge.validation.report import ValidationReport
    from nbmerge.weights import Source


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
    lora_alpha: float | None = None,
    lora_config: PathLike | None = None,
    fold_precision: str = "exact",
    weights: str | None = None,
    hf_upload_path: str | None = None,
    private: bool = False,
    use_cpu_initialization: bool = False,
    progress: bool | None = None,
) -> MergeReport:
    """Merges a checkpoint into a Hugging Face directory, and proves that the directory is complete.

        nbmerge.merge("global_step_100/actor", "merged")

    checkpoint: a directory, an opened checkpoint, or a plan (whose options then hold, but for target_dir, overwrite,
    dry_run and the upload). target_dir appears only when all is written and verified. hf_upload_path: a repository of
    the Hub that the result is uploaded to, as by `push_to_hub`; whether that can work is asked before anything is
    read. The keywords are the flags of the command line; `nbmerge.options.MergeOptions` describes each.

    Raises NbmergeError: PlanError with all problems before anything is written, TargetError, SpaceError,
    VerificationError, HubError, and what `open_checkpoint` raises.
    """
    given = dict(locals())
    for name in ("checkpoint", "target_dir", "progress"):
        del given[name]
    options = merge_options(given)
    if isinstance(checkpoint, MergePlan):
        refuse_given(options, PLAN_TIME - _AT_LAST, "a plan", "plan_merge")
        hf_upload_path = hf_upload_path or checkpoint.options.hf_upload_path
        private = private or checkpoint.options.private
    refuse_hopeless_upload(hf_upload_path, private=private)
    plan = checkpoint if isinstance(checkpoint, MergePlan) else make_plan_of(checkpoint, options, progress)
    report = carry_out(plan, target_dir, overwrite=overwrite, dry_run=dry_run, progress=progress)
    return uploaded(report, hf_upload_path, private=private, progress=progress)


_AT_LAST = {"overwrite", "dry_run", "hf_upload_path", "private"}  # what may be said when the plan is made


def refuse_hopeless_upload(repo_id: str | None, *, private: bool) -> None:
    """Raises HubError where an upload to the repository cannot work. None asks for no upload."""
    if repo_id is not None:
        from nbmerge.export.access import check_access, is_left_to_rank_0

        if not is_left_to_rank_0():
            check_access(repo_id, private=private)


def uploaded(report: MergeReport, repo_id: str | None, *, private: bool, progress: bool | None) -> MergeReport:
    """The report after an upload to the repository, if one is asked for and the merge was no dry run."""
    if repo_id is None or report.target is None:
        return report
    from nbmerge.export.hub import push_merged

    return replace(report, pushed=push_merged(report, repo_id, private=private, progress=progress))


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


def validate(
    model_dir: PathLike | MergeReport,
    *,
    checkpoint: Checkpoint | MergePlan | MergeReport | PathLike | Sequence[Source] | None = None,
    reference: Source | None = None,
    checks: str | Sequence[str] = (),
    sample: float = 1.0,
    atol: float = 1e-6,
    rtol: float = 1e-6,
    no_run: bool = False,
    trust_remote_code: bool = False,
    trust_pickle: bool = False,
    workers: int | None = None,
    progress: bool | None = None,
) -> ValidationReport:
    """Proves a Hugging Face directory: its files, its tensors, their values, and that it runs.

        nbmerge.validate("merged", checkpoint="global_step_100/actor").raise_if_failed()

    model_dir: a directory, or a merge's report, whose checkpoint is then taken. checkpoint: every element is compared
    with the shards, bit for bit, after the casts that the receipt in the directory records; without a receipt, with
    the merge that would be made now. reference: a model to be close to, |a - b| ≤ atol + rtol · |b|. sample: a share
    of the elements, for a very large model; the report says what was sampled. no_run: do not load it in transformers.

    All checks are run, and all that they find is in the report: `.ok`, `.raise_if_failed()`, `.to_dataframe()`.
    Raises NotACheckpointError where one of the directories is not there, OptionError.
    """
    from nbmerge.validator import Validator

    validator = Validator(
        model_dir, checkpoint, reference, checks=checks, sample=sample, atol=atol, rtol=rtol, no_run=no_run,
        trust_remote_code=trust_remote_code, trust_pickle=trust_pickle, workers=workers,
    )  # fmt: skip
    return validator.validate(progress=progress)


def average(
    checkpoints: Sequence[Source],
    target_dir: PathLike | None = None,
    *,
    weights: Sequence[float] | None = None,
    progress: bool | None = None,
    **options: Any,
) -> MergeReport:
    """Merges the mean of several checkpoints of one model into a Hugging Face directory, in one pass over them all.

        nbmerge.average(["global_step_80/actor", "global_step_100/actor"], "averaged", weights=[1, 3])

    checkpoints: what `diff` takes. weights: one for each, of which the proportions count; equal ones by default. Each
    element is Σ wᵢ·xᵢ / Σ wᵢ in float32, rounded once: to the stored dtype, or to `dtype`. Integers must be equal in
    all. options: the keywords of `nbmerge.merge`; adapters are folded (lora="fold") into each checkpoint before. To
    prove the result: `validate(target_dir, checkpoint=checkpoints)`.

    Raises as `merge` does, and InconsistentCheckpointError with all in which the checkpoints are not of one model.
    """
    from nbmerge.averaging import averaged_checkpoint, result_options
    from nbmerge.averaging_sources import names_paths

    asked = merge_options(options)  # before anything is read
    if not names_paths(checkpoints):
        refuse_given(asked, OPEN_ONLY, "opened checkpoints", "open_checkpoint")
    refuse_hopeless_upload(asked.hf_upload_path, private=asked.private)
    mean = averaged_checkpoint(checkpoints, weights, progress=progress, **options)
    plan = make_plan_of(mean, merge_options(result_options(options)), progress)
    report = carry_out(plan, target_dir, overwrite=asked.overwrite, dry_run=asked.dry_run, progress=progress)
    return uploaded(report, asked.hf_upload_path, private=asked.private, progress=progress)


def diff(
    a: Source,
    b: Source,
    *,
    frozen: str | Sequence[str] = (),
    rank_one: bool = False,
    sample: float = 1.0,
    workers: int | None = None,
    progress: bool | None = None,
    **options: Any,
) -> ModelDiff:
    """How the weights of `a` became those of `b`: which elements changed, by how much, and where.

        nbmerge.diff("Qwen3-8B", "global_step_100/actor", frozen="*.embed_tokens.*")

    a, b: a Hugging Face directory, a checkpoint's directory or an opened checkpoint (it need not be merged), a plan,
    or a merge's report. frozen: patterns of names that must not have changed; one that did is an alarm. rank_one: for
    each matrix that changed, also the share of its update that is one outer product (further passes). sample: a share
    of the elements, for very large models. options: the keywords of `nbmerge.merge` that open and plan a checkpoint.

    Streams both, on threads; memory does not grow with the models. Raises OptionError, and what opening raises.
    """
    from nbmerge.comparing.differ import check_options, diff_weights
    from nbmerge.comparing.sources import both_weights

    check_options(sample=sample, rank_one=rank_one, workers=workers)
    one, other = both_weights(a, b, progress=progress, **options)
    with listener_of(progress) as listen:
        return diff_weights(
            one, other, frozen=frozen, rank_one=rank_one, sample=sample, workers=workers, listener=listen
        )


def trajectory(
    run: PathLike | Sequence[Source],
    *,
    frozen: str | Sequence[str] = (),
    sample: float = 1.0,
    workers: int | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Trajectory:
    """How the weights changed along the steps of a run, and whether successive updates point the same way.

        nbmerge.trajectory("checkpoints/my_run")     # its global_step_N, or global_step_N/actor, in order

    run: a run's directory, or a list of what `diff` takes, in the order of the steps. frozen, sample, options: as for
    `diff`. Raises NotACheckpointError for a directory with fewer than two steps, OptionError, and what opening raises.
    """
    from nbmerge.comparing.running import trajectory_of
    from nbmerge.comparing.sources import run_weights

    with listener_of(progress) as listen:
        models = run_weights(run, progress=progress, **options)
        return trajectory_of(models, frozen=frozen, sample=sample, workers=workers, listener=listen)
