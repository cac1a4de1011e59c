"""The two spellings of CLIP's and SigLIP's vision towers: with `vision_model.` in every name, and without.

transformers 4 and the files on the Hub have it, in memory and published; transformers 5 has it in neither
(conversion_mapping.py, CLIPVisionModel), and reads both.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

_T = TypeVar("_T")
_PART = re.compile(r"(?:^|(?<=\.))vision_model\.")


def spellings(known: Iterable[str]) -> dict[str, str]:
    """How a model spells its tensors, by their names without `vision_model.`; nothing for those that would be one."""
    found: dict[str, list[str]] = {}
    for name in known:
        found.setdefault(_PART.sub("", name), []).append(name)
    return {bare: names[0] for bare, names in found.items() if len(names) == 1}


def spelled(name: str, spelling: Mapping[str, str]) -> str:
    """The name as the model spells it; one that it has in neither spelling as it is. spelling: from `spellings`."""
    return spelling.get(_PART.sub("", name), name)


def respelled(tensors: Mapping[str, _T], known: Collection[str]) -> dict[str, _T]:
    """The tensors under the names that the model has for them, unless it has another tensor by that name already."""
    unknown = [name for name in tensors if name not in known]
    spelling = spellings(known) if unknown else {}
    taken = set(tensors)
    news: dict[str, str] = {}
    for name in unknown:
        new = spelled(name, spelling)
        if new not in taken:
            taken.add(new)
            news[name] = new
    return {news.get(name, name): tensor for name, tensor in tensors.items()}
