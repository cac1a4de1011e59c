"""The magics of a notebook: `%load_ext nbmerge`, then `%nbmerge` lists them. A thin shell over the functions."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbmerge import api
from nbmerge.arguments import HelpRequested, Parser, UsageError, add_options, given_options
from nbmerge.errors import OptionError
from nbmerge.layout import Checkpoint
from nbmerge.magics.completion import complete_line
from nbmerge.magics.line import Line, split_line
from nbmerge.opening import open_checkpoint
from nbmerge.options import OPEN_OPTIONS, MergeOptions
from nbmerge.plan import MergePlan

if TYPE_CHECKING:
    from IPython.core.completer import CompletionContext
    from IPython.core.interactiveshell import InteractiveShell

_MATCHER = "nbmerge.magics"
_OBJECTS = """\
$name and {expression} stand for objects of the notebook: a path, an opened checkpoint, a plan, a value.
Options may be spelled with - or _. Quotes keep spaces; # begins a comment; Tab completes."""


@dataclass(frozen=True)
class Magic:
    """A line magic. parsers: with PATH as the first word, and with `--local_dir PATH` in its place."""

    name: str
    summary: str
    example: str
    act: Callable[[dict[str, Any]], object]
    parsers: tuple[Parser, Parser]

    @property
    def help(self) -> str:
        """What `--help` and `?` show."""
        return f"{self.parsers[0].format_help()}\n{_OBJECTS}\n\nexample:\n  {self.example}"

    @property
    def actions(self) -> list[argparse.Action]:
        """All options."""
        return [action for parser in self.parsers for action in parser.actions]

    def run(self, text: str, names: Mapping[str, Any]) -> object:
        """What the line makes. names: the variables of the notebook. Raises NbmergeError."""
        line = split_line(text, names)
        flags = {word.partition("=")[0].replace("-", "_") for word in line.words if word.startswith("--")}
        parser = self.parsers["__local_dir" in flags]
        try:
            given = vars(parser.parse(line.words))
        except HelpRequested:
            print(self.help)
            return None
        except UsageError as error:
            raise UsageError(line.readable(error.problem.what), error.usage) from None
        return self.act(_resolved(given, line))


def register(shell: InteractiveShell) -> None:
    """Adds the magics and their completion to a shell. Registering again replaces them."""
    from IPython.core.completer import context_matcher
    from IPython.core.magic import needs_local_scope, no_var_expand

    for magic in MAGICS.values():
        function = no_var_expand(needs_local_scope(_function(magic, shell)))
        shell.register_magic_function(function, "line", magic.name)
    shell.register_magic_function(_overview, "line", "nbmerge")
    matcher = context_matcher(identifier=_MATCHER)(_matcher(shell))
    others = [one for one in shell.Completer.custom_matchers if getattr(one, "matcher_identifier", "") != _MATCHER]
    shell.Completer.custom_matchers = [matcher, *others]


def _function(magic: Magic, shell: InteractiveShell) -> Callable[..., object]:
    def function(line: str, local_ns: Mapping[str, Any] | None = None) -> object:
        return magic.run(line, {**shell.user_ns, **(local_ns or {})})

    function.__name__ = function.__qualname__ = magic.name
    function.__doc__ = magic.help
    return function


def _overview(line: str) -> None:
    """Lists the magics of nbmerge with an example each."""
    width = max(len(magic.name) for magic in MAGICS.values()) + 1
    for magic in MAGICS.values():
        print(f"%{magic.name:{width}} {magic.summary}\n {'':{width}} {magic.example}\n")
    print(f"%NAME --help lists the options of a magic.\n{_OBJECTS}")


def _resolved(given: dict[str, Any], line: Line) -> dict[str, Any]:
    """The options, with objects in place of their stand-ins, and one `checkpoint` however it was given."""
    values = {name: line.resolve(value) for name, value in given.items()}
    if "local_dir" in values:
        values["checkpoint"] = values.pop("local_dir")
    return values


