"""What a validation returns: every check, what it looked at, and all that it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbmerge.errors import NotSupportedError, VerificationError, plural
from nbmerge.shown import Displayed
from nbmerge.validation.findings import ERROR, SKIPPED, WARNED, CheckResult, Finding, FindingGroup, grouped

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, repr=False)
class ValidationReport(Displayed):
    """What is proven of a directory, and what is not.

    results: every check in the order in which it ran; sources: what the values were compared with, by what it is
    (`checkpoint`, `reference`); nbytes: of the directory's tensors; seconds: of all checks together.
    """

    directory: Path
    results: tuple[CheckResult, ...]
    sources: Mapping[str, str] = field(default_factory=dict)
    tensors: int = 0
    nbytes: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether no check that ran found an error."""
        return not any(finding.severity == ERROR for finding in self.findings)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings of all checks."""
        return tuple(finding for result in self.results for finding in result.outcome.findings)

    def groups(self, result: CheckResult) -> list[FindingGroup]:
        """A check's findings by kind, errors first."""
        return grouped(result.outcome.findings)

    def __getitem__(self, name: str) -> CheckResult:
        """The result of the check of that name. Raises KeyError."""
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(name)

    @property
    def sentence(self) -> str:
        """The outcome in a sentence."""
        errors = sum(finding.severity == ERROR for finding in self.findings)
        warned = [result.name for result in self.results if result.status == WARNED]
        left = [result.name for result in self.results if result.status == SKIPPED]
        ran = len(self.results) - len(left)
        verdict = f"valid: {plural(ran, 'check')} passed" if self.ok else f"not valid: {plural(errors, 'error')}"
        if warned:
            verdict += (
                f", {len(warned):,} of them with warnings" if self.ok else f", and warnings of {', '.join(warned)}"
            )
        return verdict + (f"; not run: {', '.join(left)}" if left else "")

    def raise_if_failed(self) -> None:
        """Raises VerificationError with all errors, if there are any."""
        problems = [finding.as_problem() for finding in self.findings if finding.severity == ERROR]
        if problems:
            raise VerificationError(
                f"{self.directory} is not valid: {plural(len(problems), 'error')}", problems=problems
            )

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
