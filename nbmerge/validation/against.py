"""Pairs the tensors of a model with those of the checkpoint or of the reference that they are compared with."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from nbmerge.errors import NbmergeError
from nbmerge.expressions import Expr, Stored, input_names
from nbmerge.loaders.hf import stored_tensors
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.lora.facts import ADAPTER_DIRECTORY
from nbmerge.naming.published import as_installed, by_published_name
from nbmerge.opening import PathLike
from nbmerge.options import expanded_path
from nbmerge.plan import MergePlan
from nbmerge.validation.findings import Finding, Outcome
from nbmerge.validation.on_disk import unreadable
from nbmerge.validation.values import Close, SameBits, look_through
from nbmerge.weights import Weights

TOLERANCE = 1e-6  # verl's, absolute and relative


def against_plan(ours: Mapping[str, Expr], plan: MergePlan, facts: ModelFacts | None = None) -> SameBits:
    """The comparison with what the plan would write, bit by bit. What either has alone is among its findings.

    A tied name that the directory has is compared with the tensor that the plan writes for both.
    """
    theirs = {name: tensor.expr for name, tensor in plan.tensors.items()}
    theirs |= {f"{ADAPTER_DIRECTORY}/{each.name}": each.expr for file in plan.adapter_files for each in file.tensors}
    tied = {tie.name: tie.kept for tie in plan.ties}
    if facts is not None:
        tied = {**facts.tied, **facts.tied_on_hub, **tied}
    copies = {alias: kept for alias, kept in tied.items() if alias in ours and alias not in theirs and kept in theirs}
    stood_for = {kept for kept in copies.values() if kept not in ours}
    theirs |= {alias: theirs[kept] for alias, kept in copies.items()}
    comparator = SameBits({name: expr for name, expr in theirs.items() if name not in stood_for})
    comparator.findings += _alone(
        (name for name in comparator.tensors if name not in ours),
        "is in the checkpoint, and not in the directory",
        why="the tensor was lost, or the directory is of another merge",
        fix="merge the checkpoint again",
    )
    comparator.findings += _alone(
        (name for name in ours if name not in comparator.tensors),
        "is in the directory, and no tensor of the checkpoint becomes it",
        why="the directory is of another model, or a tool added the tensor",
        fix="pass the checkpoint that it was merged from, or merge again",
    )
    return comparator


def against_reference(
    ours: Mapping[str, Expr], reference: Weights, facts: ModelFacts | None, *, atol: float, rtol: float
) -> Close:
    """The comparison with a reference model, within tolerances. Its tensors may have in-memory or published names."""
    held = as_installed(reference.tensors, facts) if facts is not None else dict(reference.tensors)
    theirs = held
    if facts is not None and not ours.keys() <= held.keys():
        theirs = by_published_name(held, facts)
    comparator = Close(theirs, atol, rtol)
    if facts is not None:  # a reference may hold both of what is tied
        tied = {**facts.tied, **facts.tied_on_hub}
        comparator.stand_ins = {a: b for a, b in tied.items() if a in theirs and a not in ours and b in ours}
    comparator.findings += _alone(
        (name for name in ours if name not in theirs),
        "is not in the reference",
        why="the reference is another model, or was saved without it",
        fix="pass the reference of this model",
    )
    taken = {*ours, *comparator.stand_ins, *(_parts(ours, held, facts) if facts is not None else ())}
    comparator.findings += _alone(
        (name for name in held if name not in taken),
        "is in the reference only",
        why="the merged model lacks it, or the reference is another model",
        fix="pass the reference of this model, or merge again",
    )
    return comparator


def _parts(ours: Mapping[str, Expr], theirs: Mapping[str, Expr], facts: ModelFacts) -> set[str]:
    """The reference's own names for what it holds under in-memory names."""
    rules = (rule for name, rule in facts.published.items() if name in ours and name not in theirs)
    return {name for rule in rules for name in input_names(rule)}


def compare_unmerged(
    plan: MergePlan, reference: PathLike, *, atol: float = TOLERANCE, rtol: float = TOLERANCE
) -> Outcome:
    """What a merge would write against a reference directory, within tolerances, without writing it.

    As verl's `test`, whose tolerances these are. Raises NotACheckpointError where there is no such directory, and
    PlanError for a plan with problems.
    """
    plan.raise_if_problems()
    ours = {name: tensor.expr for name, tensor in plan.tensors.items()}
    directory = expanded_path(os.fspath(reference))
    theirs = Weights(str(directory), _stored(directory), "directory")
    facts = plan.model.facts if plan.model is not None else None
    comparator = against_reference(ours, theirs, facts, atol=atol, rtol=rtol)
    scanned = look_through(ours, [comparator], workers=plan.execution.workers)
    return comparator.outcome(list(ours), scanned, theirs.label)


def _stored(directory: Path) -> dict[str, Stored]:
    try:
        return stored_tensors(directory, "--test_hf_dir DIR")
    except NbmergeError:
        raise
    except OSError as error:
        raise unreadable(directory, error) from error


def _alone(names: Iterable[str], what: str, *, why: str, fix: str) -> list[Finding]:
    return [Finding(what, name, why=why, fix=fix) for name in names]
