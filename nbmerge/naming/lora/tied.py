"""Embeddings that are one tensor with the head, and an adapter of either: what peft's merge makes of them.

`modules_to_save` gives the module a copy of its own: `merge_and_unload` leaves the two apart, and sets
tie_word_embeddings to false; with `ensure_weight_tying` both names have the one copy. A layer of LoRA changes the one
tensor under both names, of two layers one after the other (peft.tuners.tuners_utils.BaseTuner, seen in peft 0.21).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass

from nbmerge.errors import Problem
from nbmerge.expressions import Expr
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.lora.layers import Fitted
from nbmerge.naming.lora.settings import Settings
from nbmerge.naming.notes import Tie


@dataclass(frozen=True)
class Ties:
    """The ties of a model that an adapter changes. pairs: name that is not written → the one that is kept.

    is_ensured: whether the adapter keeps them tied (peft's ensure_weight_tying).
    """

    pairs: Mapping[str, str]
    saved: frozenset[str]
    is_ensured: bool

    @staticmethod
    def of(facts: ModelFacts, saved: Iterable[str], settings: Settings) -> Ties:
        """saved: tensors of modules that were trained whole."""
        ties = {**facts.tied, **facts.tied_on_hub}
        return Ties(ties, frozenset(saved), settings.values.get("ensure_weight_tying") is True)

    @property
    def untied(self) -> dict[str, str]:
        """The pairs that come apart."""
        if self.is_ensured:
            return {}
        return {alias: kept for alias, kept in self.pairs.items() if {alias, kept} & self.saved}

    def same(self, name: str) -> list[str]:
        """The names of a tensor, its own first."""
        kept = self.pairs.get(name, name)
        return list(dict.fromkeys([name, kept, *(alias for alias, other in self.pairs.items() if other == kept)]))

    def kept(self, name: str) -> str:
        """The name under which a changed tensor is written."""
        kept = self.pairs.get(name, name)
        return name if name in self.untied else kept

    def also_changed(self, fitted: Iterable[Fitted]) -> list[str]:
        """Names that were not adapted and change with one that was, as they are the same tensor."""
        adapted = {each.weight for each in fitted}
        tied = {name for alias, kept in self.pairs.items() if alias not in self.untied for name in (alias, kept)}
        return sorted({other for name in adapted & tied for other in self.same(name)} - adapted)

    def problems(self, fitted: Iterable[Fitted], facts: ModelFacts, *, forced: bool) -> list[Problem]:
        """What peft's merge makes no sense of. facts: of the model untied; forced: tie_word_embedding was asked for."""
        still = {**facts.tied, **facts.tied_on_hub}
        found = [
            Problem(
                f"{name} was trained whole, and is tied to {other}",
                why="the option tie_word_embedding ties what training moved apart"
                if forced
                else "the model's config cannot untie the two",
                fix="leave tie_word_embedding out, or split: --lora split" if forced else "split: --lora split",
                kind="contradiction",
            )
            for alias, kept in self.untied.items()
            if forced or still.get(alias) == kept
            for name, other in ((alias, kept), (kept, alias))
            if name in self.saved
        ]
        if self.is_ensured:
            names = {name for alias, kept in self.pairs.items() for name in (alias, kept)}
            found += [_added_twice(each.weight, self.same(each.weight)[1]) for each in fitted if each.weight in names]
        return found

    def settle(self, model: dict[str, Expr], changed: Container[str], held: Callable[[str], Expr | None]) -> None:
        """Gives both names of what comes apart a tensor; of what stays tied and was changed, the one that is kept.

        changed: names into which a layer was folded; held: the original under either name.
        """
        for alias, kept in self.pairs.items():
            if alias in self.untied:
                for name in (alias, kept):
                    original = held(name)
                    if name not in model and original is not None:
                        model[name] = original
            elif kept in changed or (kept in self.saved and alias not in self.saved):
                model.pop(alias, None)
            elif alias in self.saved and kept not in self.saved:
                model[kept] = model[alias]

    def compared(self, fitted: Iterable[Fitted], own: Callable[[str], Expr | None]) -> list[Tie]:
        """The stored tensors under both names of one that is changed, which must be equal."""
        changed = {self.kept(each.weight) for each in fitted}
        return [
            Tie(alias, kept, own(alias), own(kept))
            for alias, kept in self.pairs.items()
            if kept in changed and alias not in self.untied
        ]


def _added_twice(name: str, other: str) -> Problem:
    return Problem(
        f"{name} is adapted, and tied to {other} with ensure_weight_tying",
        why="peft's own merge is not what was trained: it adds the adapter that both share to the one tensor twice",
        fix="split, and load the adapter with peft: --lora split",
        kind="unsupported",
    )
