"""Questions, and arithmetic read back from evidence."""

from __future__ import annotations

import ast
import re
from typing import Any

from nbmerge.explaining.candidates import Candidate, Known, Mismatch
from nbmerge.explaining.table import candidates

Shape = tuple[int, ...]


def ask(got: Shape | None, expected: Shape | None, name: str = "", ranks: int | None = None, **config: Any) -> Mismatch:
    return Mismatch(got, expected, name, Known(ranks, config))


def causes(got: Shape | None, expected: Shape | None, name: str = "", ranks: int | None = None, **config: Any):
    """Candidates by pattern, strongest first."""
    return {each.pattern: each for each in candidates(ask(got, expected, name, ranks, **config))}


def first_ones(found: dict[str, Candidate]) -> list[str]:
    """The patterns that share the greatest strength."""
    best = max((each.strength for each in found.values()), default=0)
    return [pattern for pattern, each in found.items() if each.strength == best]


_EQUATION = re.compile(r"^[\d\s·+\-/⌈⌉()=]+$")


def equations(candidate: Candidate) -> list[str]:
    return [said for said in candidate.evidence if "=" in said and _EQUATION.match(said)]


def is_true(equation: str) -> bool:
    """Whether `3600 = 24 · ⌈3584/24⌉` holds, ⌈a/b⌉ being the ceiling."""
    code = equation.replace("·", "*").replace("/", "//")
    code = re.sub(r"⌈([^⌉]*)//([^⌉]*)⌉", r"(-(-(\1)//(\2)))", code)
    left, right = code.split("=")
    return _value(left) == _value(right)


def _value(code: str) -> int:
    return eval(compile(ast.parse(code.strip(), mode="eval"), "evidence", "eval"), {"__builtins__": {}})  # noqa: S307
