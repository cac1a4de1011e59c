"""Reads what the user says about placements: `{"*.weight": ["Replicate", "Shard(0)"]}`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from nbmerge.errors import OptionError
from nbmerge.geometry import REPLICATE, Placement
from nbmerge.options import expanded_path

_SHARD = re.compile(
    r"_?(?:Shard|StridedShard)\(\s*(?:dim\s*=\s*)?(\d+)\s*(?:,\s*(?:sf|split_factor)\s*=\s*(\d+)\s*)?\)"
)


def read_placements(given: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, tuple[Placement, ...]]:
    """Placements by name pattern, from a mapping or a JSON file of one. Raises OptionError."""
    content: Any = given
    if not isinstance(given, Mapping):
        path = expanded_path(os.fspath(given))
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OptionError(
                f"the placements cannot be read: {error}", where=str(path),
                fix='a JSON file such as {"*": ["Shard(0)"]}',
            ) from error  # fmt: skip
    if not isinstance(content, Mapping):
        raise OptionError("the placements are no mapping", fix='for example {"*": ["Shard(0)"]}')
    return {
        str(pattern): tuple(_placement(one) for one in (value if isinstance(value, (list, tuple)) else [value]))
        for pattern, value in content.items()
    }


def _placement(text: object) -> Placement:
    if str(text).strip().startswith("Replicate"):
        return REPLICATE
    match = _SHARD.fullmatch(str(text).strip())
    if not match:
        raise OptionError(f"{text!r} is no placement", fix="Replicate, Shard(0), or StridedShard(0, sf=2)")
    return Placement("shard", int(match[1]), int(match[2] or 1))
