"""One parser for the command line and the magics, made from the options dataclasses.

Flags are spelled with `_` or `-`, as the user likes.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Container, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from nbmerge.errors import OptionError


class HelpRequested(Exception):
    """`--help` was given; the message is the help."""


class UsageError(OptionError):
    """The words of a command do not fit its options. `usage` is its usage line."""

    def __init__(self, what: str, usage: str) -> None:
        self.usage = usage
        super().__init__(what, fix=usage)


class _HelpAction(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        raise HelpRequested(parser.format_help())


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises instead of exiting, so that a notebook's kernel lives."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog, description=description, add_help=False, allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100),
        )  # fmt: skip
        self.add_argument("-h", "--help", nargs=0, action=_HelpAction, help="show this help")

    @property
    def actions(self) -> list[argparse.Action]:
        """Every argument, for completion."""
        return list(self._actions)

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(message, f"{self.prog} --help lists the options")

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """The options of these words. Raises UsageError or HelpRequested."""
        found, unknown = self.parse_known_args([with_underscores(word) for word in words])
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        return found

    def _meant(self, unknown: Sequence[str]) -> str:
        """`; did you mean --target_dir?`, for flags that are nearly right."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        words = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        near = [match for word in words for match in difflib.get_close_matches(word, flags, n=1)]
        return f"; did you mean {' and '.join(dict.fromkeys(near))}?" if near else ""


def with_underscores(word: str) -> str:
    """`--max-shard-size=5GB` → `--max_shard_size=5GB`; what is no flag stays."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def add_options(parser: argparse.ArgumentParser, options: Any, names: Container[str] | None = None) -> None:
    """A flag for every field of an options dataclass, or for those that are named.

    A field's metadata may say its `type`, `choices`, `metavar` and `aliases`; one that is a list says nargs.
    """
    for item in fields(options):
        if names is not None and item.name not in names:
            continue
        keywords: dict[str, Any] = {"help": item.metadata["help"]}
        if isinstance(item.default, bool):
            keywords["action"] = "store_true"
        else:
            keywords["default"] = item.default
            keywords |= {name: item.metadata[name] for name in ("type", "nargs") if name in item.metadata}
            if choices := item.metadata.get("choices"):
                keywords["choices"] = choices
            keywords["metavar"] = item.metadata.get("metavar") or (None if choices else item.name.upper())
        parser.add_argument(*(f"--{name}" for name in (item.name, *item.metadata.get("aliases", ()))), **keywords)


def given_options(namespace: argparse.Namespace, options: Any) -> dict[str, Any]:
    """The fields of an options dataclass that a namespace has, as keywords of the function that takes them."""
    return {item.name: getattr(namespace, item.name) for item in fields(options) if hasattr(namespace, item.name)}
