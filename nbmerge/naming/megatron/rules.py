"""What can happen to a Megatron tensor on its way to a published one. Nearly all of it is views.

A row of a table is a Megatron name and a rule; the rule says which published tensors it becomes. `{e}` in both
stands for an expert's number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from nbmerge import expressions as ex
from nbmerge.errors import Problem
from nbmerge.explaining.alike import and_more
from nbmerge.explaining.model_patterns import CONFIG_FIX
from nbmerge.expressions import Expr
from nbmerge.geometry import Shape
from nbmerge.naming.towers import spelled, spellings

_MOST_PADDING = 16_384  # rows: a padded vocabulary is a multiple of 128, or a little more, for each of 128 ranks


@dataclass(frozen=True)
class Sizes:
    """What rules may ask: sizes of the model's config by name, and shapes of published tensors.

    config: transformers' config with its defaults; a name is looked for in its text part first.
    """

    config: Mapping[str, Any]
    published: Mapping[str, Shape]

    def get(self, path: str) -> Any:
        """A value of the config, or None. `vision_config.num_heads` looks into a part of it."""
        section, _, name = path.rpartition(".")
        if section:
            return (self.config.get(section) or {}).get(name)
        text = self.config.get("text_config")
        if isinstance(text, Mapping) and text.get(name) is not None:
            return text[name]
        return self.config.get(name)

    def need(self, path: str) -> int:
        """A size of the config. Raises LookupError where it has none."""
        value = self.get(path)
        if not isinstance(value, int):
            raise LookupError(f"config.json has no {path}")
        return value

    @cached_property
    def _spelling(self) -> Mapping[str, str]:
        return spellings(self.published)

    def spelled(self, name: str) -> str:
        """A published name as the installed transformers spells it (see `towers`)."""
        return name if name in self.published else spelled(name, self._spelling)


@dataclass(frozen=True, slots=True)
class Made:
    """A published tensor that a rule makes. place: its row in a packed one; trimmed: rows of padding that were cut."""

    name: str
    expr: Expr
    place: int | None = None
    trimmed: int = 0


class Misfit(ValueError):
    """A tensor that a rule cannot be applied to: its shape and the config contradict each other.

    wanted: the shape that the config demands, where it is one.
    """

    def __init__(self, said: str, wanted: Shape | None = None) -> None:
        super().__init__(said)
        self.wanted = wanted


class Rule(ABC):
    """What becomes of one Megatron tensor."""

    @property
    @abstractmethod
    def targets(self) -> tuple[str, ...]:
        """The published names that it makes, as the table writes them."""

    @abstractmethod
    def apply(self, expr: Expr, names: tuple[str, ...], sizes: Sizes, expert: int | None) -> Iterator[Made]:
        """The published tensors. names: `targets` with the layer's prefix and the numbers put in.

        Raises Misfit for a shape that does not fit the config, LookupError for a size that the config lacks.
        """


@dataclass(frozen=True)
class _Single(Rule):
    """A rule that makes one tensor."""

    to: str

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.to,)


class Copy(_Single):
    """The same tensor under another name."""

    def apply(self, expr: Expr, names: tuple[str, ...], sizes: Sizes, expert: int | None) -> Iterator[Made]:
        yield Made(names[0], expr)


class Vocabulary(_Single):
    """The first rows: Megatron pads the vocabulary to a multiple of TP · make_vocab_size_divisible_by."""

    def apply(self, expr: Expr, names: tuple[str, ...], sizes: Sizes, expert: int | None) -> Iterator[Made]:
        wanted = sizes.published.get(names[0], expr.shape)
        padding = expr.shape[0] - wanted[0]
        if expr.shape[1:] == wanted[1:] and padding > 0:
            if padding > _MOST_PADDING:
                raise Misfit(
                    f"has {expr.shape[0]:,} rows; of {wanted[0]:,} tokens, {padding:,} rows are too many for padding"
                )
            yield Made(names[0], ex.narrow(expr, 0, 0, wanted[0]), trimmed=padding)
        else:
            yield Made(names[0], expr)


@dataclass(frozen=True)
class Head(Rule):
    """The output layer: logits over the padded vocabulary, or the value head of a critic or a classifier.

    A value head has one row, or as many as the model of the config has labels.
    """

    to: str = "lm_head.weight"
    value: str = "score.weight"

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.to, self.value)

    def apply(self, expr: Expr, names: tuple[str, ...], sizes: Sizes, expert: int | None) -> Iterator[Made]:
        logits, value = names
        if expr.shape[0] == 1 or expr.shape == sizes.published.get(value):
            yield Made(value, expr)
        else:
            yield from Vocabulary(self.to).apply(expr, (logits,), sizes, expert)


@dataclass(frozen=True)
class QKV(Rule):
    """Query, key and value, interleaved by query group: [groups, (r + 2) * head_dim, ...], r = heads / groups.

    Each group has its r query heads, then one key head, then one value head. Where the published query projection has
    twice the rows (`attention_output_gate`), each group has r query and r gate heads, and the published one
    alternates query and gate head by head.
    The sizes are names in the config; groups default to heads. Source: megatron/core/transformer/attention.py.
    """

    q: str
    k: str
    v: str
    heads: str = "num_attention_heads"
    groups: str = "num_key_value_heads"
    head_dim: str = "head_dim"
    hidden: str = "hidden_size"

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.q, self.k, self.v)

    def apply(self, expr: Expr, names: tuple[str, ...], sizes: Sizes, expert: int | None) -> Iterator[Made]:
        heads, groups, dim = self._sizes(sizes)
        each = heads // groups
        gated = sizes.published.get(names[0], (0,))[0] == 2 * heads * dim
        queries = 2 * each if gated else each
        rows, rest = groups * (queries + 2) * dim, expr.shape[1:]
        if expr.shape[0] != rows:
            raise Misfit(
                f"has {expr.shape[0]:,} rows; {groups} query groups of {queries} query, one key and one value head "
                f"of {dim} make {rows:,}",
                (rows, *rest),
            )
        grouped = ex.reshape(expr, (groups, queries + 2, dim, *rest))
        query = ex.narrow(grouped, 1, 0, each)
        if gated:
            query = _alternating(query, ex.narrow(grouped, 1, each, each))
        parts = (query, ex.narrow(grouped, 1, queries, 1), ex.narrow(grouped, 1, queries + 1, 1))
        for name, part in zip(names, parts, strict=True):
            yield Made(name, ex.reshape(part, (prod(part.shape) // prod(rest), *rest)))

    def _sizes(self, sizes: Sizes) -> tuple[int, int, int]:
        heads = sizes.need(self.heads)
        groups = sizes.get(self.groups) or heads
        dim = sizes.get(self.head_dim) or sizes.need(self.hidden) // heads
        if heads % groups:
            raise Misfit(f"cannot be cut: config.json has {heads} heads in {groups} query groups")
        return heads, int(groups), int(dim)


def _alternating(query: Expr, gate: Expr) -> Expr:
    """Query and gate heads [groups, r, d, ...] in turns: [groups, r, 2, d, ...]."""
    shape = (*query.shape[:2], 1, *query.shape[2:])
    return ex.cat([ex.reshape(query, shape), ex.reshape(gate, shape)], 2)


@dataclass(frozen=True)
class Halves(Rule):
    """Gate and up projection, which lie one after the other: [2 * width, ...]."""

    gate: str
    up: str

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def apply(self, expr: Expr, names: tuple[str, ...], sizes: Sizes, expert: int | None) -> Iterator[Made]:
        if expr.shape[0] % 2:
            raise Misfit(f"has {expr.shape[0]:,} rows, which are no two halves")
        width = expr.shape[0] // 2
        for number, name in enumerate(names):
            yield Made(name, ex.narrow(expr, 0, number * width, width))


@dataclass(frozen=True)
class Packed(_Single):
    """A row of a tensor that holds every expert: [experts, ...].

    transposed: published as [in, out] rather than [out, in]; None: as the published shapes say; beside: the last word
    of the other projection's published name, whose shape says it where this one is square; interleaved: gate and up
    rows in turns.
    """

    transposed: bool | None = False
    interleaved: bool = False
    beside: str = ""

    def apply(self, expr: Expr, names: tuple[str, ...], sizes: Sizes, expert: int | None) -> Iterator[Made]:
        transposed = len(expr.shape) > 1 and self._is_transposed(expr.shape, names[0], sizes.published)
        if self.interleaved:
            expr = _in_turns(expr, transposed)
        elif transposed:
            expr = _swapped(expr)
        yield Made(names[0], expr, place=expert)

    def _is_transposed(self, shape: Shape, name: str, published: Mapping[str, Shape]) -> bool:
        wanted = published.get(name)
        if self.transposed is not None or wanted is None:
            return bool(self.transposed)
        if shape == shape[::-1] == wanted[1:]:
            # [n, n] stands beside [n, n / 2] or [2 * n, n]: either has more rows than columns, unless it is turned.
            other = published.get(f"{name.rpartition('.')[0]}.{self.beside}", ())
            return len(other) > 2 and other[1] < other[2]
        return shape != wanted[1:] and shape[::-1] == wanted[1:]


def _in_turns(expr: Expr, transposed: bool) -> Expr:
    """Rows of two halves in turns: [2, width, ...] → [width, 2, ...]; or that, transposed."""
    if expr.shape[0] % 2:
        raise Misfit(f"has {expr.shape[0]:,} rows, which are no two halves")
    halves = ex.reshape(expr, (2, expr.shape[0] // 2, *expr.shape[1:]))
    if transposed:
        turned = ex.permute(halves, (2, 1, 0, *range(3, len(halves.shape))))
        return ex.reshape(turned, (expr.shape[1], expr.shape[0], *expr.shape[2:]))
    return ex.reshape(_swapped(halves), expr.shape)


class Transposed(_Single):
    """A matrix with its two dimensions exchanged."""

    def apply(self, expr: Expr, names: tuple[str, ...], sizes: Sizes, expert: int | None) -> Iterator[Made]:
        yield Made(names[0], _swapped(expr))


@dataclass(frozen=True)
class VisionQKV(_Single):
    """Query, key and value of a vision layer, per head in Megatron, and published in one tensor: all q, all k, all v.

    [heads, 3, head_dim, ...] → [3, heads, head_dim, ...].
    """

    heads: str = "vision_config.num_heads"

    def apply(self, expr: Expr, names: tuple[str, ...], sizes: Sizes, expert: int | None) -> Iterator[Made]:
        heads = sizes.need(self.heads)
        if expr.shape[0] % (3 * heads):
            raise Misfit(f"has {expr.shape[0]:,} rows, which are no query, key and value of {heads} heads")
        by_head = ex.reshape(expr, (heads, 3, expr.shape[0] // (3 * heads), *expr.shape[1:]))
        yield Made(names[0], ex.reshape(_swapped(by_head), expr.shape))


def _swapped(expr: Expr) -> Expr:
    """Dimensions 0 and 1 exchanged."""
    return ex.permute(expr, (1, 0, *range(2, len(expr.shape))))


def misfit(sources: Sequence[str], error: Misfit | LookupError, why: str = "") -> Problem:
    """The problem of tensors of one row that a rule cannot be applied to. why: what the shapes say, where they do."""
    said = str(error) if isinstance(error, Misfit) else f"cannot be cut: {error.args[0]}"
    generally = "the tensor and config.json are not of one model"
    return Problem(
        f"{sources[0]} {said}{and_more(len(sources))}",
        where=sources[0],
        why=f"{generally}: {why}" if why else generally,
        fix=CONFIG_FIX,
        kind="contradiction",
    )
