"""What a check finds, and what it says of what it looked at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from nbmerge.errors import Problem

if TYPE_CHECKING:
    from nbmerge.validation.subject import Subject

ERROR, WARNING = "error", "warning"  # an error makes a report not ok; a warning is for a person to judge
PASSED, FAILED, WARNED, SKIPPED = "passed", "failed", "warned", "not run"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be.

    what: the sentence that all findings of its kind share, said of the subject (`holds NaN`); subject: the tensor or
    the file; detail: the numbers of this one (`3 of 4,096 elements, the first at [0, 7]`); why: the cause, where it is
    known; fix: the remedy; severity: ERROR or WARNING.
    """

    what: str
    subject: str = ""
    detail: str = ""
    why: str = ""
    fix: str = ""
    severity: str = ERROR

    def as_problem(self) -> Problem:
        """The same, as errors list it."""
        what = " ".join(filter(None, (self.subject, self.what)))
        return Problem(what, self.detail, self.why, self.fix)


@dataclass(frozen=True, slots=True)
class FindingGroup:
    """Findings of one kind: the same sentence, cause, remedy and severity. The first one stands for all."""

    members: tuple[Finding, ...]

    @property
    def first(self) -> Finding:
        """The one that says what, why and fix."""
        return self.members[0]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check did. said: what it looked at, with numbers, or why it was not run; ran: whether it was.

    share: of the bytes that it was to look at, how many it looked at; below 1 for a sample.
    """

    findings: tuple[Finding, ...] = ()
    said: str = ""
    ran: bool = True
    share: float = 1.0


@dataclass(frozen=True)
class CheckResult:
    """A check's outcome under its name. title: what it proves, in words."""

    name: str
    title: str
    outcome: Outcome
    seconds: float = 0.0

    @cached_property
    def groups(self) -> tuple[FindingGroup, ...]:
        """Its findings by kind, errors first, in the order in which each kind was found."""
        kinds: dict[tuple[str, ...], list[Finding]] = {}
        for finding in self.outcome.findings:
            kinds.setdefault((finding.severity, finding.what, finding.why, finding.fix), []).append(finding)
        found = (FindingGroup(tuple(members)) for members in kinds.values())
        return tuple(sorted(found, key=lambda group: group.first.severity != ERROR))

    @property
    def errors(self) -> int:
        """How many of its findings are errors."""
        return sum(len(group.members) for group in self.groups if group.first.severity == ERROR)

    @property
    def status(self) -> str:
        """`passed`, `failed`, `warned` or `not run`."""
        if not self.outcome.ran:
            return SKIPPED
        severities = {group.first.severity for group in self.groups}
        return FAILED if ERROR in severities else WARNED if severities else PASSED


class Check(ABC):
    """A named check of a directory. It never raises for what it finds: all that is wrong is in its outcome."""

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def run(self, subject: Subject) -> Outcome:
        """Looks, and says what it found."""
