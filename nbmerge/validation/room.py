"""How much memory is free: of the machine, or of the container that this process may not outgrow."""

from __future__ import annotations

import os
import re
from pathlib import Path

# A container sees its own limit here: version 2 and version 1 of Linux' control groups.
_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory() -> int | None:
    """Bytes that can be used without swapping or being killed; None where nothing tells."""
    known = [size for size in (_of_machine(), _of_container()) if size is not None]
    return min(known, default=None)


def _of_machine() -> int | None:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(Path("/proc/meminfo")), re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    try:  # macOS has no number of available pages; half of all memory is what a person would guess
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return None


def _of_container() -> int | None:
    for folder, limit, usage, cache in _GROUPS:
        numbers = [_text(folder / name).strip() for name in (limit, usage)]
        if all(number.isdecimal() for number in numbers):
            reclaimable = re.search(rf"^{cache} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
            return max(int(numbers[0]) - int(numbers[1]) + (int(reclaimable[1]) if reclaimable else 0), 0)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
