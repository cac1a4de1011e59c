"""What each magic is: its options, and the function of the package that it calls."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nbmerge import api
from nbmerge.arguments import HelpRequested, Parser, UsageError, add_options, given_options
from nbmerge.errors import OptionError
from nbmerge.explainer import explain
from nbmerge.export.hub import push_to_hub
from nbmerge.layout import Checkpoint
from nbmerge.magics.line import Line, split_line
from nbmerge.options import OPEN_OPTIONS, DiffOptions, ExplainOptions, MergeOptions, PushOptions, ValidateOptions
from nbmerge.plan import MergePlan
from nbmerge.report import MergeReport
from nbmerge.runs import Run, inspect

OBJECTS = """\
$name and {expression} stand for objects of the notebook: a path, an opened checkpoint, a plan, a value.
Options may be spelled with - or _. Quotes keep spaces; # begins a comment; Tab completes.
%%NAME at the top of a cell takes further options from the lines below, one on each: dtype = bfloat16"""


@dataclass(frozen=True)
class Magic:
    """A magic, of a line or of a cell. parsers: of its line; a second one takes `--local_dir PATH` in place of PATH."""

    name: str
    summary: str
    example: str
    act: Callable[[dict[str, Any]], object]
    parsers: tuple[Parser, ...]
    stopped: str = "stopped; nothing was changed"
    """What is said where the user stops it."""

    @property
    def help(self) -> str:
        """What `--help` and `?` show."""
        return f"{self.parsers[0].format_help()}\n{OBJECTS}\n\nexample:\n  {self.example}"

    @property
    def actions(self) -> list[argparse.Action]:
        """All options."""
        return [action for parser in self.parsers for action in parser.actions]

    def run(self, text: str, names: Mapping[str, Any], body: str = "") -> object:
        """What the line makes. names: the variables of the notebook; body: of its cell. Raises NbmergeError."""
        line = split_line(text, names, body)
        flags = {word.partition("=")[0].replace("-", "_") for word in line.words if word.startswith("--")}
        parser = self.parsers[-1 if "__local_dir" in flags else 0]
        try:
            given = vars(parser.parse(line.words))
        except HelpRequested:
            print(self.help)
            return None
        except UsageError as error:
            raise UsageError(line.readable(error.problem.what), error.usage) from None
        return self.act(_resolved(given, line))


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


def _inspect(values: dict[str, Any]) -> Checkpoint | Run:
    source = values["checkpoint"]
    if isinstance(source, Checkpoint):
        return source
    if not isinstance(source, str):
        raise _no_source(source, "a path")
    return inspect(source, **{name: values[name] for name in OPEN_OPTIONS})


def _validate(values: dict[str, Any]) -> object:
    options = given_options(argparse.Namespace(**values), ValidateOptions)
    return api.validate(values["model_dir"], checkpoint=values["checkpoint"], reference=values["reference"], **options)


def _diff(values: dict[str, Any]) -> object:
    return api.diff(values["a"], values["b"], **given_options(argparse.Namespace(**values), DiffOptions))


def _explain(values: dict[str, Any]) -> object:
    given = given_options(argparse.Namespace(**values), ExplainOptions)
    return explain(values["subject"], values["name"], **given)


def _push(values: dict[str, Any]) -> object:
    source = values["source"]
    if not isinstance(source, (str, MergeReport)):
        raise OptionError(f"a {type(source).__name__} is no directory", fix="pass a path, or a merge's report")
    return push_to_hub(source, values["repo_id"], **given_options(argparse.Namespace(**values), PushOptions))


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


def _validate_parser() -> Parser:
    parser = Parser("%validate_ckpt", "Prove that a Hugging Face directory is complete and right.")
    parser.usage = "%%validate_ckpt DIR [--checkpoint CKPT] [--reference REF] [options]"
    parser.add_argument("model_dir", metavar="DIR", help="the merged directory, or $name of a merge's report")
    parser.add_argument("--checkpoint", metavar="CKPT", help="the checkpoint that it was merged from")
    parser.add_argument("--reference", metavar="DIR", help="a model that it should be close to")
    add_options(parser, ValidateOptions)
    return parser


def _diff_parser() -> Parser:
    parser = Parser("%diff_ckpt", "Show which weights changed between two models, by how much, and where.")
    parser.usage = "%%diff_ckpt A B [options]"
    what = "a directory, a checkpoint, or $name of an object"
    parser.add_argument("a", metavar="A", help=f"the model before: {what}")
    parser.add_argument("b", metavar="B", help="the model after, likewise")
    add_options(parser, DiffOptions)
    return parser


def _explain_parser() -> Parser:
    parser = Parser("%explain_shapes", "Say why tensors do not fit a model: a checkpoint, an error, or two shapes.")
    parser.usage = "%%explain_shapes [PATH] [NAME] [options]"
    parser.add_argument(
        "subject", metavar="PATH", nargs="?", help="a checkpoint's directory, or $name of one, of a plan or an error"
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="the one tensor that is asked about")
    add_options(parser, ExplainOptions)
    return parser


def _push_parser() -> Parser:
    parser = Parser("%push_ckpt", "Upload a merged directory to the Hugging Face Hub.")
    parser.usage = "%%push_ckpt DIR USER/NAME [options]"
    parser.add_argument("source", metavar="DIR", help="the merged directory, or $name of a merge's report")
    parser.add_argument("repo_id", metavar="USER/NAME", help="the repository; it is made if need be")
    add_options(parser, PushOptions)
    return parser


def _magic(
    name: str, summary: str, arguments: str, act: Callable[[dict[str, Any]], object], add: Callable[[Parser], None],
    **more: str,
) -> Magic:  # fmt: skip
    return Magic(name, summary, f"%{name} {arguments}", act, _parsers(name, summary, add), **more)


MAGICS = {
    magic.name: magic
    for magic in (
        _magic(
            "merge_ckpt",
            "Merge a checkpoint into a Hugging Face directory, prove that it is complete, and return the report.",
            "global_step_100/actor --target_dir merged",
            _merge,
            _merge_parser,
            stopped="stopped; nothing stands under the target's name, and the same line takes the merge up again",
        ),
        _magic(
            "inspect_ckpt",
            "Show how a checkpoint is sharded, or what is where in a run's directory. No tensor data is read.",
            "global_step_100/actor",
            _inspect,
            _inspect_parser,
        ),
        Magic(
            "validate_ckpt",
            "Check a merged directory, prove every value against its checkpoint, and return the report.",
            "%validate_ckpt merged --checkpoint global_step_100/actor",
            _validate,
            (_validate_parser(),),
        ),
        Magic(
            "diff_ckpt",
            "Show which weights changed between two models, by how much, and where.",
            "%diff_ckpt Qwen3-8B global_step_100/actor",
            _diff,
            (_diff_parser(),),
        ),
        Magic(
            "explain_shapes",
            "Say why tensors do not fit a model: a checkpoint, an error, or two shapes.",
            "%explain_shapes --got 3600 --expected 3584 --ranks 24",
            _explain,
            (_explain_parser(),),
        ),
        Magic(
            "push_ckpt",
            "Upload a merged directory to the Hugging Face Hub, with a model card, if it passes its checks.",
            "%push_ckpt $report me/my-model --private",
            _push,
            (_push_parser(),),
            stopped="stopped; the repository is as it was, and the same line takes the upload up again",
        ),
    )
}
