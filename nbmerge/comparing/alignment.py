"""Pairs the tensors of two models: by name, and where a known rule says how, under other names or shapes.

Rules: wrappers' prefixes, the spellings of vision towers, published names against those in memory, tied output layers,
padded vocabularies. What no rule pairs is listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nbmerge import expressions as ex
from nbmerge.comparing.elements import common_dtype
from nbmerge.comparing.left_out import A, B, Mismatch, Unmatched
from nbmerge.comparing.rolling import is_vocabulary
from nbmerge.dtypes import DType
from nbmerge.errors import NbmergeError, one_line, plural
from nbmerge.expressions import Expr
from nbmerge.geometry import Shape
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.prefixes import stripped_names
from nbmerge.naming.published import HUB, TRANSFORMERS, as_installed, name_tensors
from nbmerge.naming.towers import respelled
from nbmerge.weights import Weights


@dataclass(frozen=True, slots=True)
class Pair:
    """Two tensors of one shape that are each other's counterpart. note: the rule that paired them, where one did."""

    name: str
    a: Expr
    b: Expr
    dtype: DType
    note: str = ""


@dataclass(frozen=True)
class Alignment:
    """What is compared with what, what is not, and what there is to say of it."""

    pairs: tuple[Pair, ...]
    unmatched: tuple[Unmatched, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The name of every tensor of either model, each once."""
        return list(dict.fromkeys([*(pair.name for pair in self.pairs), *self.left_out]))

    @property
    def left_out(self) -> list[str]:
        """The name of every tensor that is not compared, or of which a part is not."""
        return [*(one.name for one in self.unmatched), *(one.name for one in self.mismatched)]


@dataclass
class _Side:
    """One of the two models while names are found."""

    label: str
    tensors: dict[str, Expr]
    facts: ModelFacts | None = None
    renamed: int = 0


def align(a: Weights, b: Weights) -> Alignment:
    """Pairs the tensors of two models. The class of a config is asked only where names or shapes disagree."""
    sides = (_Side(A, _stripped(a.tensors)), _Side(B, _stripped(b.tensors)))
    notes: list[str] = []
    if not _agree(*sides):
        _ask_models(sides, (a, b), notes)
    return _paired(*sides, notes)


def _stripped(tensors: Mapping[str, Expr]) -> dict[str, Expr]:
    names, collisions = stripped_names(tensors)
    return dict(tensors) if collisions else {new: tensors[old] for new, old in names.items()}


def _agree(a: _Side, b: _Side) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(
        expr.shape == b.tensors[name].shape for name, expr in a.tensors.items()
    )


def _respell(side: _Side, news: dict[str, Expr], notes: list[str]) -> None:
    """Takes the side's tensors as another transformers would have them, and notes new names."""
    if count := len(news.keys() - side.tensors.keys()):
        notes.append(f"{side.label} has {plural(count, 'name')} of a vision tower as another transformers spells them")
    side.tensors = news


def _ask_models(sides: tuple[_Side, _Side], weights: tuple[Weights, Weights], notes: list[str]) -> None:
    """Gives both sides published names, by their own config, or by the other's where there is none."""
    known: list[ModelFacts | None] = []
    for side, source in zip(sides, weights, strict=True):
        try:
            known.append(source.model.facts if source.model is not None else None)
        except NbmergeError as error:
            known.append(None)
            notes.append(f"the config of {side.label} tells no names: {one_line(str(error.problem.what), limit=200)}")
    for side, facts in zip(sides, (known[0] or known[1], known[1] or known[0]), strict=True):
        side.facts = facts
        if facts is None:
            _respell(side, respelled(side.tensors, sides[0].tensors), notes)
            continue
        _respell(side, as_installed(side.tensors, facts), notes)
        side.tensors, side.renamed = _published(side.tensors, facts)
        if side.renamed:
            notes.append(f"{side.label} has {facts.class_name}'s names in memory; compared under the published ones")


def _published(tensors: dict[str, Expr], facts: ModelFacts) -> tuple[dict[str, Expr], int]:
    """The tensors under published names, what the class does not know under its own; and how many were renamed."""
    named = name_tensors(tensors, facts, HUB)
    if named.dialect != TRANSFORMERS:
        return {**named.outputs, **tensors}, 0
    rules = {name: facts.published[name] for name in named.outputs if name in facts.published}
    used = {source for rule in rules.values() for source in ex.input_names(rule)}
    names = _tied_names(facts)
    left = {names.get(name, name): expr for name, expr in tensors.items() if name not in used}
    rest = {name: expr for name, expr in left.items() if name not in named.outputs}
    changed = sum(not isinstance(rule, ex.Input) or rule.name != name for name, rule in rules.items())
    return {**named.outputs, **rest}, changed


def _tied_names(facts: ModelFacts) -> dict[str, str]:
    """The published names of tied copies, by those in memory."""
    published = {rule.name: name for name, rule in facts.published.items() if isinstance(rule, ex.Input)}
    tied: dict[str, list[str]] = {}
    for name, kept in facts.tied_on_hub.items():
        tied.setdefault(kept, []).append(name)
    found = ((name, tied.get(published.get(kept, ""), [])) for name, kept in facts.tied.items())
    return {name: names[0] for name, names in found if len(names) == 1}


def _paired(a: _Side, b: _Side, notes: list[str]) -> Alignment:
    pairs: list[Pair] = []
    unmatched: list[Unmatched] = []
    mismatched: list[Mismatch] = []
    for name in (*a.tensors, *(name for name in b.tensors if name not in a.tensors)):
        of_a, note_a = _held(name, a)
        of_b, note_b = _held(name, b)
        if of_a is not None and of_b is not None:
            dtype = common_dtype(of_a.dtype, of_b.dtype)
            if dtype is None:
                why = f"{of_a.dtype} and {of_b.dtype} cannot be compared"
                mismatched.append(Mismatch(name, (of_a.shape, of_a.dtype), (of_b.shape, of_b.dtype), why))
            elif of_a.shape == of_b.shape:
                pairs.append(Pair(name, of_a, of_b, dtype, note_a or note_b))
            elif _is_padded(name, of_a.shape, of_b.shape):
                pairs.append(_common_rows(name, of_a, of_b, dtype))
                unmatched.append(_rows_beyond(name, of_a, of_b))
            else:
                why = f"{list(of_a.shape)} and {list(of_b.shape)}: no rule says which elements belong together"
                mismatched.append(Mismatch(name, (of_a.shape, of_a.dtype), (of_b.shape, of_b.dtype), why))
        elif of_a is not None:
            unmatched.append(Unmatched(name, A, of_a.shape, of_a.dtype))
        elif of_b is not None:
            unmatched.append(Unmatched(name, B, of_b.shape, of_b.dtype))
    return Alignment(tuple(pairs), tuple(unmatched), tuple(mismatched), tuple(notes))


def _held(name: str, side: _Side) -> tuple[Expr | None, str]:
    """The side's tensor of the name; where it has none and its config ties it to another, that one, and a note."""
    if name in side.tensors or side.facts is None:
        return side.tensors.get(name), ""
    kept = side.facts.tied_on_hub.get(name, "")
    return side.tensors.get(kept), f"{side.label} ties it to {kept}"


def _is_padded(name: str, a: Shape, b: Shape) -> bool:
    return is_vocabulary(name) and len(a) == len(b) > 0 and a[1:] == b[1:]


def _common_rows(name: str, a: Expr, b: Expr, dtype: DType) -> Pair:
    rows = min(a.shape[0], b.shape[0])
    note = f"the vocabulary has {a.shape[0]:,} rows in A and {b.shape[0]:,} in B; the first {rows:,} are compared"
    return Pair(name, ex.narrow(a, 0, 0, rows), ex.narrow(b, 0, 0, rows), dtype, note)


def _rows_beyond(name: str, a: Expr, b: Expr) -> Unmatched:
    side, longer, rows = (A, a, b.shape[0]) if a.shape[0] > b.shape[0] else (B, b, a.shape[0])
    shape = (longer.shape[0] - rows, *longer.shape[1:])
    return Unmatched(name, side, shape, longer.dtype, f"rows of the vocabulary from {rows:,} on")
