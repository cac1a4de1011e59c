"""Tab completion of a magic's line: options, their values, directories, and the notebook's variables after `$`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbmerge.arguments import with_underscores
from nbmerge.dtypes import BY_NAME

_MOST = 200  # entries of one directory that are offered
_QUOTES = "'\""


@dataclass(frozen=True, slots=True)
class Completions:
    """What could stand in place of `fragment`, the text before the cursor. kind: `path`, `param` or `value`."""

    fragment: str
    texts: tuple[str, ...]
    kind: str


@dataclass(frozen=True, slots=True)
class _Typed:
    """The words before the one at the cursor, and that word as it was typed, quotes and backslashes included."""

    before: tuple[str, ...]
    word: str


def complete_line(text: str, actions: Iterable[argparse.Action], names: Mapping[str, Any]) -> Completions:
    """What can follow `text`, the part of a magic's line before the cursor.

    actions: the options of the magic; names: the variables of the notebook.
    """
    typed = _typed(text)
    options = {flag: action for action in actions for flag in action.option_strings}
    flag, equals, value = typed.word.partition("=")
    if typed.word.startswith("-") and not equals:
        return Completions(typed.word, tuple(_flags(typed, options)), "param")
    if typed.word.startswith("--"):
        return _values(value, options.get(with_underscores(flag)), names)
    previous = options.get(with_underscores(typed.before[-1])) if typed.before else None
    if previous is not None and previous.nargs != 0:
        return _values(typed.word, previous, names)
    if not typed.word and _has_positional(typed.before, options):
        return Completions("", tuple(_flags(typed, options)), "param")
    return _values(typed.word, None, names)


def complete_option(text: str, actions: Iterable[argparse.Action], names: Mapping[str, Any]) -> Completions:
    """What can follow `text`, the part before the cursor of a line of a cell's body: an option and its value."""
    if text.startswith("-"):
        return complete_line(text, actions, names)
    name, space, rest = text.partition(" ")
    rest = rest.lstrip()
    found = complete_line(f"--{name} {rest.removeprefix('=').lstrip()}" if space else f"--{name}", actions, names)
    if space:
        return found
    return Completions(found.fragment[2:], tuple(one.removeprefix("--") for one in found.texts), found.kind)


def _typed(text: str) -> _Typed:
    words: list[str] = []
    start, quote, depth, at = -1, "", 0, 0
    while at < len(text):
        char = text[at]
        if start < 0 and not char.isspace():
            start = at
        if char == "\\" and quote != "'":
            at += 1
        elif quote:
            quote = "" if char == quote else quote
        elif char in _QUOTES:
            quote = char
        elif char in "{}":
            depth += 1 if char == "{" else -1
        elif char.isspace() and start >= 0 and depth <= 0:
            words.append(text[start:at])
            start = -1
        at += 1
    return _Typed(tuple(words), text[start:] if start >= 0 else "")


def _has_positional(before: tuple[str, ...], options: Mapping[str, argparse.Action]) -> bool:
    """Whether one of the words is neither an option nor an option's value."""
    takes_value = False
    for word in before:
        if word.startswith("-"):
            action = options.get(with_underscores(word))
            takes_value = action is not None and action.nargs != 0
        elif takes_value:
            takes_value = False
        else:
            return True
    return False


def _flags(typed: _Typed, options: Mapping[str, argparse.Action]) -> Iterator[str]:
    """The options that were not given yet, spelled with `-` where the user does."""
    given = {with_underscores(word.partition("=")[0]) for word in typed.before}
    dashes = "-" in typed.word[2:]
    for flag in sorted(options, key=lambda flag: flag == "--help"):  # help last, the rest in their order
        if flag in given or not flag.startswith("--"):
            continue
        spelled = "--" + flag[2:].replace("_", "-") if dashes else flag
        if spelled.startswith(typed.word):
            yield spelled


def _values(typed: str, action: argparse.Action | None, names: Mapping[str, Any]) -> Completions:
    """Values of an option; without one, checkpoints: directories and variables."""
    if typed.startswith("$"):
        found = (f"${name}" for name in sorted(names) if not name.startswith("_"))
        return Completions(typed, tuple(text for text in found if text.startswith(typed)), "value")
    choices: Iterable[Any] = (action.choices if action else None) or ()
    if action is not None and action.dest == "dtype":
        choices = [name for name, dtype in BY_NAME.items() if dtype.is_floating]
    if choices:
        return Completions(typed, tuple(str(one) for one in choices if str(one).startswith(typed)), "value")
    if action is None or action.metavar in ("DIR", "FILE", "CKPT", "OUT", "PATH"):
        files = action is not None and action.metavar == "FILE"
        return Completions(typed, tuple(_paths(typed, files=files)), "path")
    return Completions(typed, (), "value")


def _paths(typed: str, *, files: bool) -> Iterator[str]:
    """Directories, and files where they are wanted, that go on with what was typed, in the user's own quoting."""
    quote = typed[0] if typed[:1] in _QUOTES and typed else ""
    plain = typed[1:] if quote else typed.replace("\\ ", " ")
    parent, slash, begun = plain.rpartition("/")
    directory = Path(parent + slash or ".").expanduser()
    try:
        with os.scandir(directory) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries if entry.name.startswith(begun))
    except OSError:
        return
    for name, is_directory in found[:_MOST]:
        if (name.startswith(".") and not begun.startswith(".")) or not (is_directory or files):
            continue
        path = parent + slash + name + ("/" if is_directory else "")
        yield quote + path if quote else path.replace(" ", "\\ ")
