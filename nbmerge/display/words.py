"""Numbers and names as people read them, the same in text and in HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath

from nbmerge.errors import plural

_BYTE_UNITS = ("kB", "MB", "GB", "TB", "PB")
_COUNT_UNITS = ("thousand", "million", "billion", "trillion")
NAME_LIMIT = 96  # characters of a tensor's name or a path that are shown
PROSE_LIMIT = 300  # characters of a sentence that holds names from a checkpoint


def byte_size(nbytes: float) -> str:
    """`80.6 kB`: decimal units, three digits; whole bytes below 1,000."""
    if nbytes < 1000:
        return f"{nbytes:.0f} B"
    return " ".join(_scaled(nbytes, _BYTE_UNITS))


def exact_bytes(nbytes: int) -> str:
    """`80.6 kB (80,640 bytes)`."""
    return plural(nbytes, "byte") if nbytes < 1000 else f"{byte_size(nbytes)} ({nbytes:,} bytes)"


def big_count(count: int, noun: str) -> str:
    """`7.62 billion parameters`; exact below a million."""
    if count < 1_000_000:
        return plural(count, noun)
    number, unit = _scaled(count, _COUNT_UNITS)
    return f"{number} {unit} {noun}s"


def _scaled(value: float, units: Sequence[str]) -> tuple[str, str]:
    """Three digits and the unit. Rounding never leaves 1,000 of a unit where there is a greater one."""
    value /= 1000
    place = 0
    while value >= 999.5 and place < len(units) - 1:
        value /= 1000
        place += 1
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{digits}f}", units[place]


def percent(part: float, whole: float) -> str:
    """`11.3%`; `<0.1%` for what is there and would round to nothing."""
    share = 100 * part / whole if whole else 0.0
    return "<0.1%" if 0 < share < 0.05 else f"{share:.1f}%"


def duration(seconds: float) -> str:
    """`0.12 s`, `35 s`, `4 min 20 s`."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:,} min {rest} s"


def shape_of(shape: Sequence[int]) -> str:
    """`[257, 18]`; `[]` for a 0-d tensor."""
    return elide(f"[{', '.join(map(str, shape))}]")


def visible(text: str) -> str:
    r"""The text with all that a screen would obey and not show written out: control and direction marks as `\x1b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def elide(text: str, limit: int = NAME_LIMIT) -> str:
    """At most `limit` characters of the visible text, with `…` in the middle for what is left out."""
    # A hostile name may have megabytes: both ends are enough, and an escape takes ten characters at most.
    shown = visible(text if len(text) <= 4 * limit else text[: 2 * limit] + text[-2 * limit :])
    if len(shown) <= limit and len(text) <= 4 * limit:
        return shown
    tail = limit // 2
    return f"{shown[: limit - tail - 1]}…{shown[-tail:]}"


def path_label(path: str) -> str:
    """The last part of a path, and the one before where that has no number: `actor` or the like."""
    parts = PurePath(path).parts
    keep = 1 if parts and any(char.isdigit() for char in parts[-1]) else 2
    return elide("/".join(parts[-keep:]))


def value_in_words(value: object) -> str:
    """A value of a config or an option, short."""
    if isinstance(value, Mapping):
        return elide(", ".join(f"{name}: {value_in_words(one)}" for name, one in list(value.items())[:20]))
    if isinstance(value, (list, tuple)):
        return elide(f"[{', '.join(value_in_words(one) for one in value[:20])}]")
    return elide(str(value))
