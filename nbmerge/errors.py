"""What can go wrong, as exceptions. Each says what, where, why and the fix, in that order.

Each class also subclasses the builtin that a caller would expect.

NbmergeError
├── OptionError (ValueError)                  an option's value, or two options that exclude each other
├── NotACheckpointError (FileNotFoundError)   no such directory, or nothing in it that a loader knows
├── CheckpointError (ValueError)              a checkpoint that cannot be read as it is
│   ├── IncompleteCheckpointError             files or parts of tensors are missing
│   ├── CorruptFileError                      a file is cut short or damaged
│   ├── InconsistentCheckpointError           ranks contradict each other
│   ├── AmbiguousCheckpointError              the evidence does not decide
│   └── UnsupportedCheckpointError            a layout that carries too little, or that this version does not read
├── UnsafePickleError (pickle.UnpicklingError)  a pickle names something outside the allow-list
├── ConfigError (ValueError)                  the model's config.json is missing or makes no model
├── PlanError (ValueError)                    the plan has problems; all are listed
├── TargetError (FileExistsError)             the target cannot be written, or must not be overwritten
├── NotSupportedError (NotImplementedError)   something that this version does not do yet
├── SpaceError (OSError)                      the disk is too small, or became full
├── HubError (ConnectionError)                the Hub refuses, or cannot be reached
└── VerificationError (ValueError)            what was written is not what was planned
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. Checks collect these, so that a report lists all of them.

    what: the fact, with its numbers; where: tensor, rank, file; why: the cause, where it is known;
    fix: what the user can do; kind: `missing`, `contradiction`, `ambiguous`, `unsupported` or `` (other).
    """

    what: str
    where: str = ""
    why: str = ""
    fix: str = ""
    kind: str = ""

    def lines(self) -> list[str]:
        """The problem as text, a line for each part that is known."""
        labelled = (("where", self.where), ("why", self.why), ("fix", self.fix))
        return [one_line(self.what), *(f"  {label + ':':7}{one_line(text)}" for label, text in labelled if text)]


class NbmergeError(Exception):
    """Root of the tree. `what` is the first line; `where`, `why` and `fix` follow it.

    problems: where a check found several things, all of them; the message lists the first of each kind.
    """

    def __init__(
        self, what: str, *, where: str = "", why: str = "", fix: str = "", problems: Sequence[Problem] = ()
    ) -> None:
        self.problem = Problem(what, where, why, fix)
        self.problems = tuple(problems) or (self.problem,)
        super().__init__("\n".join([*self.problem.lines(), *summarise(problems)]))

    def __str__(self) -> str:  # FileNotFoundError and OSError would show their errno form
        return str(self.args[0])

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback: at most twelve lines, of which the last is the fix."""
        return abridged(f"{type(self).__name__}: {self}".split("\n"))


class OptionError(NbmergeError, ValueError):
    """An option's value is wrong, or two options exclude each other."""


class NotACheckpointError(NbmergeError, FileNotFoundError):
    """There is no such directory, or nothing in it that a loader recognises."""


class CheckpointError(NbmergeError, ValueError):
    """A checkpoint that cannot be read as it is."""


class IncompleteCheckpointError(CheckpointError):
    """Files, or parts of tensors, are missing."""


class CorruptFileError(CheckpointError):
    """A file is cut short or damaged."""


class InconsistentCheckpointError(CheckpointError):
    """Two ranks contradict each other."""


class AmbiguousCheckpointError(CheckpointError):
    """The evidence in the files does not decide what they mean."""


class UnsupportedCheckpointError(CheckpointError):
    """The layout carries too little to be merged, or this version does not read it."""


class UnsafePickleError(NbmergeError, pickle.UnpicklingError):
    """A pickle names something outside the allow-list; nothing of it was run."""


class ConfigError(NbmergeError, ValueError):
    """config.json is missing, or no model can be made from it."""


class TargetError(NbmergeError, FileExistsError):
    """The target directory cannot be written, or must not be overwritten."""


class NotSupportedError(NbmergeError, NotImplementedError):
    """Something that this version does not do yet."""


class SpaceError(NbmergeError, OSError):
    """The disk is too small for the result, or became full."""


class HubError(NbmergeError, ConnectionError):
    """The Hugging Face Hub refuses an upload, or cannot be reached."""


class VerificationError(NbmergeError, ValueError):
    """What was written is not what was planned; the target was not published."""


class PlanError(NbmergeError, ValueError):
    """A plan has problems; all of them are in `problems`. plan: the plan itself, which `nbmerge.explain` looks at."""

    plan: object = None


def abridged(lines: list[str], *, most: int = 12, tail: int = 3) -> list[str]:
    """At most so many lines: the first and the last ones stay, the middle gives way."""
    head = most - tail - 1
    if len(lines) <= most:
        return lines
    return [*lines[:head], f"… {len(lines) - head - tail:,} more lines in the error's text", *lines[-tail:]]


def plural(count: int, noun: str) -> str:
    """`1 problem`, `3 problems`, `2 entries`."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun[:-1]}ies" if re.search("[^aeiou]y$", noun) else f"{count:,} {noun}s"


def listing(names: Iterable[object], *, shown: int = 3) -> str:
    """`a, b, c and 4 more`: a list of names that stays short."""
    every = [str(name) for name in names]
    head = ", ".join(every[:shown])
    return head if len(every) <= shown else f"{head} and {len(every) - shown:,} more"


def one_line(text: str, *, limit: int = 600) -> str:
    """Text that may hold a checkpoint's names, on one line: control characters shown, overlong text cut."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return shown if len(shown) <= limit else f"{shown[: limit // 2]}…{shown[-limit // 2 :]}"


def summarise(problems: Sequence[Problem], *, shown: int = 3) -> list[str]:
    """The lines of the first problems of each kind, and how many more there are of it.

    Two problems are of one kind when they have the same cause and fix.
    """
    kinds: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        kinds.setdefault((problem.why, problem.fix), []).append(problem)
    lines: list[str] = []
    for (why, fix), members in kinds.items():
        lines += [f"- {problem.what}" + (f" ({problem.where})" if problem.where else "") for problem in members[:shown]]
        if len(members) > shown:
            lines.append(f"- … and {len(members) - shown:,} more like these")
        lines += [f"  {label}: {text}" for label, text in (("why", why), ("fix", fix)) if text]
    return [one_line(line) for line in lines]
