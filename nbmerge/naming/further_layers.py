"""Layers after the decoder's that predict further tokens: checkpoints carry them, and transformers does not load them.

Source of the names: deepseek-ai/DeepSeek-V3, whose layer 61 is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from typing import Any

_LAYER = re.compile(r"model\.(?:language_model\.)?layers\.(\d{1,9})\.")
# What such a layer holds beside a decoder layer, and where config.json says how many there are.
_OWN = ("eh_proj.weight", "enorm.weight", "hnorm.weight")
_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers")


def further_layers(names: Iterable[str], config: Mapping[str, Any], recorded: Set[str] = frozenset()) -> frozenset[str]:
    """Of published names, those of further layers.

    That there is one, config.json says; names that a receipt recorded as known and not loaded need no config.
    """
    first = _number(config, "num_hidden_layers")
    stop = first + max(_number(config, key) for key in _COUNTS)
    if first <= 0 or (stop <= first and not recorded):  # no further layer is known of: nearly every model
        return frozenset()
    layers: dict[str, set[str]] = {}
    for name in names:
        if match := _LAYER.match(name):
            layers.setdefault(match[0], set()).add(name)
    found: set[str] = set()
    for layer, members in layers.items():
        number = int(layer.rstrip(".").rpartition(".")[2])
        if first <= number and any(layer + own in members for own in _OWN):
            found |= members if number < stop else members & recorded
    return frozenset(found)


def _number(config: Mapping[str, Any], key: str) -> int:
    """A number of the config, or of its text part; 0 where neither has it."""
    text = config.get("text_config")
    values = [part.get(key) for part in (config, text) if isinstance(part, Mapping)]
    return next((value for value in values if isinstance(value, int)), 0)
