"""Turns naming rules round: from published tensors back to those that transformers has in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nbmerge import expressions as ex
from nbmerge.errors import listing
from nbmerge.expressions import Expr, Input, Paste, Permute, Reshape, Slice
from nbmerge.geometry import Box, tiling_faults


def inverted(published: Mapping[str, Expr]) -> dict[str, Expr]:
    """Every in-memory tensor as an expression over published ones, from the rules for the published ones.

    Raises ValueError for a rule that is more than views and pastes, or whose parts do not make up a tensor.
    """
    placed: dict[str, list[tuple[Box, Expr]]] = {}
    wholes: dict[str, Input] = {}
    for name, rule in published.items():
        for source, box, part in _inverses(rule, Input(name, rule.shape, rule.dtype)):
            wholes[source.name] = source
            placed.setdefault(source.name, []).append((box, part))
    return {name: _put_together(whole, placed[name]) for name, whole in wholes.items()}


def _put_together(whole: Input, placed: list[tuple[Box, Expr]]) -> Expr:
    faults = tiling_faults(whole.shape, (box for box, _ in placed))
    if faults:
        raise ValueError(f"{whole.name} is not made up by its parts: {listing(faults)}")
    if len(placed) == 1:
        return placed[0][1]
    parts = sorted(((box.offset, part) for box, part in placed), key=lambda item: item[0])
    return Paste(whole.shape, whole.dtype, tuple(parts))


def _inverses(rule: Expr, made: Expr) -> Iterator[tuple[Input, Box, Expr]]:
    """For each Input of the rule: the box of it that the rule takes, and that box as views of what the rule makes."""
    if isinstance(rule, Input):
        yield rule, Box.whole(rule.shape), made
    elif isinstance(rule, Permute):
        yield from _inverses(rule.source, ex.permute(made, _back(rule.dims)))
    elif isinstance(rule, Reshape):
        yield from _inverses(rule.source, ex.reshape(made, rule.source.shape))
    elif isinstance(rule, Paste):
        for offset, part in rule.parts:
            yield from _inverses(part, ex.slice_of(made, Box(offset, part.shape)))
    elif isinstance(rule, Slice):
        yield from _sliced(rule, made)
    else:
        raise ValueError(f"a {type(rule).__name__} cannot be undone")


def _sliced(rule: Slice, made: Expr) -> Iterator[tuple[Input, Box, Expr]]:
    """A box of an Input, perhaps with the Input's dimensions in another order."""
    box, source = rule.box, rule.source
    while isinstance(source, Permute):
        back = _back(source.dims)
        made = ex.permute(made, back)
        box = Box(tuple(box.offset[dim] for dim in back), tuple(box.shape[dim] for dim in back))
        source = source.source
    if not isinstance(source, Input):
        raise ValueError(f"a slice of a {type(source).__name__} cannot be undone")
    yield source, box, made


def _back(dims: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes another."""
    return tuple(dims.index(dim) for dim in range(len(dims)))
