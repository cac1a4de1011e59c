"""Carries a checked plan out: write, compare, copy what lies beside the weights, verify, publish."""

from __future__ import annotations

import shutil
from pathlib import Path

from nbmerge.engine.events import Listener
from nbmerge.engine.execute import Outcome, write_files
from nbmerge.engine.publish import (
    copy_synced,
    discard,
    full_disk,
    publish,
    workspace,
    write_synced,
)
from nbmerge.engine.target import Target
from nbmerge.errors import (
    CorruptFileError,
    InconsistentCheckpointError,
    TargetError,
    VerificationError,
    listing,
)
from nbmerge.plan import MergePlan
from nbmerge.receipt import RECEIPT_NAME, encoded, receipt, sha256_of
from nbmerge.report import MergeReport
from nbmerge.verification import Verification, verify


def write_and_publish(plan: MergePlan, target: Target, listener: Listener) -> MergeReport:
    """The target, written in its sibling and renamed when it is whole and proved.

    Raises SpaceError, CorruptFileError, InconsistentCheckpointError or VerificationError; then nothing stands
    under the target's name that did not stand there before.
    """
    try:
        with workspace(target) as directory:
            _remove_strays(plan, directory)
            try:
                outcome, verification = _write(plan, directory, listener)
            except (CorruptFileError, InconsistentCheckpointError, VerificationError):
                discard(target)  # what was written of it cannot be trusted
                raise
            digests = {f.name: sha256_of(directory / f.name) for f in plan.weight_files} if plan.options.digests else {}
            drift = (*plan.drift, *outcome.drift)
            content = receipt(plan, digests, drift)
            write_synced(directory / RECEIPT_NAME, encoded(content))
            publish(target)
    except OSError as error:
        if full := full_disk(error, target):
            raise full from error
        if isinstance(error, PermissionError):
            raise TargetError(
                f"permission denied: {error.filename}", where=str(target.path),
                fix="choose another directory, or change its permissions",
            ) from error  # fmt: skip
        raise
    return MergeReport(
        plan=plan,
        target=target.given,
        seconds=outcome.seconds,
        written_bytes=outcome.written_bytes,
        reused=outcome.reused,
        drift=drift,
        verification=verification,
        receipt=content,
    )


def _write(plan: MergePlan, directory: Path, listener: Listener) -> tuple[Outcome, Verification]:
    """All files of the result but the receipt, and the proof that they are what was planned."""
    _refuse_changed_sources(plan)
    outcome = write_files(plan, directory, listener)
    _refuse_changed_sources(plan)
    _write_side_files(plan, directory)
    return outcome, verify(plan, directory)


def _remove_strays(plan: MergePlan, directory: Path) -> None:
    """What an interrupted run left that is no whole file of this plan."""
    wanted = {directory / file.name for file in plan.weight_files}
    for child in [*directory.glob("*/*"), *directory.iterdir()]:
        if child.is_dir() and not any(child in path.parents for path in wanted):
            shutil.rmtree(child)
        elif not child.is_dir() and child not in wanted:
            child.unlink(missing_ok=True)


def _refuse_changed_sources(plan: MergePlan) -> None:
    changed = [file.path for file in plan.sources if file.has_changed()]
    if changed:
        base = {file.path for file in plan.base_files}
        whose, where = (
            ("base model", changed[0].parent) if base >= set(changed) else ("checkpoint", plan.checkpoint.path)
        )
        raise InconsistentCheckpointError(
            f"the {whose} changed since it was opened: {listing(path.name for path in changed)}",
            where=str(where),
            why="training, or a copy, still writes to it",
            fix="open and merge it again when that is finished",
        )


def _write_side_files(plan: MergePlan, directory: Path) -> None:
    """Config, tokenizer and the like; the index last, so that a directory with an index is whole."""
    for file in sorted(plan.side_files, key=lambda file: file.name.endswith(".index.json")):
        path = directory / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.content is not None:
            write_synced(path, file.content)
        elif file.source is not None:
            copy_synced(file.source.path, path)
