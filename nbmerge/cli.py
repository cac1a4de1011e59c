"""`python -m nbmerge`: a thin shell over the functions. Exit code 0 only for a complete result."""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from nbmerge.arguments import HelpRequested, Parser, add_options, given_options
from nbmerge.errors import NbmergeError, OptionError, one_line, plural, summarise
from nbmerge.options import (
    OPEN_OPTIONS,
    DiffOptions,
    ExplainOptions,
    MergeOptions,
    PushOptions,
    ValidateOptions,
    expanded_path,
)

OK, PROBLEM, USAGE, INTERRUPTED = 0, 1, 2, 130
_PROGRAM = "python -m nbmerge"
_log = logging.getLogger(__name__)


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 complete, 1 a problem, 2 usage."""
    words = list(sys.argv[1:] if words is None else words)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name or a sign that the terminal cannot show is no failure
            stream.reconfigure(errors="backslashreplace")
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return OK if words else USAGE
    command = _COMMANDS.get(words[0])
    if command is None:
        print(f"{_PROGRAM}: no command {words[0]!r}\n\n{_overview()}", file=sys.stderr)
        return USAGE
    try:
        return command.run(words[1:])
    except HelpRequested as help_text:
        print(help_text)
        return OK
    except OptionError as error:
        print(f"{_PROGRAM} {words[0]}: {error}", file=sys.stderr)
        return USAGE
    except NbmergeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return PROBLEM
    except KeyboardInterrupt as stop:
        again = (
            "run the same command again to take up where it stopped" if words[0] in ("merge", "average", "push") else ""
        )
        print("; ".join(filter(None, ("interrupted", str(stop) or again))), file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return PROBLEM
    except Exception as error:  # noqa: BLE001 - what no one foresaw is told in a block too
        _log.debug("an error that no one foresaw", exc_info=True)
        print(
            f"internal error: {type(error).__name__}: {one_line(str(error))}\n"
            "  fix:   run it again with -v, which shows where, and report it",
            file=sys.stderr,
        )
        return PROBLEM


class _Command:
    def __init__(self, name: str, summary: str, act: Callable[[argparse.Namespace], int]) -> None:
        self.name, self.summary = name, summary
        self._act = act
        self.parser = Parser(f"{_PROGRAM} {name}", summary)
        self.parser.add_argument("-v", "--verbose", action="store_true", help="debug messages")

    def run(self, words: Sequence[str]) -> int:
        options = self.parser.parse(words)
        if options.verbose:
            logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
            logging.getLogger("nbmerge").setLevel(logging.DEBUG)
        return self._act(options)


def _overview() -> str:
    lines = [f"usage: {_PROGRAM} COMMAND --help", "", "commands:"]
    return "\n".join(lines + [f"  {name:8} {command.summary}" for name, command in _COMMANDS.items()])


def _merge(options: argparse.Namespace) -> int:
    import nbmerge

    given = given_options(options, MergeOptions)
    _say_what_is_not_needed(given)
    report = nbmerge.merge(options.local_dir, options.target_dir, **given)
    print(report)
    return OK


def _inspect(options: argparse.Namespace) -> int:
    """1 where a directory of a run does not hold what it should."""
    import nbmerge

    given = {name: value for name, value in given_options(options, MergeOptions).items() if name in OPEN_OPTIONS}
    found = nbmerge.inspect(options.path, **given)
    print(found)
    return PROBLEM if isinstance(found, nbmerge.Run) and not all(each.is_whole for each in found) else OK


def _average(options: argparse.Namespace) -> int:
    import nbmerge

    given = given_options(options, MergeOptions)
    report = nbmerge.average(options.checkpoints, options.target_dir, **given)
    print(report)
    return OK


def _push(options: argparse.Namespace) -> int:
    import nbmerge

    print(nbmerge.push_to_hub(options.model_dir, options.repo_id, **given_options(options, PushOptions)))
    return OK


def _test(options: argparse.Namespace) -> int:
    """verl's `test`: what the merge would write, against a directory, within verl's tolerances."""
    import nbmerge
    from nbmerge.validation.against import compare_unmerged

    given = given_options(options, MergeOptions)
    _say_what_is_not_needed(given)
    plan = nbmerge.plan_merge(options.local_dir, **given)
    outcome = compare_unmerged(plan, options.test_hf_dir)
    if outcome.findings:
        lines = summarise([finding.as_problem() for finding in outcome.findings])
        print(
            "\n".join([f"{plural(len(outcome.findings), 'difference')} from {options.test_hf_dir}", *lines]),
            file=sys.stderr,
        )
        return PROBLEM
    print(f"equal: {plural(len(plan.tensors), 'tensor')}, {plan.data_bytes:,} bytes; {outcome.said}")
    return OK


def _validate(options: argparse.Namespace) -> int:
    import nbmerge

    given = given_options(options, ValidateOptions)
    checkpoints = options.checkpoint or [None]
    checkpoint = checkpoints[0] if len(checkpoints) == 1 else checkpoints
    report = nbmerge.validate(options.model_dir, checkpoint=checkpoint, reference=options.reference, **given)
    print(report)
    return OK if report.ok else PROBLEM


def _diff(options: argparse.Namespace) -> int:
    """1 where a tensor that was declared frozen moved."""
    import nbmerge

    found = nbmerge.diff(options.a, options.b, **given_options(options, DiffOptions))
    print(found)
    return PROBLEM if found.frozen_moved else OK


def _explain(options: argparse.Namespace) -> int:
    """1 where something does not fit, or cannot be read."""
    import nbmerge

    found = nbmerge.explain(options.subject, options.name, **given_options(options, ExplainOptions))
    print(found)
    return OK if found.fits else PROBLEM


def _demo(options: argparse.Namespace) -> int:
    from nbmerge.demo import run

    return run(expanded_path(options.dir) if options.dir else None)


def _say_what_is_not_needed(given: dict[str, Any]) -> None:
    if given["use_cpu_initialization"]:
        print("--use_cpu_initialization is not needed any more: a merge never uses a GPU", file=sys.stderr)


# What shapes the tensors that are compared, and verl's flags that a test does not need.
_TEST_OPTIONS = {
    *OPEN_OPTIONS, "dtype", "dialect", "is_value_model", "tie_word_embedding", "base_model", "lora",
    "lora_alpha", "lora_config", "fold_precision", "weights", "hf_upload_path", "private", "use_cpu_initialization",
}  # fmt: skip


# `--weights` are those of the average; DeepSpeed's are for who opens the checkpoints in Python.
_AVERAGE_OPTIONS = set(MergeOptions.__dataclass_fields__) - {"weights", "use_cpu_initialization"}


def _commands() -> dict[str, _Command]:
    merge = _Command("merge", "merge a checkpoint into a Hugging Face directory", _merge)
    merge.parser.add_argument("--local_dir", required=True, metavar="CKPT", help="the checkpoint's directory")
    merge.parser.add_argument(
        "--target_dir", default="tmp", metavar="OUT", help="the directory to write; must not exist (default: tmp)"
    )
    add_options(merge.parser, MergeOptions)
    inspect = _Command("inspect", "show how a checkpoint is sharded, or what is where in a run's directory", _inspect)
    inspect.parser.add_argument("path", metavar="PATH", help="a checkpoint, or a directory that holds several")
    add_options(inspect.parser, MergeOptions, set(OPEN_OPTIONS))
    average = _Command("average", "merge the mean of several checkpoints of one model", _average)
    average.parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="directories of checkpoints or models")
    average.parser.add_argument("--target_dir", required=True, metavar="OUT", help="the directory to write")
    average.parser.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="one for each checkpoint; default: all equal"
    )
    add_options(average.parser, MergeOptions, _AVERAGE_OPTIONS)
    test = _Command("test", "compare what a merge would write with a directory, as verl's test does", _test)
    test.parser.add_argument("--local_dir", required=True, metavar="CKPT", help="the checkpoint's directory")
    test.parser.add_argument("--test_hf_dir", required=True, metavar="REF", help="the directory to compare with")
    add_options(test.parser, MergeOptions, _TEST_OPTIONS)
    validate = _Command("validate", "check a merged directory, and every value against its checkpoint", _validate)
    validate.parser.add_argument("model_dir", metavar="DIR", help="the merged directory")
    validate.parser.add_argument(
        "--checkpoint", action="append", metavar="CKPT",
        help="the checkpoint that it was merged from; of an average, once for each",
    )  # fmt: skip
    validate.parser.add_argument("--reference", metavar="REF", help="a model that it should be close to")
    add_options(validate.parser, ValidateOptions)
    diff = _Command("diff", "show which weights changed between two models, by how much, and where", _diff)
    diff.parser.add_argument("a", metavar="A", help="the model before: a directory, or a checkpoint")
    diff.parser.add_argument("b", metavar="B", help="the model after, likewise")
    add_options(diff.parser, DiffOptions)
    explain = _Command(
        "explain", "say why tensors do not fit a model: a checkpoint, an error's text, or shapes", _explain
    )
    explain.parser.add_argument(
        "subject", metavar="PATH", nargs="?", help="a checkpoint's directory, or an error's text"
    )
    explain.parser.add_argument("name", metavar="NAME", nargs="?", help="the one tensor that is asked about")
    add_options(explain.parser, ExplainOptions)
    push = _Command("push", "upload a merged directory to the Hugging Face Hub", _push)
    push.parser.add_argument("model_dir", metavar="DIR", help="the merged directory")
    push.parser.add_argument("repo_id", metavar="USER/NAME", help="the repository; it is made if need be")
    add_options(push.parser, PushOptions)
    demo = _Command("demo", "make a small real FSDP checkpoint, merge it, and prove the result", _demo)
    demo.parser.add_argument("--dir", metavar="DIR", help="keep checkpoint and result in this new directory")
    return {command.name: command for command in (inspect, merge, average, validate, test, diff, explain, push, demo)}


_COMMANDS = _commands()
