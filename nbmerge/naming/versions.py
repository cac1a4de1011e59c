"""Says when a checkpoint or its config is of a later transformers than the installed one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from nbmerge.errors import ConfigError, Problem, listing
from nbmerge.explaining.candidates import Mismatch
from nbmerge.naming.prefixes import strip_wrappers
from nbmerge.naming.published import Named

OLDEST = (4, 57)
"""The oldest transformers that merges are tested with."""

# transformers 5 has the experts of a layer in one tensor each, and routers in `mlp` in every family (Mixtral).
_FUSED = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
_ONE_BY_ONE = re.compile(r"\.experts\.\d+\.")


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


def explained(named: Named, config: Mapping[str, Any], names: Iterable[str], installed: str | None = None) -> Named:
    """The outputs with the reason of their problems first, where the checkpoint was trained under a later transformers.

    Where it is certain it stands alone: what the installed version makes of such names and sizes would mislead.
    config: config.json; names: of the checkpoint's tensors.
    """
    here = installed or version("transformers")
    if not named.problems or numbers(here) >= (5,):
        return named
    stripped = (strip_wrappers(name) for name in names if _FUSED.search(name))
    fused = next((name for name in stripped if any(name in each.what for each in named.problems)), None)
    if fused is not None:
        reason = _problem(f"the checkpoint holds in-memory names of transformers 5, {fused} for one", here, 5)
        return _told(named, reason, is_certain=any(map(_ONE_BY_ONE.search, named.expected)))
    later = later_config(config, here)
    if later is None:
        return named
    unread = _unread_sizes(config, named.mismatches)
    said = listing(f"{name} {size:,}" for name, size in unread.items())
    where = f"config.json: {said}, which the tensors have and transformers {here} does not read" if unread else ""
    return _told(named, replace(later, where=where), is_certain=bool(unread))


def _told(named: Named, reason: Problem, *, is_certain: bool) -> Named:
    if is_certain:
        return replace(named, problems=(reason,), mismatches=(), diagnosis=None)
    return replace(named, problems=(reason, *named.problems))


def _unread_sizes(config: Mapping[str, Any], mismatches: Iterable[Mismatch]) -> dict[str, int]:
    """Sizes of config.json that the installed class has no key for, and that the tensors of other shapes all have."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    sizes = _without_key(config, CONFIG_MAPPING[kind]().to_dict()) if kind in CONFIG_MAPPING else {}
    used: set[int] = set()
    for got, expected in filter(None, (asked.shapes for asked in mismatches)):
        here = {a for a, b in zip(got, expected, strict=False) if a != b} & set(sizes.values())
        if not here:
            return {}
        used |= here
    return {name: size for name, size in sizes.items() if size in used}


def _without_key(config: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, int]:
    """The integers of a config, those of its text part too, that `known` has no key for."""
    text, known_text = config.get("text_config"), known.get("text_config")
    found = _without_key(text, known_text) if isinstance(text, dict) and isinstance(known_text, dict) else {}
    return found | {key: value for key, value in config.items() if type(value) is int and key not in known}


def _problem(what: str, here: str, major: int) -> Problem:
    return Problem(
        f"{what}; {here} is installed",
        why=f"transformers {major} fuses and renames parts of its models, and has other keys in config.json",
        fix=f"pip install 'transformers>={major}'",
        kind="unsupported",
    )
