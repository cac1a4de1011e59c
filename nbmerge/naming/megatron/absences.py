"""What a checkpoint lacks, told in the largest parts that are gone: layers, experts, modules, then single tensors."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from nbmerge.errors import Problem, listing, plural
from nbmerge.naming.megatron.family import Family
from nbmerge.naming.megatron.matching import any_number, rows_of

_LAYER = re.compile(r"^(.*\blayers\.)(\d{1,9})\.")
_NUMBERED = re.compile(r"^(.*\b(\w+)\.)(\d{1,9})\.$")
_OUTPUT = "output_layer.weight"
_AGAIN = "copy the checkpoint again from all machines that trained, or pass its own config: --hf_model_config_path DIR"


@dataclass(frozen=True)
class Gaps:
    """Published names that nothing fills.

    parts: each with the largest part of the model around it that nothing fills, a prefix that ends with a dot;
    "" stands for a name whose neighbours are all there. torn: those that other layers, experts or blocks have, so
    that a part of the save is lost; training had them.
    """

    parts: Mapping[str, str]
    torn: frozenset[str]

    @staticmethod
    def of(names: Sequence[str], held: Iterable[str]) -> Gaps:
        """The gaps beside the names that something fills."""
        held = list(held) if names else []
        filled = {prefix for name in held for prefix in _prefixes(name)}
        rows = {any_number(name) for name in held}
        parts = {name: next((p for p in _prefixes(name) if p not in filled), "") for name in names}
        torn = {name for name, part in parts.items() if _NUMBERED.match(part) or any_number(name) in rows}
        return Gaps(parts, frozenset(torn))

    def beside(self, others: Container[str]) -> Gaps:
        """Without the names that a base model fills, which fills nothing that is torn."""
        parts = {name: part for name, part in self.parts.items() if name in self.torn or name not in others}
        return Gaps(parts, self.torn & parts.keys())


def _prefixes(name: str) -> Iterator[str]:
    """`model.`, `model.layers.` and so on, shortest first."""
    at = name.find(".")
    while at >= 0:
        yield name[: at + 1]
        at = name.find(".", at + 1)


def missing(gaps: Gaps, family: Family, *, with_base: bool = False) -> list[Problem]:
    """The problems of published tensors that nothing fills. with_base: whether a base model was given."""
    numbered: dict[str, dict[str, None]] = {"layers": {}, "experts": {}}
    modules: dict[str, list[str]] = {}
    singles: list[str] = []
    for name, part in gaps.parts.items():
        match = _NUMBERED.match(part)
        if match and match[2] in numbered:
            numbered[match[2]][part] = None
        elif part:
            modules.setdefault(any_number(part), []).append(name)
        else:
            singles.append(name)
    problems = [_gone(kind, list(parts)) for kind, parts in numbered.items() if parts]
    sources = _Sources(family)
    for members in modules.values():
        if len({any_number(name) for name in members}) == 1:
            singles += members
        else:
            parts = list(dict.fromkeys(gaps.parts[name] for name in members))
            more = f" and {plural(len(parts) - 1, 'part')} like it" if parts[1:] else ""
            what = f"nothing in the checkpoint fills {parts[0]}*{more}: {plural(len(members), 'tensor')}"
            problems.append(_unfilled(what, sources.of(members[0]), family, with_base=with_base))
    by_source: dict[str, list[str]] = {}
    for name in singles:
        by_source.setdefault(sources.of(name) or any_number(name), []).append(name)
    for members in by_source.values():
        more = f" and {len(members) - 1:,} more like it" if members[1:] else ""
        what = f"no tensor of the checkpoint fills {members[0]}{more}"
        problems.append(_unfilled(what, sources.of(members[0]), family, with_base=with_base))
    return problems


class _Sources:
    """Which row of the table would make a published tensor."""

    def __init__(self, family: Family) -> None:
        self._rows: dict[str, str] = {}
        longest_first = sorted(rows_of(family), key=lambda item: -max(map(len, item[1].targets)))
        for row, rule in longest_first:
            for target in rule.targets:
                self._rows.setdefault(target, row)  # a decoder's before that of multi-token prediction

    def of(self, name: str) -> str | None:
        row = any_number(name)
        return next((source for end, source in self._rows.items() if row.endswith(end.replace("{e}", "N"))), None)


def _unfilled(what: str, source: str | None, family: Family, *, with_base: bool) -> Problem:
    if source == _OUTPUT:
        fix = "if training tied it to the embedding, pass --tie_word_embedding; else copy the last pipeline stage again"
    else:
        fix = "check that config.json is the trained model's and that the checkpoint is complete; "
        fix += "a base model fills only what training never had" if with_base else (
            "what training never had can come from --base_model DIR"
        )  # fmt: skip
    return Problem(
        what,
        where=f"the rule takes {source}, which the checkpoint does not have" if source else "",
        why=f"the model has it; no tensor of the checkpoint becomes it by the table of {family.name}",
        fix=fix,
        kind="missing",
    )


def _gone(kind: str, parts: Sequence[str]) -> Problem:
    """Layers, or experts, that are gone as a whole."""
    matches = [match for part in parts if (match := _NUMBERED.match(part))]
    numbers = sorted({int(match[3]) for match in matches})
    within = f", in {plural(len({match[1] for match in matches}), 'layer')}," if kind == "experts" else " of the model"
    return Problem(
        f"{plural(len(numbers), kind.removesuffix('s'))}{within} {'is' if len(numbers) == 1 else 'are'} not in the "
        f"checkpoint: {ranges(numbers)}",
        where=f"{parts[0]}* for one",
        why=f"{'a pipeline stage' if kind == 'layers' else 'an expert parallel rank'} is missing, "
        f"or config.json has more {kind} than the model that was trained",
        fix=_AGAIN,
        kind="missing",
    )


def ranges(numbers: Sequence[int]) -> str:
    """`4-7, 12`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return listing((f"{a}" if a == b else f"{a}-{b}" for a, b in runs), shown=6)


def layers_beyond(names: Mapping[str, str], published: Iterable[str]) -> tuple[list[Problem], set[str]]:
    """One problem for the layers that the config's model does not have, and the names that it covers.

    names: published name → where it comes from.
    """
    known = {match[0] for name in published if (match := _LAYER.match(name))}
    stacks = {layer.rpartition(".layers.")[0] for layer in known}
    beyond: dict[str, list[str]] = {}
    for name in names:
        match = _LAYER.match(name)
        if match and match[0] not in known and match[1].rpartition(".layers.")[0] in stacks:
            beyond.setdefault(match[0], []).append(name)
    if not beyond:
        return [], set()
    numbers = sorted({int(match[2]) for layer in beyond if (match := _LAYER.match(layer))})
    covered = {name for members in beyond.values() for name in members}
    first = min(covered, key=len)
    problem = Problem(
        f"the checkpoint has {plural(len(beyond), 'layer')} that config.json's model has not: {ranges(numbers)}",
        where=f"{names[first]} for one",
        why="config.json is of a smaller model than the one that was trained",
        fix="pass the config that training used: --hf_model_config_path DIR",
        kind="contradiction",
    )
    return [problem], covered


def gap_in_experts(name: str, numbers: Sequence[int], wanted: int, source: str) -> Problem:
    """A packed tensor for which experts are missing, too many or of several shapes. wanted: how many it should have."""
    return Problem(
        f"{name} cannot be put together from experts {ranges(numbers)}: it has {wanted} of one shape",
        where=source,
        why="an expert is missing, the experts have several shapes, or config.json is another model's",
        fix=_AGAIN,
        kind="missing",
    )
