"""Says when a checkpoint or its config is of a later transformers than the installed one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from nbmerge.errors import ConfigError, Problem
from nbmerge.naming.prefixes import strip_wrappers

OLDEST = (4, 57)
"""The oldest transformers that merges are tested with."""

# transformers 5 has the experts of a layer in one tensor each, and routers in `mlp` in every family (Mixtral).
_FUSED = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")


def numbers(text: object) -> tuple[int, ...]:
    """`5.24.0.dev0` → (5, 24, 0); what is no version → ()."""
    found = re.match(r"\d+(\.\d+)*", text) if isinstance(text, str) else None
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def refuse_too_old(installed: str | None = None) -> None:
    """Raises ConfigError where the installed transformers is older than any that merges are tested with."""
    found = installed or version("transformers")
    if numbers(found)[:2] < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ConfigError(
            f"transformers {found} is installed; merging needs {oldest} or newer",
            why="older ones have no single description of what save_pretrained writes",
            fix=f"pip install 'transformers>={oldest}'",
        )


def later_config(config: Mapping[str, Any], installed: str | None = None) -> Problem | None:
    """The problem that config.json was written by a transformers of a later major version."""
    written, here = config.get("transformers_version"), installed or version("transformers")
    if numbers(written)[:1] <= numbers(here)[:1]:
        return None
    return _problem(f"config.json was written by transformers {written}", here, numbers(written)[0])


def of_later_transformers(
    config: Mapping[str, Any], names: Iterable[str], problems: Sequence[Problem], installed: str | None = None
) -> tuple[Problem, ...]:
    """What explains the problems of a plan, where the checkpoint was trained under a later transformers.

    config: config.json; names: of the checkpoint's tensors; problems: those of their naming.
    """
    here = installed or version("transformers")
    if not problems or numbers(here) >= (5,):
        return ()
    stripped = (strip_wrappers(name) for name in names if _FUSED.search(name))
    fused = next((name for name in stripped if any(name in each.what for each in problems)), None)
    if fused is not None:
        return (_problem(f"the checkpoint holds in-memory names of transformers 5, {fused} for one", here, 5),)
    later = later_config(config, here)
    return (later,) if later else ()


def _problem(what: str, here: str, major: int) -> Problem:
    return Problem(
        f"{what}; {here} is installed",
        why=f"transformers {major} fuses and renames parts of its models, and has other keys in config.json",
        fix=f"pip install 'transformers>={major}'",
        kind="unsupported",
    )
