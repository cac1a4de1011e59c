"""The worked examples that CONTRIBUTING.md prints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def example(name: str, **known: Any) -> Any:
    """What the example that defines `name` defines, after running it as it is printed. known: by other examples."""
    blocks = re.findall(r"```python\n(.*?)```", _GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    for code in blocks:
        if re.search(rf"^(?:class )?{name}\b", code, re.MULTILINE):
            names: dict[str, Any] = dict(known)
            exec(compile(code, str(_GUIDE), "exec"), names)
            return names[name]
    raise LookupError(f"no example of {_GUIDE.name} defines {name}")
