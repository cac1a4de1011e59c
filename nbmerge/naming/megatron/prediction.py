"""Layers that predict further tokens: whether each is whole. No model class loads them, so nothing else would tell.

Such a layer is a decoder layer with two norms, a projection and a final norm of its own
(megatron/core/transformer/multi_token_prediction.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nbmerge.errors import Problem, listing, plural
from nbmerge.geometry import Shape
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.megatron.absences import ranges
from nbmerge.naming.megatron.family import Stack
from nbmerge.naming.megatron.rename import Renamed, sizes_of
from nbmerge.naming.megatron.rules import Sizes

_INSIDE = "transformer_layer."  # what the rows of the decoder layer in it begin with
_COUNT = "num_nextn_predict_layers"
_WHY = "it predicts further tokens: it is published after the decoder's layers, and the model class does not load it"
_COPY_AGAIN = "copy the checkpoint again from all machines that trained"
_CHECK = "check that config.json is the trained model's, or copy the checkpoint again"

_Layer = Mapping[str, Shape]
"""What a layer holds, by what follows its number in the published name."""


def unfinished(work: Renamed, facts: ModelFacts) -> list[Problem]:
    """What is wrong with the layers that predict further tokens. Nothing where the checkpoint has none of them."""
    problems: list[Problem] = []
    sizes = sizes_of(facts)
    for stack in work.family.stacks if work.family else ():
        if stack.loaded or not stack.after:
            continue
        first = sizes.need(stack.after)
        held = _layers({name: work.tensors[name].shape for name in work.unloaded if name in work.tensors}, stack)
        told = _layers({name: () for name in work.sources if name not in work.tensors}, stack)
        if held:
            problems += _wrong_count(sorted(number - first for number in held), sizes, stack)
        kinds = list(_kinds(_layers(sizes.published, stack)))
        for number, layer in sorted(held.items()):
            wanted = {**_own(stack, sizes), **_of_kind(kinds, layer)}
            where = f"{stack.source}{number - first}.* → {stack.target}{number}.*"
            problems += _faults(number, layer, wanted, {*told.get(number, ()), *stack.extra}, where)
    return problems


def _layers(shapes: Mapping[str, Shape], stack: Stack) -> dict[int, dict[str, Shape]]:
    """The tensors of each layer of the stack that they are published in, by its number."""
    found: dict[int, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        number, _, rest = name.removeprefix(stack.target).partition(".")
        if name.startswith(stack.target) and number.isdecimal() and rest:
            found.setdefault(int(number), {})[rest] = shape
    return found


def _kinds(decoder: Mapping[int, _Layer]) -> Iterator[_Layer]:
    """The decoder's layers, one of each kind, the last layer's first: further ones are built of its modules."""
    seen: set[frozenset[str]] = set()
    for _, layer in sorted(decoder.items(), reverse=True):
        if (names := frozenset(layer)) not in seen:
            seen.add(names)
            yield layer


def _of_kind(kinds: list[_Layer], layer: _Layer) -> _Layer:
    """The kind that a layer has most of its tensors in common with, relative to what either has."""
    return max(kinds, key=lambda kind: len(kind.keys() & layer.keys()) - len(layer.keys() - kind.keys()), default={})


def _own(stack: Stack, sizes: Sizes) -> _Layer:
    """What a further layer has beside a decoder layer: norms [hidden], and a projection [hidden, 2 * hidden]."""
    hidden = sizes.need("hidden_size")
    own = [target for row, rule in stack.rows.items() if not row.startswith(_INSIDE) for target in rule.targets]
    return {name: (hidden, 2 * hidden) if "proj" in name else (hidden,) for name in own}


def _wrong_count(numbers: list[int], sizes: Sizes, stack: Stack) -> Iterator[Problem]:
    """Layers that are missing or too many. numbers: of those that are there, from 0."""
    said = sizes.get(_COUNT)
    wanted = said if isinstance(said, int) and said > 0 else numbers[-1] + 1
    absent = sorted(set(range(wanted)) - set(numbers))
    if absent:
        yield Problem(
            f"of {plural(wanted, 'layer')} that predict further tokens, the checkpoint lacks {ranges(absent)}",
            where=f"{stack.source}{absent[0]}.* for one",
            why=f"the model's config has {_COUNT} {said}"
            if wanted == said
            else "they are numbered from 0 without a gap",
            fix=_COPY_AGAIN,
            kind="missing",
        )
    if beyond := [number for number in numbers if number >= wanted]:
        yield Problem(
            f"the checkpoint has {plural(len(numbers), 'layer')} that predict further tokens, and the model {wanted}",
            where=f"{stack.source}{beyond[0]}.* for one",
            why=f"the model's config has {_COUNT} {said}",
            fix=f"set {_COUNT} to {numbers[-1] + 1} in config.json, if that is how many were trained",
            kind="contradiction",
        )


def _faults(number: int, layer: _Layer, wanted: _Layer, told: set[str], where: str) -> Iterator[Problem]:
    absent = [name for name in wanted if name not in layer and name not in told]
    beyond = [name for name in layer if name not in wanted and name not in told]
    if absent:
        yield Problem(
            f"layer {number} lacks {len(absent):,} of its {plural(len(wanted), 'tensor')}: {listing(absent)}",
            where=where, why=_WHY, fix=_COPY_AGAIN, kind="missing",
        )  # fmt: skip
    if beyond:
        yield Problem(
            f"layer {number} has {plural(len(beyond), 'tensor')} that no layer of its kind has: {listing(beyond)}",
            where=where, why=_WHY, fix=_CHECK, kind="contradiction",
        )  # fmt: skip
    for name, shape in layer.items():
        if name in wanted and shape != wanted[name]:
            yield Problem(
                f"{name} of layer {number} has shape {list(shape)}; in other layers it has {list(wanted[name])}",
                where=where, why=_WHY, fix=_CHECK, kind="contradiction",
            )  # fmt: skip
