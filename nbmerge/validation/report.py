"""What a validation returns: every check, what it looked at, and all that it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbmerge.errors import NotSupportedError, Problem, VerificationError, plural
from nbmerge.shown import Displayed
from nbmerge.validation.findings import ERROR, SKIPPED, WARNED, CheckResult, Finding

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, repr=False)
class ValidationReport(Displayed):
    """What is proven of a directory, and what is not.

    results: every check in the order in which it ran; sources: what the values were compared with, by what it is
    (`checkpoint`, `reference`); nbytes: of the directory's tensors; seconds: of all checks together; asked: checks
    that were asked for by name.
    """

    directory: Path
    results: tuple[CheckResult, ...]
    sources: Mapping[str, str] = field(default_factory=dict)
    tensors: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    asked: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether checks were run, among them all that were asked for by name, and none found an error."""
        ran = any(result.status != SKIPPED for result in self.results)
        return ran and not self.unproved and not any(result.errors for result in self.results)

    @property
    def unproved(self) -> tuple[CheckResult, ...]:
        """The checks that were asked for by name and could not be run."""
        return tuple(one for one in self.results if one.name in self.asked and one.status == SKIPPED)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings of all checks."""
        return tuple(finding for result in self.results for finding in result.outcome.findings)

    def __getitem__(self, name: str) -> CheckResult:
        """The result of the check of that name. Raises KeyError."""
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(name)

    @property
    def sentence(self) -> str:
        """The outcome in a sentence."""
        return "; ".join(filter(None, (self._verdict, self._sampled, self._left)))

    @property
    def _verdict(self) -> str:
        errors = sum(result.errors for result in self.results)
        warned = [result.name for result in self.results if result.status == WARNED]
        if self.ok:
            ran = sum(result.status != SKIPPED for result in self.results)
            verdict = "valid as far as asked" if self.asked else "valid"
            return f"{verdict}: {plural(ran, 'check')} passed" + (
                f", {len(warned):,} of them with warnings" if warned else ""
            )
        lacking = " and ".join(result.name for result in self.unproved)
        said = f"not proved: {lacking} could not be run" if lacking else "not proved: no check could be run"
        if errors:
            said = f"not valid: {plural(errors, 'error')}"
        return said + (f", and warnings of {', '.join(warned)}" if warned else "")

    @property
    def _sampled(self) -> str:
        sampled = [result for result in self.results if result.outcome.share < 1]
        if not sampled:
            return ""
        share = min(result.outcome.share for result in sampled)
        return f"only a sample of {100 * share:.1f}% of the bytes: {', '.join(result.name for result in sampled)}"

    @property
    def _left(self) -> str:
        told = self.unproved if self._verdict.startswith("not proved") else ()
        left = [result.name for result in self.results if result.status == SKIPPED and result not in told]
        return f"not run: {', '.join(left)}" if left else ""

    def raise_if_failed(self) -> None:
        """Raises VerificationError with all errors, and all that was asked for and not run, if there is any."""
        if self.ok:
            return
        problems = [finding.as_problem() for finding in self.findings if finding.severity == ERROR]
        said = f"not valid: {plural(len(problems), 'error')}" if problems else self.sentence
        problems += [
            Problem(f"{one.name} was asked for, and could not be run", one.outcome.said) for one in self.unproved
        ]
        raise VerificationError(f"{self.directory} is {said}", problems=problems)

    def to_dataframe(self) -> pandas.DataFrame:
        """A row for each finding, and one for each check without any: check, status, severity, subject, what, detail,
        why, fix. Needs pandas; raises NotSupportedError without it.
        """
        try:
            import pandas
        except ImportError as error:
            raise NotSupportedError(
                "a data frame needs pandas, which is not installed", fix="pip install pandas"
            ) from error
        rows: list[dict[str, Any]] = []
        for result in self.results:
            nothing = Finding(result.outcome.said, severity="")
            found = result.outcome.findings or (nothing,)
            rows += [{"check": result.name, "status": result.status, **asdict(finding)} for finding in found]
        columns = ["check", "status", "severity", "subject", "what", "detail", "why", "fix"]
        return pandas.DataFrame(rows, columns=columns)
