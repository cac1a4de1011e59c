"""What to say where no rule fits: the nearest rule, the nearest table, and what is missing in whole layers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from nbmerge.errors import Problem, listing, plural
from nbmerge.expressions import Expr
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.megatron.family import Family
from nbmerge.naming.megatron.rules import Rule, Sizes

_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")
_LAYER = re.compile(r"^(.*\blayers\.)(\d+)\.")
_SOUGHT = 8  # strays whose nearest rule is looked for; a message shows fewer
_ADAPTER = re.compile(r"\.(?:adapters?|lora_[AB]|linear_in|linear_out|to_wrap)\.")


def adapters(names: Iterable[str]) -> list[str]:
    """The names of LoRA tensors among those of a checkpoint."""
    return [name for name in names if _ADAPTER.search(name)]


def strays(names: Sequence[str], family: Family) -> list[Problem]:
    """The problems of tensors that no rule takes, each with the nearest rule. Numbers of layers are told together."""
    by_row: dict[str, list[str]] = {}
    for name in names:
        by_row.setdefault(_NUMBERS.sub("N", name), []).append(name)
    rules = dict(_rows(family))
    problems: list[Problem] = []
    for number, (row, members) in enumerate(by_row.items()):
        near = difflib.get_close_matches(row, rules, n=1, cutoff=0.5) if number < _SOUGHT else []
        more = f" and {plural(len(members) - 1, 'more')} like it" if members[1:] else ""
        problems.append(
            Problem(
                f"no rule takes {members[0]}" + more.replace("mores", "more"),
                where=f"nearest rule: {near[0]} → {', '.join(rules[near[0]].targets)}" if near else "",
                why=f"the table of {family.name} has no row for it, so that it would be lost",
                fix="check that config.json is the trained model's; if it is, report the name: a row is missing",
            )
        )
    return problems


def _rows(family: Family) -> Iterator[tuple[str, Rule]]:
    """Every row of a table under the name that it has in a checkpoint, N for numbers."""
    yield from family.ends.items()
    for stack in family.stacks:
        for row, rule in stack.rows.items():
            yield f"{stack.source}N.{row.replace('{e}', 'N')}", rule


def missing(names: Sequence[str], held: Iterable[str], family: Family) -> list[Problem]:
    """The problems of published tensors that nothing fills. held: published names that something fills."""
    layers = {match[0] for name in held if (match := _LAYER.match(name))}
    gone: dict[str, None] = {}
    by_row: dict[str, list[str]] = {}
    for name in names:
        match = _LAYER.match(name)
        if match and match[0] not in layers:
            gone[match[0]] = None
        else:
            by_row.setdefault(_NUMBERS.sub("N", name), []).append(name)
    problems = [_layers_gone(list(gone))] if gone else []
    targets: dict[str, str] = {}
    for row_of_rule, made in _targets(family):
        for target in made:
            targets.setdefault(target, row_of_rule)  # a decoder's before that of multi-token prediction
    for row, members in by_row.items():
        source = next((targets[t] for t in targets if row.endswith(t.replace("{e}", "N"))), None)
        more = f" and {len(members) - 1:,} more like it" if members[1:] else ""
        problems.append(
            Problem(
                f"no tensor of the checkpoint fills {members[0]}{more}",
                where=f"its rule takes {source}, which the checkpoint does not have" if source else "",
                why=f"the model has it; no tensor of the checkpoint becomes it by the table of {family.name}",
                fix="check that config.json is the trained model's and that the checkpoint is complete; "
                "what training never had can come from --base_model DIR",
                kind="missing",
            )
        )
    return problems


def _targets(family: Family) -> Iterator[tuple[str, Sequence[str]]]:
    """Rows with the ends of the published names that they make, longest first."""
    found = sorted(_rows(family), key=lambda item: -max(map(len, item[1].targets)))
    for row, rule in found:
        yield row, rule.targets


def _layers_gone(layers: Sequence[str]) -> Problem:
    numbers = sorted({int(match[2]) for layer in layers if (match := _LAYER.match(layer))})
    return Problem(
        f"{plural(len(layers), 'layer')} of the model {'is' if len(layers) == 1 else 'are'} not in the checkpoint: "
        f"{_ranges(numbers)}",
        where=f"{layers[0]}* for one",
        why="a pipeline stage is missing, or config.json has more layers than the model that was trained",
        fix="copy the checkpoint again from all machines that trained, or pass its own config: --hf_model_config_path",
        kind="missing",
    )


def _ranges(numbers: Sequence[int]) -> str:
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
        f"the checkpoint has {plural(len(beyond), 'layer')} that config.json's model has not: {_ranges(numbers)}",
        where=f"{names[first]} for one",
        why="config.json is of a smaller model than the one that was trained",
        fix="pass the config that training used: --hf_model_config_path DIR",
        kind="contradiction",
    )
    return [problem], covered


def gap_in_experts(name: str, numbers: Sequence[int], source: str) -> Problem:
    """A packed tensor for which experts are missing or of several shapes."""
    return Problem(
        f"{name} cannot be put together from experts {_ranges(numbers)}",
        where=source,
        why="an expert is missing, or the experts have several shapes",
        fix="copy the checkpoint again from all machines that trained",
        kind="missing",
    )


def unknown_family(tensors: Mapping[str, Expr], facts: ModelFacts, sizes: Sizes, families: Sequence[Family]) -> Problem:
    """No table is for this model type: which come near, and what each leaves open."""
    from nbmerge.naming.megatron.rename import match_of

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
