"""What to say where no rule fits: the nearest rule, the nearest table."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from nbmerge.errors import Problem, listing
from nbmerge.expressions import Expr
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.megatron.family import Family
from nbmerge.naming.megatron.matching import any_number, match_of, rows_of
from nbmerge.naming.megatron.rules import Sizes

_SOUGHT = 8  # strays whose nearest rule is looked for; a message shows fewer


def strays(sources: Mapping[str, str], family: Family) -> list[Problem]:
    """The problems of tensors that no rule takes, each with the nearest rule. Numbers of layers are told together.

    sources: canonical name → the name in the checkpoint.
    """
    by_row: dict[str, list[str]] = {}
    for name, source in sources.items():
        members = by_row.setdefault(any_number(name), [])
        if source not in members[-1:]:  # a stacked tensor has many names here
            members.append(source)
    rules = dict(rows_of(family))
    problems: list[Problem] = []
    for number, (row, members) in enumerate(by_row.items()):
        near = difflib.get_close_matches(row, rules, n=1, cutoff=0.5) if number < _SOUGHT else []
        more = f" and {len(members) - 1:,} more like it" if members[1:] else ""
        problems.append(
            Problem(
                f"no rule takes {members[0]}{more}",
                where=f"nearest rule: {near[0]} → {', '.join(rules[near[0]].targets)}" if near else "",
                why=f"the table of {family.name} has no row for it, so that it would be lost",
                fix="check that config.json is the trained model's; if it is, report the name: a row is missing",
            )
        )
    return problems


def unknown_family(tensors: Mapping[str, Expr], facts: ModelFacts, sizes: Sizes, families: Sequence[Family]) -> Problem:
    """No table is for this model type: which come near, and what each leaves open."""
    near: list[tuple[int, str]] = []
    for family in families:
        matches = {name: match_of(family, name, sizes) for name in tensors}
        made = {name for match in matches.values() if match for name in match.names}
        untaken = [name for name, match in matches.items() if match is None]
        unfilled = [name for name in facts.published if name not in made]
        lacking = [f"no rule for {untaken[0]}"] if untaken else []
        lacking += [f"nothing for {unfilled[0]}"] if unfilled else []
        near.append((len(untaken) + len(unfilled), f"{family.name} ({', '.join(lacking) or 'fits every name'})"))
    near.sort(key=lambda item: item[0])
    return Problem(
        f"there is no Megatron table for model_type {facts.config.get('model_type')!r}",
        where=f"nearest: {listing((text for _, text in near), shown=2)}",
        why=f"tables are there for {', '.join(t for family in families for t in family.model_types)}",
        fix="add a table, which is one file: CONTRIBUTING.md shows how; or convert with the framework that trained it",
        kind="unsupported",
    )
