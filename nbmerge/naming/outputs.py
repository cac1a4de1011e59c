"""The outputs of a checkpoint, whoever named its tensors: transformers itself, or Megatron."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nbmerge.expressions import Expr, Fill
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.megatron import advice
from nbmerge.naming.megatron.rename import Renamed, rename
from nbmerge.naming.notes import Filled
from nbmerge.naming.published import HUB, Base, Given, Named, name_tensors, refused_adapters


def outputs_of(
    tensors: Mapping[str, Expr], names: str, facts: ModelFacts, target: str = HUB, base: Base | None = None
) -> Named:
    """The outputs of a checkpoint's tensors. names: whose they have, `transformers` or `megatron`."""
    if names == "megatron":
        return _from_megatron(tensors, facts, target, base)
    return name_tensors(tensors, facts, target, base=base)


def _from_megatron(tensors: Mapping[str, Expr], facts: ModelFacts, target: str, base: Base | None) -> Named:
    if adapters := advice.adapters(tensors):
        return refused_adapters(adapters)
    work = rename(tensors, facts)
    if work.family is None:
        return Named({}, {}, HUB, problems=tuple(work.problems))
    fills = _fill_with_zeros(work, facts)
    beyond, covered = advice.layers_beyond(
        {name: work.sources[name] for name in work.tensors if name not in work.unloaded}, facts.published
    )
    for name in covered:
        del work.tensors[name]
    filled = {*work.tensors, *facts.tied_on_hub, *(base.tensors if base else ())}
    tied = {kept for name, kept in facts.tied_on_hub.items() if name in work.tensors}
    absent = [name for name in facts.published if name not in filled and name not in work.sources and name not in tied]
    problems = [*work.problems, *beyond, *advice.missing(absent, work.tensors, work.family)]
    given = Given(HUB, work.sources, work.unloaded, frozenset({*absent, *work.sources} - set(work.tensors)))
    named = name_tensors(work.tensors, facts, target, base=base, given=given)
    return replace(
        named,
        dialect=f"megatron ({work.family.name})",
        renamed=len(work.tensors) - len(fills),
        trims=tuple(work.trims),
        fills=(*fills, *named.fills),
        problems=(*problems, *named.problems),
    )


def _fill_with_zeros(work: Renamed, facts: ModelFacts) -> list[Filled]:
    """The bias of a value head, which transformers' token classifiers have and Megatron's critics do not."""
    if "score.bias" not in facts.published or "score.bias" in work.tensors or "score.weight" not in work.tensors:
        return []
    weight = work.tensors["score.weight"]
    work.tensors["score.bias"] = Fill(0.0, facts.published["score.bias"].shape, weight.dtype)
    work.sources["score.bias"] = work.sources["score.weight"]
    return [Filled("score.bias", "zeros", "Megatron's value head has no bias; the class expects one")]
