"""The magics of a notebook: `%load_ext nbmerge`, then `%nbmerge` lists them. A thin shell over the functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nbmerge.magics.commands import MAGICS, OBJECTS, Magic
from nbmerge.magics.completion import Completions, complete_line, complete_option

if TYPE_CHECKING:
    from IPython.core.completer import CompletionContext
    from IPython.core.interactiveshell import InteractiveShell

_MATCHER = "nbmerge.magics"


class Interrupted(KeyboardInterrupt):
    """The stop button was pressed. A notebook shows what that means, and no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"KeyboardInterrupt: {self}"]


def register(shell: InteractiveShell) -> None:
    """Adds the magics and their completion to a shell. Registering again replaces them."""
    from IPython.core.completer import context_matcher
    from IPython.core.magic import needs_local_scope, no_var_expand

    for magic in MAGICS.values():
        function = no_var_expand(needs_local_scope(_function(magic, shell)))
        shell.register_magic_function(function, "line_cell", magic.name)
    shell.register_magic_function(_overview, "line", "nbmerge")
    matcher = context_matcher(identifier=_MATCHER)(_matcher(shell))
    others = [one for one in shell.Completer.custom_matchers if getattr(one, "matcher_identifier", "") != _MATCHER]
    shell.Completer.custom_matchers = [matcher, *others]


def _function(magic: Magic, shell: InteractiveShell) -> Callable[..., object]:
    def function(line: str, cell: str = "", local_ns: Mapping[str, Any] | None = None) -> object:
        try:
            return magic.run(line, {**shell.user_ns, **(local_ns or {})}, cell)
        except KeyboardInterrupt as stop:
            raise Interrupted(str(stop) or magic.stopped) from None

    function.__name__ = function.__qualname__ = magic.name
    function.__doc__ = magic.help
    return function


def _overview(line: str) -> None:
    """Lists the magics of nbmerge with an example each."""
    width = max(len(magic.name) for magic in MAGICS.values()) + 1
    for magic in MAGICS.values():
        print(f"%{magic.name:{width}} {magic.summary}\n {'':{width}} {magic.example}\n")
    print(f"%NAME --help lists the options of a magic.\n{OBJECTS}")


_CELL = re.compile(rf"%%({'|'.join(MAGICS)})(?!\w)")
_CALL = re.compile(rf"(?:^\s*|%)({'|'.join(MAGICS)})(?=\s)")


def _matcher(shell: InteractiveShell) -> Callable[[CompletionContext], dict[str, Any]]:
    """IPython's completer asks this first. It says nothing on lines that are none of these magics."""

    def complete(context: CompletionContext) -> dict[str, Any]:
        from IPython.core.completer import SimpleCompletion

        found = _completed(context, shell)
        if found is None:
            return {"completions": [], "suppress": False}
        return {
            "completions": [SimpleCompletion(text=one, type=found.kind) for one in found.texts],
            "matched_fragment": found.fragment,
            "suppress": True,
            "ordered": True,
        }

    return complete


def _completed(context: CompletionContext, shell: InteractiveShell) -> Completions | None:
    """What could follow the cursor in one of the magics, on its line or in the body of its cell."""
    text = _logical_line(context)
    if call := _CALL.search(text):
        return complete_line(text[call.end() :].lstrip(), MAGICS[call[1]].actions, shell.user_ns)
    cell = _CELL.match(context.full_text)
    if cell is None or context.cursor_line == 0:
        return None
    return complete_option(text.lstrip(), MAGICS[cell[1]].actions, shell.user_ns)


def _logical_line(context: CompletionContext) -> str:
    """The text before the cursor, with the lines above that end in a backslash."""
    lines = context.full_text.split("\n")
    first = number = context.cursor_line
    while first > 0 and lines[first - 1].endswith("\\"):
        first -= 1
    above = [line[:-1] for line in lines[first:number]]
    return " ".join([*above, lines[number][: context.cursor_position]])
