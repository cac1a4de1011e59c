"""Applies a family's table to the tensors of a Megatron checkpoint: published names, and what became of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nbmerge import expressions as ex
from nbmerge.errors import Problem
from nbmerge.explaining.alike import alike
from nbmerge.explaining.candidates import Mismatch
from nbmerge.explaining.diagnosis import Diagnosis, known_of
from nbmerge.explaining.table import why
from nbmerge.expressions import Expr
from nbmerge.geometry import Shape
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.megatron import absences, advice
from nbmerge.naming.megatron.canonical import Canonical, canonical
from nbmerge.naming.megatron.families import FAMILIES, family_of
from nbmerge.naming.megatron.family import Family
from nbmerge.naming.megatron.matching import Match, match_of
from nbmerge.naming.megatron.rules import Made, Misfit, Sizes, misfit
from nbmerge.naming.notes import Trim


@dataclass
class Renamed:
    """tensors: by published name; sources: published name → the checkpoint's own name for where it comes from;
    unloaded: published names that the class knows and does not load; trims: padding that was cut off; mismatches:
    tensors that no rule takes or can be applied to; diagnosis: of the config as a whole.
    """

    tensors: dict[str, Expr] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    unloaded: set[str] = field(default_factory=set)
    trims: list[Trim] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    family: Family | None = None
    mismatches: list[Mismatch] = field(default_factory=list)
    diagnosis: Diagnosis | None = None


def rename(tensors: Mapping[str, Expr], facts: ModelFacts) -> Renamed:
    """The published tensors that the tensors of a Megatron checkpoint become, for the model of the facts.

    Nothing but problems, and no family, where the checkpoint's layers cannot be told apart or no table is for them.
    """
    found = canonical(tensors)
    family = family_of(str(facts.config.get("model_type")))
    sizes = sizes_of(facts)
    if found.unusable:
        return Renamed(problems=list(found.problems))
    held = {name: expr.shape for name, expr in found.tensors.items()}
    diagnosis = Diagnosis(facts.class_name, held, sizes.published)
    work = Renamed(problems=list(found.problems), family=family, diagnosis=diagnosis)
    if family is None:
        work.problems.append(advice.unknown_family(found.tensors, facts, sizes, FAMILIES))
        return work
    apply(family, found, sizes, work)
    return work


def sizes_of(facts: ModelFacts) -> Sizes:
    """What rules may ask of the model, tied names included."""
    shapes = {name: expr.shape for name, expr in facts.published.items()}
    shapes |= {name: shapes[kept] for name, kept in facts.tied_on_hub.items() if kept in shapes}
    return Sizes(facts.config, shapes)


def apply(family: Family, found: Canonical, sizes: Sizes, work: Renamed) -> None:
    """Puts what the family's rules make into `work`."""
    packed: dict[str, dict[int, Expr]] = {}
    strays: dict[str, str] = {}
    misfits: dict[str, tuple[Misfit | LookupError, Shape]] = {}  # by source, which may be a stack of layers
    for name, source in found.halves.items():  # told already
        if match := match_of(family, name, sizes):
            work.sources.update(dict.fromkeys(match.names, source))
    for name, expr in found.tensors.items():
        source = found.sources[name]
        match = match_of(family, name, sizes)
        if match is None:
            strays[name] = source
            continue
        try:
            made = list(match.rule.apply(expr, match.names, sizes, match.expert))
        except (Misfit, LookupError) as error:
            misfits.setdefault(source, (error, expr.shape))
            for missing in match.names:  # told already
                work.sources[missing] = source
            continue
        for each in made:
            if each.place is None:
                _add(work, each, source, match)
            else:
                packed.setdefault(each.name, {})[each.place] = each.expr
                work.sources[each.name] = source
    _report_misfits(work, misfits, sizes)
    _put_packed_together(work, packed, sizes)
    _add_copies(family, work)
    work.problems += advice.strays(strays, family)
    if strays:
        known = known_of(sizes.config, None, work.diagnosis)
        work.mismatches += [Mismatch(found.tensors[name].shape, None, source, known) for name, source in strays.items()]


def _report_misfits(work: Renamed, misfits: Mapping[str, tuple[Misfit | LookupError, Shape]], sizes: Sizes) -> None:
    """The problems of tensors that a rule cannot be applied to; those that differ only in numbers together."""
    known = known_of(sizes.config, None, work.diagnosis if misfits else None)
    for group in alike(misfits, str, lambda source: str(misfits[source][0])):
        error, shape = misfits[group[0]]
        wanted = error.wanted if isinstance(error, Misfit) else None
        asked = [Mismatch(shape, wanted, source, known) for source in group]
        work.mismatches += asked
        of_model = work.diagnosis is not None and bool(work.diagnosis.sentence)  # said of all tensors at once
        cause = "" if of_model or wanted is None else why(asked[0], "")
        work.problems.append(misfit(group, error, cause))


def _add(work: Renamed, made: Made, source: str, match: Match) -> None:
    if made.name in work.tensors:
        work.problems.append(
            Problem(
                f"{work.sources[made.name]} and {source} both become {made.name}",
                why="the checkpoint holds one parameter under two names",
                fix="report it with the list of the checkpoint's tensors: the table does not know this form",
                kind="contradiction",
            )
        )
        return
    work.tensors[made.name] = made.expr
    work.sources[made.name] = source
    if made.trimmed:
        rows = made.expr.shape[0]
        work.trims.append(Trim(made.name, source, rows + made.trimmed, rows))
    if not match.loaded:
        work.unloaded.add(made.name)


def _put_packed_together(work: Renamed, packed: Mapping[str, Mapping[int, Expr]], sizes: Sizes) -> None:
    for name, rows in packed.items():
        shapes = {row.shape for row in rows.values()}
        wanted = sizes.published[name][0] if name in sizes.published else max(rows) + 1
        if sorted(rows) != list(range(wanted)) or len(shapes) > 1:
            work.problems.append(absences.gap_in_experts(name, sorted(rows), wanted, work.sources[name]))
            continue
        work.tensors[name] = ex.stack([rows[number] for number in range(len(rows))])


def _add_copies(family: Family, work: Renamed) -> None:
    """What published layers hold copies of: the tables, in multi-token-prediction layers."""
    for stack in family.stacks:
        layers = {name.removeprefix(stack.target).partition(".")[0] for name in work.unloaded} if stack.extra else set()
        for layer in sorted(layers):
            for name, original in stack.extra.items():
                if original in work.tensors:
                    copy = f"{stack.target}{layer}.{name}"
                    work.tensors.setdefault(copy, work.tensors[original])
                    work.sources.setdefault(copy, work.sources[original])
                    work.unloaded.add(copy)
