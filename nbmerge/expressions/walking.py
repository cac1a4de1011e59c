"""Goes through expressions: their nodes, what they ask for, what they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

from nbmerge.expressions.making import permute, reshape, slice_of
from nbmerge.expressions.nodes import Cast, Compute, Expr, Input, Paste, Permute, Reshape, Slice


def walk(expr: Expr) -> Iterator[Expr]:
    """The node and all below it, each as often as it is used."""
    yield expr
    for source in expr.sources:
        yield from walk(source)


def substitute(expr: Expr, inputs: Mapping[str, Expr]) -> Expr:
    """The expression with every Input that `inputs` names replaced by that tensor, and views taken of what it is."""
    if isinstance(expr, Input):
        return inputs.get(expr.name, expr)
    old = expr.sources
    if not old:
        return expr
    new = tuple(substitute(source, inputs) for source in old)
    if all(a is b for a, b in zip(old, new, strict=True)):
        return expr
    if isinstance(expr, Slice):
        return slice_of(new[0], expr.box)
    if isinstance(expr, Permute):
        return permute(new[0], expr.dims)
    if isinstance(expr, Reshape):
        return reshape(new[0], expr.shape)
    return expr.with_sources(new)


def input_names(expr: Expr) -> list[str]:
    """The names of the Inputs below the node, each once, in order."""
    return list(dict.fromkeys(node.name for node in walk(expr) if isinstance(node, Input)))


def fingerprint(expr: Expr) -> Iterator[str]:
    """Words that tell the expression from any other: its nodes, and every field of each that shapes its bytes."""
    for node in walk(expr):
        yield type(node).__name__
        for item in fields(node):  # type: ignore[arg-type]  # every node is a dataclass
            if item.name not in ("source", "parts", "inputs", "function"):
                yield str(getattr(node, item.name))
        if isinstance(node, Paste):
            yield str([offset for offset, _ in node.parts])


def is_copy(expr: Expr) -> bool:
    """Whether the tensor's bytes are all copied or constant: no cast and no computation in it."""
    return not any(isinstance(node, (Cast, Compute, Input)) for node in walk(expr))