def _merge(values: dict[str, Any]) -> object:
    source = values["checkpoint"]
    if not isinstance(source, (str, Checkpoint, MergePlan)):
        raise _no_source(source, "a path, an opened checkpoint, or a plan")
    options = given_options(argparse.Namespace(**values), MergeOptions)
    if options["use_cpu_initialization"]:
        print("--use_cpu_initialization is not needed any more: a merge never uses a GPU")
    return api.merge(source, values["target_dir"], **options)


def _inspect(values: dict[str, Any]) -> Checkpoint:
    source = values["checkpoint"]
    if isinstance(source, Checkpoint):
        return source
    if not isinstance(source, str):
        raise _no_source(source, "a path")
    return open_checkpoint(source, **{name: values[name] for name in OPEN_OPTIONS})


def _no_source(source: object, wanted: str) -> OptionError:
    return OptionError(f"a {type(source).__name__} is no checkpoint", fix=f"pass {wanted}")


def _parsers(name: str, summary: str, add_options: Callable[[Parser], None]) -> tuple[Parser, Parser]:
    """The parser for `%name PATH …`, and the one for `%name --local_dir PATH …`, as the command line spells it."""
    by_position = Parser(f"%{name}", f"{summary} --local_dir PATH is accepted in place of PATH.")
    by_position.add_argument("checkpoint", metavar="PATH", help="the checkpoint's directory, or $name of an object")
    by_option = Parser(f"%{name}", summary)
    by_option.add_argument("--local_dir", metavar="PATH", required=True, help="the checkpoint's directory")
    by_position.usage = f"%%{name} PATH [options]"  # the list of all options follows anyway
    for parser in (by_position, by_option):
        add_options(parser)
    return by_position, by_option


def _merge_parser(parser: Parser) -> None:
    parser.add_argument("--target_dir", metavar="DIR", help="the directory to write; must not exist")
    add_options(parser, MergeOptions)


def _inspect_parser(parser: Parser) -> None:
    """The options of `open_checkpoint`: those of a merge that it takes."""
    add_options(parser, MergeOptions, OPEN_OPTIONS)


def _magic(
    name: str, summary: str, arguments: str, act: Callable[[dict[str, Any]], object], add: Callable[[Parser], None]
) -> Magic:
    return Magic(name, summary, f"%{name} {arguments}", act, _parsers(name, summary, add))


MAGICS = {
    magic.name: magic
    for magic in (
        _magic(
            "merge_ckpt",
            "Merge a checkpoint into a Hugging Face directory, prove that it is complete, and return the report.",
            "global_step_100/actor --target_dir merged",
            _merge,
            _merge_parser,
        ),
        _magic(
            "inspect_ckpt",
            "Show how a checkpoint is sharded, and return it. No tensor data is read.",
            "global_step_100/actor",
            _inspect,
            _inspect_parser,
        ),
    )
}

_CALL = re.compile(rf"(?:^\s*|%)({'|'.join(MAGICS)})(?=\s)")


def _matcher(shell: InteractiveShell) -> Callable[[CompletionContext], dict[str, Any]]:
    """IPython's completer asks this first. It says nothing on lines that are none of these magics."""

    def complete(context: CompletionContext) -> dict[str, Any]:
        from IPython.core.completer import SimpleCompletion

        text = _logical_line(context)
        call = _CALL.search(text)
        if call is None:
            return {"completions": [], "suppress": False}
        found = complete_line(text[call.end() :].lstrip(), MAGICS[call[1]].actions, shell.user_ns)
        return {
            "completions": [SimpleCompletion(text=one, type=found.kind) for one in found.texts],
            "matched_fragment": found.fragment,
            "suppress": True,
            "ordered": True,
        }

    return complete


def _logical_line(context: CompletionContext) -> str:
    """The text before the cursor, with the lines above that end in a backslash."""
    lines = context.full_text.split("\n")
    first = number = context.cursor_line
    while first > 0 and lines[first - 1].endswith("\\"):
        first -= 1
    above = [line[:-1] for line in lines[first:number]]
    return " ".join([*above, lines[number][: context.cursor_position]])
