"""The line of a magic, split like a shell's, in which `$name` and `{expression}` stand for objects of the notebook.

    "my checkpoint" --target_dir {root / "out"}  # comment

Unlike IPython's own expansion, which replaces text before a magic sees it, this keeps paths with spaces whole,
takes objects (an opened checkpoint, a plan, a mapping), and refuses a name that does not exist.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nbmerge.errors import OptionError, listing

_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
_MARK = "\ue000"  # private use: stands in the words that argparse sees for an object that is no text
_STAND_IN = re.compile(f"{_MARK}(\\d+){_MARK}")
_ANY_STAND_IN = re.compile(r"(?:\ue000|\\ue000)(\d+)(?:\ue000|\\ue000)")  # also as repr() writes it
_ESCAPABLE = " \t\\'\"$#{}"  # before anything else a backslash is itself, as in C:\\models


@dataclass(frozen=True)
class Line:
    """The words of a line, and the objects that some of them stand for."""

    words: tuple[str, ...]
    objects: tuple[object, ...]

    def resolve(self, value: Any) -> Any:
        """The object that a word stands for; any other value as it is."""
        found = _STAND_IN.fullmatch(value) if isinstance(value, str) else None
        return self.objects[int(found[1])] if found else value

    def readable(self, text: str) -> str:
        """A message about the words, with `<Checkpoint>` where an object stands."""
        return _ANY_STAND_IN.sub(lambda found: f"<{type(self.objects[int(found[1])]).__name__}>", text)


@dataclass
class _Reader:
    """Reads a line from left to right."""

    text: str
    names: Mapping[str, Any]
    at: int = 0
    words: list[str] = field(default_factory=list)
    objects: list[object] = field(default_factory=list)
    word: list[str] | None = None  # the pieces of the word that is being read; None between words

    def read(self) -> Line:
        while self.at < len(self.text):
            char = self.text[self.at]
            if char.isspace():
                self._end_word()
                self.at += 1
            elif char == "#" and self.word is None:
                break
            elif char == "'":
                self._append(self._until_quote())
            elif char == '"':
                self._double_quoted()
            else:
                self._character(char)
        self._end_word()
        return Line(tuple(self.words), tuple(self.objects))

    def _append(self, piece: str) -> None:
        self.word = [*(self.word or []), piece]

    def _end_word(self) -> None:
        if self.word is not None:
            text = "".join(self.word)
            _refuse_mixed(text, self.objects)
            self.words.append(text)
        self.word = None

    def _until_quote(self) -> str:
        end = self.text.find("'", self.at + 1)
        if end < 0:
            raise _unclosed("'", self.text[self.at :])
        quoted = self.text[self.at + 1 : end]
        self.at = end + 1
        return quoted

    def _double_quoted(self) -> None:
        start = self.at
        self._append("")  # so that "" is a word
        self.at += 1
        while self.at < len(self.text) and self.text[self.at] != '"':
            self._character(self.text[self.at])
        if self.at == len(self.text):
            raise _unclosed('"', self.text[start:])
        self.at += 1

    def _character(self, char: str) -> None:
        """One character, or what it begins: an escape, a name, an expression."""
        following = self.text[self.at + 1 : self.at + 2]
        if char == "\\" and following and following in _ESCAPABLE:
            self._append(following)
            self.at += 2
        elif char in "${" and following == char:  # $$ and {{ are the characters themselves, as in IPython
            self._append(char)
            self.at += 2
        elif char == "$" and following == "{":
            self.at += 1
            self._expression()
        elif char == "{":
            self._expression()
        elif char == "$" and (name := _NAME.match(self.text, self.at + 1)):
            self.at = name.end()
            self._append_value(*_look_up(name[0], self.names))
        elif char == "}" and following == "}":
            self._append("}")
            self.at += 2
        else:
            self._append(char)
            self.at += 1

    def _expression(self) -> None:
        code = _expression_at(self.text, self.at)
        self.at += len(code) + 2
        self._append_value(_evaluate(code.strip(), self.names), "")

    def _append_value(self, value: object, rest: str) -> None:
        """What a name or an expression stands for: text where it has one, else a stand-in for the object."""
        if isinstance(value, (str, int, float, os.PathLike)) and not isinstance(value, bool):
            self._append(os.fspath(value) if isinstance(value, os.PathLike) else str(value))
        elif type(value).__module__ == "torch" and type(value).__name__ == "dtype":
            self._append(str(value))
        else:
            self._append(f"{_MARK}{len(self.objects)}{_MARK}")
            self.objects.append(value)
        if rest:
            self._append(rest)


def split_line(text: str, names: Mapping[str, Any], body: str = "") -> Line:
    """The words of a magic's line. names: those of the notebook; body: the rest of its cell, an option on each line.

    Single quotes keep everything as it is; double quotes keep spaces; a backslash keeps one character. A `;` at
    the end, which in a notebook silences a line, is no part of it. In the body an option may be written as on the
    line, or as `name value`, `name = value` or `name`.
    Raises OptionError for a name that does not exist, an expression that fails, and a quote without its end.
    """
    words: list[str] = []
    objects: list[object] = []
    for number, line in enumerate([text, *body.splitlines()]):
        found = _Reader(line.replace(_MARK, "").rstrip().removesuffix(";"), names, objects=objects).read().words
        words += found if number == 0 else _as_option(found)
    return Line(tuple(words), tuple(objects))


def _as_option(words: Sequence[str]) -> list[str]:
    """The words of a line of a cell's body as an option: `dtype = bfloat16` → `--dtype bfloat16`."""
    if not words or words[0].startswith("-"):
        return list(words)
    name, *values = words
    return [f"--{name}", *(values[1:] if values[:1] == ["="] else values)]


