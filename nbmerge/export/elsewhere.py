"""The receipt as it goes to the Hub: paths of this machine are cut to what means something elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

_KEPT = 3  # components: the run, its step, and the part of the model
_CUT = "…/"
_PATHS = {"path", "config_dir", "hf_model_config_path", "base_model", "lora_config", "placements"}
# A path in a sentence: from a slash at the start of a word to what no path is likely to hold.
_CHARS = r"[^\s'\"`()\[\]{}<>,;:]"
_IN_WORDS = re.compile(rf"(?<![^\s'\"`(\[{{<=:,;])(?:~[\w.-]*)?/{_CHARS}+")


def for_elsewhere(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """The receipt with its absolute paths, and those from a home or through `..`, cut to their last three components.

        /home/me/runs/grpo/global_step_100/actor  →  …/grpo/global_step_100/actor

    Paths of three components at most, below the directory of the merge, stay as they are.
    """
    known = sorted({path for path in _paths(receipt, "") if _is_of_here(path)}, key=len, reverse=True)
    return {key: _shown(value, known) for key, value in receipt.items()}


def _paths(value: object, key: str) -> Iterator[str]:
    """The strings that stand where a receipt has paths."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _paths(each, str(name))
    elif isinstance(value, list):
        for each in value:
            yield from _paths(each, key)
    elif isinstance(value, str) and key in _PATHS:
        yield value


def _is_of_here(path: str) -> bool:
    parts = PurePath(path).parts
    return path.startswith(("/", "~")) or ".." in parts or len(parts) > _KEPT


def _cut(path: str) -> str:
    """The last components, without those of the home directory."""
    home = Path.home()
    below = PurePath(path).relative_to(home) if home.name and PurePath(path).is_relative_to(home) else PurePath(path)
    parts = [part for part in below.parts if part not in ("/", "//", "..") and not part.startswith("~")]
    return _CUT + "/".join(parts[-_KEPT:])


def _shown(value: Any, known: list[str]) -> Any:
    """The value with all paths in it cut, those in sentences too."""
    if isinstance(value, Mapping):
        return {_words(str(key), known): _shown(each, known) for key, each in value.items()}
    if isinstance(value, list):
        return [_shown(each, known) for each in value]
    return _words(value, known) if isinstance(value, str) else value


def _words(text: str, known: list[str]) -> str:
    if text in known:
        return _cut(text)
    for path in known:  # one with a space in it, say
        if path.startswith("/") and path in text:
            text = re.sub(rf"{re.escape(path)}(?:/{_CHARS}+)?", lambda match: _cut(match[0]), text)
    return _IN_WORDS.sub(lambda match: _cut(match[0]), text)
