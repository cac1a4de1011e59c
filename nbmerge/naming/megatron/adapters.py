"""LoRA in Megatron checkpoints, under the names that peft gives to adapters.

Megatron-Bridge wraps a linear layer and keeps beside it `adapter.linear_in.weight`, which is A [r, in], and
`adapter.linear_out.weight`, B [out, r]; DoRA's `adapter.weight_magnitude` is [out]. A fused layer has one A for all of
its projections, and B has the layer's rows, in its order: so the rule that cuts the layer's weight cuts B too. The
"canonical" kind has an adapter for each projection: `adapter.adapter_q.linear_in.weight`. Experts of one grouped layer
have a leading dimension, or share one adapter.
Source: Megatron-Bridge, megatron/bridge/peft/{lora,canonical_lora,utils,dora_layers}.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from nbmerge import expressions as ex
from nbmerge.errors import Problem, listing
from nbmerge.expressions import Expr
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.lora.keys import DEFAULT, MODEL_PREFIX
from nbmerge.naming.megatron.canonical import canonical
from nbmerge.naming.megatron.families import family_of
from nbmerge.naming.megatron.matching import Match, match_of
from nbmerge.naming.megatron.rename import sizes_of
from nbmerge.naming.megatron.rules import QKV, Copy, Halves, Misfit, Sizes, misfit

_ADAPTER = re.compile(
    r"(?P<module>.+)\.adapter\.(?:adapter_(?P<projection>q|k|v|gate|up)\.)?"
    r"(?P<part>linear_in\.weight|linear_out\.weight|weight_magnitude)"
)
_ANY = re.compile(r"\.adapter\.(?:adapter_[^.]+\.)?(?:linear_in|linear_out|weight_magnitude)\b")
_WRAPPED = ".to_wrap."
_A, _B, _MAGNITUDE = "linear_in.weight", "linear_out.weight", "weight_magnitude"
_PEFT = {_A: "lora_A", _B: "lora_B", _MAGNITUDE: "lora_magnitude_vector"}
_PROJECTIONS = {QKV: ("q", "k", "v"), Halves: ("gate", "up")}
_GROUPED = re.compile(r"(.*\bexperts)\.(linear_fc[12])")
_HYBRID_NORM = "decoder.final_norm."


@dataclass
class Taken:
    """A Megatron checkpoint's tensors, those of its adapters apart.

    model: by Megatron's names, without the wrappers' `to_wrap`; adapter: by peft's names, over published modules.
    """

    model: dict[str, Expr] = field(default_factory=dict)
    adapter: dict[str, Expr] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def take_adapters(tensors: Mapping[str, Expr], facts: ModelFacts) -> Taken:
    """The tensors of the model, and those of its adapters as peft names them. Everything that fits no rule is told."""
    adapters = {name: expr for name, expr in tensors.items() if is_adapter(name)}
    taken = Taken({name.replace(_WRAPPED, "."): expr for name, expr in tensors.items() if name not in adapters})
    family = family_of(str(facts.config.get("model_type")))
    if not adapters or family is None:  # without a family the model's own tensors are refused, with the reason
        return taken
    if any(_HYBRID_NORM in name for name in taken.model):
        taken.problems.append(_hybrid(adapters))
        return taken
    found = canonical(adapters)
    taken.problems += found.problems
    sizes = sizes_of(facts)
    for name, expr in found.tensors.items():
        parsed = _ADAPTER.fullmatch(name)
        if parsed is None:
            taken.problems.append(_unknown(found.sources[name]))
            continue
        for module, each in _by_expert(parsed["module"], expr, parsed["part"], sizes):
            match = match_of(family, f"{module}.weight", sizes)
            try:
                made = dict(_named(match, each, parsed["part"], parsed["projection"], sizes))
            except (Misfit, LookupError) as error:
                taken.problems.append(misfit([found.sources[name]], error))
                continue
            if not made:
                taken.problems.append(_unknown(found.sources[name]))
            for published, part in made.items():
                taken.adapter[_peft_name(published, parsed["part"])] = part
    return taken


def is_adapter(name: str) -> bool:
    """Whether a name of a Megatron checkpoint is an adapter's."""
    return _ANY.search(name) is not None


def _by_expert(module: str, expr: Expr, part: str, sizes: Sizes) -> Iterator[tuple[str, Expr]]:
    """The experts of an adapter of grouped experts, with the module that each has; any other as it is."""
    match = _GROUPED.fullmatch(module)
    if match is None or ".shared_experts" in module:
        yield module, expr
        return
    single = 1 if part == _MAGNITUDE else 2
    shared = len(expr.shape) == single
    count = _experts(sizes) if shared else expr.shape[0]
    for number in range(count):
        yield f"{match[1]}.{number}.{match[2]}", expr if shared else ex.select(expr, 0, number)


def _experts(sizes: Sizes) -> int:
    names = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
    return next((size for name in names if isinstance(size := sizes.get(name), int)), 0)


def _named(
    match: Match | None, expr: Expr, part: str, projection: str | None, sizes: Sizes
) -> Iterator[tuple[str, Expr]]:
    """The published names of the weights that a part adapts, with its share for each; nothing where no rule fits."""
    if match is None or not isinstance(match.rule, (Copy, QKV, Halves)):
        return
    if projection is not None:
        projections = _PROJECTIONS.get(type(match.rule), ())
        if projection in projections:
            yield match.names[projections.index(projection)], expr
    elif part == _A:
        yield from ((name, expr) for name in match.names)
    else:
        yield from ((made.name, made.expr) for made in match.rule.apply(expr, match.names, sizes, match.expert))


def _peft_name(published: str, part: str) -> str:
    return f"{MODEL_PREFIX}{published.removesuffix('.weight')}.{_PEFT[part]}.{DEFAULT}.weight"


def _unknown(source: str) -> Problem:
    return Problem(
        f"no rule takes the adapter tensor {source}",
        why="it is of a kind, or adapts a module, of which it is not known how Megatron lays it out",
        fix="fold the adapter in the training job before it saves, or export it there",
        kind="unsupported",
    )


def _hybrid(adapters: Mapping[str, Expr]) -> Problem:
    return Problem(
        f"a HybridModel with adapters: {listing(adapters)}",
        why="it counts attention and MLP of a layer as layers of their own, and adapters of it have not been seen",
        fix="fold the adapter in the training job before it saves",
        kind="unsupported",
    )