def _unclosed(quote: str, where: str) -> OptionError:
    return OptionError(
        f"a {quote} has no end", where=where.strip(), fix=f"close it with another {quote}, or write \\{quote}"
    )


def _refuse_mixed(word: str, objects: list[object]) -> None:
    """An object may be a word, or the value of `--option=`; inside other text it has no meaning."""
    value = word.partition("=")[2] if word.startswith("--") else word
    found = _STAND_IN.search(word)
    if found and not _STAND_IN.fullmatch(value):
        kind = type(objects[int(found[1])]).__name__
        raise OptionError(
            f"a {kind} cannot be part of a word", where=_STAND_IN.sub(f"<{kind}>", word),
            fix="pass it as a word of its own, or a path or a string in its place",
        )  # fmt: skip


def _expression_at(text: str, start: int) -> str:
    """The Python between `{` at `start` and its `}`; braces in strings and inner braces are part of it."""
    depth, at, quote = 0, start, ""
    while at < len(text):
        char = text[at]
        if quote:
            if char == "\\":
                at += 1
            elif char == quote:
                quote = ""
        elif char in "'\"":
            quote = char
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : at]
        at += 1
    raise OptionError(
        "a { has no end", where=text[start:].strip(), fix="close it with }, or write {{ for the character itself"
    )


def _look_up(dotted: str, names: Mapping[str, Any]) -> tuple[object, str]:
    """The object that `name.attribute` stands for, and the text after it that is no attribute (`$run.pt`)."""
    first, *attributes = dotted.split(".")
    if first not in names:
        near = difflib.get_close_matches(first, [name for name in names if not name.startswith("_")], n=3, cutoff=0.6)
        raise OptionError(
            f"the notebook has no variable {first!r}", where=f"${dotted}",
            why=f"near: {listing('$' + name for name in near)}" if near else "",
            fix=f"write ${near[0]}, or '${dotted}' in single quotes for the characters themselves"
            if near
            else f"define it in a cell above, or write '${dotted}' in single quotes for the characters themselves",
        )  # fmt: skip
    value = names[first]
    for number, attribute in enumerate(attributes):
        if not hasattr(value, attribute):
            return value, "." + ".".join(attributes[number:])
        value = getattr(value, attribute)
    return value, ""


def _evaluate(code: str, names: Mapping[str, Any]) -> object:
    """The value of an expression in the notebook; `{"a": 1}` is the mapping that it looks like."""
    try:
        try:
            compiled = compile(code, "{…}", "eval")
        except SyntaxError:
            compiled = compile("{" + code + "}", "{…}", "eval")
        return eval(compiled, dict(names))  # noqa: S307 - the user's own code in the user's own cell
    except Exception as error:
        raise OptionError(
            f"the expression fails: {type(error).__name__}: {error}", where="{" + code + "}",
            fix="correct it, or write '{…}' in single quotes for the characters themselves",
        ) from error  # fmt: skip
