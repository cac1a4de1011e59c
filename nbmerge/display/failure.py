"""An error as a notebook shows it: a few lines that end with the fix, and no traceback."""

from __future__ import annotations

from nbmerge.display.words import elide

_LINES = 12
_WIDTH = 400  # characters of a line; a sentence with a path fits, a hostile name does not fill the cell


def short_lines(name: str, message: str) -> list[str]:
    """The error's class and message in at most twelve lines. The first and the last ones stay; the middle gives way."""
    lines = [elide(line.expandtabs(), _WIDTH) for line in f"{name}: {message}".split("\n")]
    if len(lines) <= _LINES:
        return lines
    tail = 3
    head = _LINES - tail - 1
    return [*lines[:head], f"… {len(lines) - head - tail:,} more lines in the error's text", *lines[-tail:]]
