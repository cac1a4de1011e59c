"""Proves a Hugging Face directory: every check is run, and all that they find is reported."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbmerge.errors import OptionError
from nbmerge.layout import Checkpoint
from nbmerge.opening import PathLike, listener_of
from nbmerge.options import ValidateOptions, expanded_path
from nbmerge.plan import MergePlan
from nbmerge.report import MergeReport
from nbmerge.shown import Displayed
from nbmerge.validation.findings import Check, CheckResult
from nbmerge.validation.report import ValidationReport
from nbmerge.validation.subject import Subject

if TYPE_CHECKING:
    from nbmerge.weights import Source


class Validator(Displayed):
    """The checks of one directory. Nothing is read before `validate` is called.

        Validator("merged", checkpoint="global_step_100/actor").validate()

    model_dir: a Hugging Face directory, or the report of the merge that wrote it, whose checkpoint is then taken;
    checkpoint: a path, an opened checkpoint or a plan; reference: a directory, or whatever `nbmerge.diff` takes;
    options: the fields of `ValidateOptions`. Raises OptionError.
    """

    def __init__(
        self,
        model_dir: PathLike | MergeReport,
        checkpoint: PathLike | Checkpoint | MergePlan | None = None,
        reference: Source | None = None,
        **options: Any,
    ) -> None:
        unknown = options.keys() - ValidateOptions.__dataclass_fields__.keys()
        if unknown:
            raise OptionError(f"no option is named {', '.join(sorted(unknown))}", fix="see help(nbmerge.validate)")
        self.options = ValidateOptions(**options)
        self.directory, self.checkpoint = _target_of(model_dir, checkpoint)
        self.reference = reference
        self.report: ValidationReport | None = None
        known = [name for name, _ in self.checks()]
        for name in self.options.checks:
            if name not in known:
                raise OptionError(f"no check is named {name!r}", fix=f"one of {', '.join(known)}")

    def checks(self) -> list[tuple[str, str]]:
        """Every check that there is: its name, and what it proves."""
        from nbmerge.validation import checks
        from nbmerge.validation.value_checks import TITLES

        before, after = checks.of_files(self.options), checks.of_use(None, self.options)
        named = ([(one.name, one.title) for one in each] for each in (before, after))
        return [*next(named), *TITLES.items(), *next(named)]

    def validate(self, *, progress: bool | None = None) -> ValidationReport:
        """Runs the checks. Raises NotACheckpointError where the directory or what it is compared with is not there."""
        from nbmerge.validation import checks
        from nbmerge.validation.value_checks import Given, ValueChecks

        start = time.perf_counter()
        subject = Subject.of(self.directory, trust_remote_code=self.options.trust_remote_code)
        with listener_of(progress) as listen:
            results = self._run(checks.of_files(self.options), subject)
            given = Given(self.checkpoint, self.reference, self.options, progress)
            results += ValueChecks(subject, given, listen).results()
            results += self._run(checks.of_use(self._reference_directory(), self.options), subject)
        self.report = ValidationReport(
            self.directory, tuple(results), _labels(self.checkpoint, self.reference), len(subject.entries),
            subject.nbytes, time.perf_counter() - start,
        )  # fmt: skip
        return self.report

    def _run(self, checks: Iterable[Check], subject: Subject) -> list[CheckResult]:
        return [
            self._timed(one, subject) for one in checks if not self.options.checks or one.name in self.options.checks
        ]

    def _reference_directory(self) -> Path | None:
        """The reference, where transformers can load it."""
        if not isinstance(self.reference, (str, os.PathLike)):
            return None
        path = expanded_path(os.fspath(self.reference))
        return path if (path / "config.json").is_file() else None

    def _timed(self, check: Check, subject: Subject) -> CheckResult:
        start = time.perf_counter()
        outcome = check.run(subject)
        return CheckResult(check.name, check.title, outcome, time.perf_counter() - start)


def _target_of(model_dir: Any, checkpoint: Any) -> tuple[Path, Any]:
    if isinstance(model_dir, MergeReport):
        if model_dir.target is None:
            raise OptionError("a dry run wrote nothing", fix="merge without dry_run, and validate that report")
        return Path(model_dir.target), model_dir.plan if checkpoint is None else checkpoint
    return expanded_path(os.fspath(model_dir)), checkpoint


def _labels(checkpoint: Any, reference: Any) -> dict[str, str]:
    """What the values were compared with, in words."""
    found: dict[str, str] = {}
    for name, source in (("checkpoint", checkpoint), ("reference", reference)):
        if source is None:
            continue
        if isinstance(source, MergePlan):
            source = source.checkpoint
        path = source.path if isinstance(source, Checkpoint) else source
        found[name] = str(path) if isinstance(path, (str, os.PathLike)) else type(source).__name__
    return found
