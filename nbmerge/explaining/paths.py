"""Whether a text is a path: of something that is there, or of something that could be."""

from __future__ import annotations

import os
from pathlib import Path

from nbmerge.errors import OptionError, one_line

_LONGEST, _LONGEST_PART = 4095, 255  # bytes, as Linux has them


def is_there(text: str) -> bool:
    """Whether a text is a path of something; a message is too long for one, or has a zero byte."""
    try:
        return bool(text.strip()) and Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def is_like_a_path(text: str) -> bool:
    """Whether a text, of which nothing is there, was meant as a path: no sentence, no lines, and not too long."""
    if not text.strip() or not text.isprintable() or len(os.fsencode(text)) > _LONGEST:
        return False
    if any(len(os.fsencode(part)) > _LONGEST_PART for part in text.split("/")):
        return False
    if text.startswith(("/", "./", "../", "~")) or not any(char.isspace() for char in text):
        return True
    return "/" in text and ": " not in text


def path_of(subject: str | os.PathLike[str]) -> Path:
    """The path, with `~` put in. Raises OptionError for one that no file system has."""
    try:
        path = Path(subject).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise OptionError(
            f"this is no path: {one_line(str(error), limit=200)}", fix="pass the directory of a checkpoint"
        ) from error
    return path
