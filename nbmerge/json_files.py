"""Reads small JSON files that may be missing or hold anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none, or nothing that is one."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # the last for brackets in brackets
        return {}
    return content if isinstance(content, dict) else {}
