"""The outputs of a checkpoint, whoever named its tensors: transformers itself, or Megatron."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nbmerge.errors import Problem
from nbmerge.explaining.candidates import Mismatch
from nbmerge.explaining.diagnosis import Diagnosis, known_of
from nbmerge.expressions import Expr
from nbmerge.layout import Absence, Stated
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.megatron import absences
from nbmerge.naming.megatron.adapters import is_adapter
from nbmerge.naming.megatron.heads import fill_bias, mistaken_head
from nbmerge.naming.megatron.prediction import unfinished
from nbmerge.naming.megatron.rename import Renamed, rename, sizes_of
from nbmerge.naming.megatron.stated import other_forms, other_sizes
from nbmerge.naming.notes import Trim
from nbmerge.naming.published import HUB, Base, Given, Named, by_published_name, name_tensors, refused_adapters
from nbmerge.naming.torchtitan import from_torchtitan


def outputs_of(
    tensors: Mapping[str, Expr],
    names: str,
    facts: ModelFacts,
    target: str = HUB,
    base: Base | None = None,
    ranks: int | None = None,
    stated: Stated | None = None,
    absence: Absence | None = None,
) -> Named:
    """The outputs of a checkpoint's tensors. names: whose they have, `transformers`, `megatron` or `torchtitan`.

    base: with names of either kind; ranks: how many wrote the checkpoint and said
    how they cut it; stated: what the run recorded of its model; absence: why saving left tensors out.
    """
    if base is not None:
        base = replace(base, tensors=by_published_name(base.tensors, facts))
    if names == "megatron":
        return _from_megatron(tensors, facts, target, base, ranks, stated or Stated())
    if names == "torchtitan":
        return from_torchtitan(tensors, facts, target, base, ranks)
    return name_tensors(tensors, facts, target, base=base, given=Given(absence=absence), ranks=ranks)


def _from_megatron(
    tensors: Mapping[str, Expr],
    facts: ModelFacts,
    target: str,
    base: Base | None,
    ranks: int | None,
    stated: Stated,
) -> Named:
    if adapters := [name for name in tensors if is_adapter(name)]:
        return refused_adapters(adapters)
    work = rename(tensors, facts)
    if work.family is None:
        return Named({}, {}, HUB, problems=tuple(work.problems))
    fills = fill_bias(work, facts)
    beyond, covered = absences.layers_beyond(
        {name: work.sources[name] for name in work.tensors if name not in work.unloaded}, facts.published
    )
    for name in covered:
        del work.tensors[name]
    problems = [*other_forms(stated, work.family), *work.problems, *beyond, *unfinished(work, facts)]
    problems += mistaken_head(work, facts, base.tensors if base else ())
    absent = _absent(work, facts, base)
    problems += absences.missing(absent, work.family, with_base=base is not None)
    reported = frozenset({*absent.parts, *work.sources} - set(work.tensors))
    given = Given(HUB, work.sources, work.unloaded, reported, work.diagnosis)
    named = name_tensors(work.tensors, facts, target, base=base, given=given, ranks=ranks)
    problems += named.problems
    problems[:0] = other_sizes(stated, sizes_of(facts), work.family, is_wrong=bool(problems))
    return replace(
        named,
        dialect=f"megatron ({work.family.name})",
        renamed=len(work.tensors) - len(fills),
        trims=_trims(work, facts),
        fills=(*fills, *named.fills),
        problems=tuple(_diagnosed(work.diagnosis, problems)),
        mismatches=(*work.mismatches, *_unfilled(absent, facts, work.diagnosis), *named.mismatches),
        diagnosis=work.diagnosis if problems else None,
    )


def _diagnosed(diagnosis: Diagnosis | None, problems: list[Problem]) -> list[Problem]:
    """The problems, before them what is wrong with the config as a whole."""
    return [*diagnosis.problem(), *problems] if diagnosis and problems else problems


def _unfilled(absent: absences.Gaps, facts: ModelFacts, diagnosis: Diagnosis | None) -> list[Mismatch]:
    known = known_of(facts.config, None, diagnosis if absent.parts else None)
    return [Mismatch(None, facts.published[name].shape, name, known) for name in absent.parts]


def _absent(work: Renamed, facts: ModelFacts, base: Base | None) -> absences.Gaps:
    """What neither the checkpoint nor the base model fills. A base fills no gaps in what training had."""
    tied = {kept for name, kept in facts.tied_on_hub.items() if name in work.tensors}
    told = {*work.tensors, *work.sources, *facts.tied_on_hub, *tied}
    gaps = absences.Gaps.of([name for name in facts.published if name not in told], work.tensors)
    return gaps if base is None else gaps.beside(base.tensors)


def _trims(work: Renamed, facts: ModelFacts) -> tuple[Trim, ...]:
    """Of what is written: not of the copy of a tied table."""
    return tuple(trim for trim in work.trims if facts.tied_on_hub.get(trim.name) not in work.tensors)
