"""The plan whose result a directory should be: from its receipt, or the one that would be made now."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nbmerge.errors import CheckpointError, ConfigError, NbmergeError, NotACheckpointError, listing, one_line
from nbmerge.layout import Checkpoint
from nbmerge.loaders.reading import is_file
from nbmerge.naming.facts import ModelFacts
from nbmerge.opening import PathLike, base_config_dir, open_checkpoint, plan_merge
from nbmerge.options import OPEN_ONLY, OPEN_OPTIONS, MergeOptions, expanded_path
from nbmerge.plan import MergePlan
from nbmerge.validation.findings import WARNING, Finding
from nbmerge.validation.subject import Subject
from nbmerge.weights import Source

# What shapes the result; the rest of a receipt's options is about that run, or is for who validates to say.
_KEPT = {
    item.name: bool
    if isinstance(item.default, bool)
    else {"placements": (str, dict), "lora_alpha": (int, float)}.get(item.name, str)
    for item in fields(MergeOptions)
    if item.metadata["shapes"] or item.name in ("backend", "hf_model_config_path")
}


@dataclass(frozen=True)
class Planned:
    """plan: what a merge of the checkpoint gives; findings: what had to be assumed; said: how it was known."""

    plan: MergePlan
    findings: tuple[Finding, ...] = ()
    said: str = ""


def plan_of(
    subject: Subject,
    checkpoint: PathLike | Sequence[Source] | Checkpoint | MergePlan,
    given: Mapping[str, Any],
    progress: bool | None,
) -> Planned:
    """The plan. given: trust_pickle, trust_remote_code and workers, as who validates has them.

    Raises what opening and planning raise, and PlanError for a plan with problems; NotACheckpointError only for the
    path that the caller gave, never for one that the receipt names.
    """
    from nbmerge.averaging import average_of, result_options

    if isinstance(checkpoint, MergePlan):
        checkpoint.raise_if_problems()
        return Planned(checkpoint, said="the plan that was passed")
    options = _options_of(subject)
    if not isinstance(checkpoint, Checkpoint):
        weights = _refuse_other_number(subject, checkpoint)
        opening = {name: value for name, value in options.items() if name in OPEN_OPTIONS}
        opening |= given
        if isinstance(checkpoint, (str, os.PathLike)):
            checkpoint = _opened(checkpoint, opening, progress)
        else:
            checkpoint = average_of(checkpoint, weights, {**options, **given}, progress=progress)
    options = {name: value for name, value in options.items() if name not in OPEN_ONLY}
    options = result_options(options) if checkpoint.averaged else options
    if "hf_model_config_path" not in options and checkpoint.config_dir is None:
        has_base = checkpoint.is_adapter and base_config_dir(options.get("base_model")) is not None
        options |= {} if has_base else {"hf_model_config_path": str(subject.directory)}
    options |= {name: value for name, value in given.items() if name not in OPEN_ONLY}
    findings: tuple[Finding, ...] = ()
    said = "merged as its receipt says"
    if subject.receipt is None:
        said = "merged with the default options, for want of a receipt"
        options |= _dialect(subject)
    plan = _planned(checkpoint, options)
    if subject.receipt is None and (assumed := _dtype(subject, plan)):
        said = f"merged with dtype={assumed}, for want of a receipt"
        findings = (_unrecorded(assumed),)
        plan = _planned(checkpoint, {**options, "dtype": assumed})
    plan.raise_if_problems()
    return Planned(plan, findings, said)


def _refuse_other_number(subject: Subject, checkpoint: PathLike | Sequence[Source]) -> list[float] | None:
    """The weights of the average that the directory is, by its receipt; None where it says nothing of one.

    Raises CheckpointError where it is the mean of another number of checkpoints than were passed.
    """
    source = (subject.receipt or {}).get("source")
    averaged = source.get("averaged") if isinstance(source, dict) else None
    entries = [each for each in averaged if isinstance(each, dict)] if isinstance(averaged, list) else []
    passed = len(checkpoint) if isinstance(checkpoint, (list, tuple)) else 1
    if entries and passed != len(entries):
        raise CheckpointError(
            f"the directory is the average of {len(entries)} checkpoints, and {passed} passed",
            where=str(subject.directory),
            fix=f"checkpoint=[{listing(repr(each.get('path')) for each in entries)}]",
        )
    weights = [each.get("weight") for each in entries]
    return [float(weight) for weight in weights if isinstance(weight, (int, float))] if weights else None


def _opened(path: PathLike, options: Mapping[str, Any], progress: bool | None) -> Checkpoint:
    """The checkpoint. Raises CheckpointError where it is there, and not of the back end that the receipt names."""
    try:
        return open_checkpoint(path, progress=progress, **options)
    except NotACheckpointError as error:
        backend = options.get("backend", "auto")
        if backend == "auto" or not expanded_path(os.fspath(path)).is_dir():
            raise
        raise _as(CheckpointError, error, f"the receipt names the back end {backend!r}") from error


def _planned(checkpoint: Checkpoint, options: Mapping[str, Any]) -> MergePlan:
    """The plan. Raises ConfigError for a base model that is not there: the receipt names it, not the caller."""
    try:
        return plan_merge(checkpoint, **options)
    except NotACheckpointError as error:
        raise _as(ConfigError, error, "the receipt in the directory names it") from error


def _as(kind: type[NbmergeError], error: NbmergeError, why: str) -> NbmergeError:
    problem = error.problem
    return kind(problem.what, where=problem.where, why=why, fix=problem.fix)


def _options_of(subject: Subject) -> dict[str, Any]:
    """The options of the merge that wrote the directory, with the config where it is now. Raises OptionError."""
    receipt = subject.receipt or {}
    recorded = receipt.get("options")
    given = recorded.items() if isinstance(recorded, dict) else ()
    options: dict[str, Any] = {name: value for name, value in given if isinstance(value, _KEPT.get(name, ()))}
    path = options.get("hf_model_config_path")
    if path is not None and not is_file(expanded_path(str(path)) / "config.json"):
        options["hf_model_config_path"] = str(_recorded_config(receipt) or subject.directory)
    return options


def _recorded_config(receipt: Mapping[str, Any]) -> Path | None:
    """Where the merge found config.json, by its absolute path, if it is there still."""
    source = receipt.get("source")
    recorded = source.get("config_dir") if isinstance(source, dict) else None
    return Path(recorded) if isinstance(recorded, str) and is_file(Path(recorded) / "config.json") else None


def _dialect(subject: Subject) -> dict[str, str]:
    """The dialect of a directory without a receipt, where its names are those in memory."""
    facts = subject.facts
    if not isinstance(facts, ModelFacts):
        return {}
    written = {name for name in facts.memory if name not in facts.tied}
    in_memory, on_hub = (len(subject.entries.keys() & names) for names in (written, facts.published.keys()))
    return {"dialect": "transformers"} if in_memory > on_hub else {}


def _dtype(subject: Subject, plan: MergePlan) -> str | None:
    """The dtype that another tool cast all floating weights to; None where they are as stored."""
    written = {entry.dtype for _, entry in subject.entries.values() if entry.dtype.is_floating}
    if len(written) != 1:
        return None
    (dtype,) = written
    stored = {tensor.expr.dtype for tensor in plan.tensors.values() if tensor.expr.dtype.is_floating}
    return dtype.name if stored and stored != written else None


def _unrecorded(dtype: str) -> Finding:
    return Finding(
        "was cast, and nothing says so",
        "every floating tensor",
        f"{dtype} here; the checkpoint's are compared after the same cast",
        why="the tool that wrote the directory leaves no receipt",
        fix="merge with nbmerge, which keeps the dtype or records the cast",
        severity=WARNING,
    )


def as_finding(error: Exception, what: str) -> Finding:
    """An error as a finding: what a check could not do."""
    if not isinstance(error, NbmergeError):
        return Finding(
            what, "", one_line(f"{type(error).__name__}: {error}"),
            why="no one foresaw what is there, or the machine refused to read it",
            fix="look at what it names; if that is as it should be, report it",
        )  # fmt: skip
    problems = error.problems
    more = f" (and {len(problems) - 1:,} more)" if problems[1:] else ""
    first = problems[0]
    text = error.problem.what if first == error.problem else f"{error.problem.what}: {first.what}{more}"
    return Finding(what, "", f"{text} ({first.where})" if first.where else text, why=first.why, fix=first.fix)
