"""Proves a Hugging Face directory: every check is run, and all that they find is reported."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbmerge.errors import NbmergeError, OptionError
from nbmerge.layout import Checkpoint
from nbmerge.loaders.reading import is_file
from nbmerge.opening import PathLike, listener_of
from nbmerge.options import ValidateOptions, expanded_path
from nbmerge.plan import MergePlan
from nbmerge.report import MergeReport
from nbmerge.shown import Displayed
from nbmerge.validation.adapter import not_of_an_adapter
from nbmerge.validation.findings import Check, CheckResult, Outcome
from nbmerge.validation.on_disk import unreadable
from nbmerge.validation.planned import as_finding
from nbmerge.validation.report import ValidationReport
from nbmerge.validation.subject import Subject

if TYPE_CHECKING:
    from nbmerge.weights import Source

_log = logging.getLogger(__name__)
_SOURCES = (str, os.PathLike, Checkpoint, MergePlan, MergeReport)
_CHECKPOINTS = (*_SOURCES, list, tuple)  # several, of which the directory is the average


class Validator(Displayed):
    """The checks of one directory. Nothing is read before `validate` is called.

        Validator("merged", checkpoint="global_step_100/actor").validate()

    model_dir: a Hugging Face directory, or the report of the merge that wrote it, whose checkpoint is then taken;
    checkpoint: a path, an opened checkpoint, a plan, a merge's report, whose plan is taken, or a list of checkpoints
    that the directory is the average of; reference: a directory,
    or whatever `nbmerge.diff` takes; options: the fields of `ValidateOptions`. Raises OptionError.
    """

    def __init__(
        self,
        model_dir: PathLike | MergeReport,
        checkpoint: PathLike | Sequence[Source] | Checkpoint | MergePlan | MergeReport | None = None,
        reference: Source | None = None,
        **options: Any,
    ) -> None:
        unknown = options.keys() - ValidateOptions.__dataclass_fields__.keys()
        if unknown:
            raise OptionError(f"no option is named {', '.join(sorted(unknown))}", fix="see help(nbmerge.validate)")
        self.options = ValidateOptions(**options)
        self.directory, self.checkpoint = _target_of(model_dir, checkpoint)
        if reference is not None and not isinstance(reference, _SOURCES):
            raise _no_source("reference", reference)
        self.reference = reference
        self.report: ValidationReport | None = None
        self._refuse_unknown(self.options.checks)

    def _refuse_unknown(self, names: tuple[str, ...]) -> None:
        known = [name for name, _ in self.checks()]
        if (word := "".join(names)) in known and word not in names:  # tuple("headers")
            raise OptionError(f"checks={names!r} are letters", fix=f"checks=[{word!r}]")
        for name in names:
            if name == "running" and self.options.no_run:
                raise OptionError("checks= names running, and no_run leaves it out", fix="leave one of the two out")
            if name not in known:
                raise OptionError(f"no check is named {name!r}", fix=f"one of {', '.join(known)}")

    def checks(self) -> list[tuple[str, str]]:
        """Every check that there is: its name, and what it proves."""
        from nbmerge.validation import checks
        from nbmerge.validation.value_checks import SAMPLED_TITLES, TITLES

        titles = TITLES if self.options.sample >= 1 else SAMPLED_TITLES
        before, after = checks.of_files(self.options), checks.of_use(None, self.options)
        named = ([(one.name, one.title) for one in each] for each in (before, after))
        return [*next(named), *titles.items(), *next(named)]

    def validate(self, *, progress: bool | None = None) -> ValidationReport:
        """Runs the checks.

        Raises NotACheckpointError where the directory or what it is compared with is not there, CheckpointError where
        the directory may not be read.
        """
        from nbmerge.validation import checks
        from nbmerge.validation.value_checks import Given, ValueChecks

        start = time.perf_counter()
        subject = self._subject()
        with listener_of(progress) as listen:
            results = self._run(checks.of_files(self.options), subject)
            given = Given(self.checkpoint, self.reference, self.options, progress)
            results += ValueChecks(subject, given, listen).results()
            results += self._run(checks.of_use(self._reference_directory(), self.options), subject)
        self.report = ValidationReport(
            self.directory, tuple(results), _labels(self.checkpoint, self.reference), len(subject.entries),
            subject.nbytes, time.perf_counter() - start, self.options.checks,
        )  # fmt: skip
        return self.report

    def _subject(self) -> Subject:
        try:
            subject = Subject.of(self.directory, trust_remote_code=self.options.trust_remote_code)
            next(self.directory.iterdir(), None)
        except NbmergeError:
            raise
        except OSError as error:
            raise unreadable(self.directory, error) from error
        return subject

    def _run(self, checks: Iterable[Check], subject: Subject) -> list[CheckResult]:
        return [
            self._timed(one, subject) for one in checks if not self.options.checks or one.name in self.options.checks
        ]

    def _reference_directory(self) -> Path | None:
        """The reference, where transformers can load it."""
        if not isinstance(self.reference, (str, os.PathLike)):
            return None
        path = expanded_path(os.fspath(self.reference))
        return path if is_file(path / "config.json") else None

    def _timed(self, check: Check, subject: Subject) -> CheckResult:
        start = time.perf_counter()
        try:
            outcome = not_of_an_adapter(subject, check.name) or check.run(subject)
        except Exception as error:  # noqa: BLE001 - whatever a directory holds, the other checks are run
            _log.debug("the check %s failed", check.name, exc_info=True)
            outcome = Outcome((as_finding(error, "the check could not be finished"),), "stopped")
        return CheckResult(check.name, check.title, outcome, time.perf_counter() - start)


def _target_of(model_dir: Any, checkpoint: Any) -> tuple[Path, Any]:
    """The directory, and the path, checkpoint or plan that it is compared with. Raises OptionError for other things."""
    if checkpoint is not None and not isinstance(checkpoint, _CHECKPOINTS):
        raise _no_source("checkpoint", checkpoint)
    if isinstance(checkpoint, MergeReport):
        checkpoint = checkpoint.plan
    if isinstance(model_dir, MergeReport):
        if model_dir.target is None:
            raise OptionError("a dry run wrote nothing", fix="merge without dry_run, and validate that report")
        return Path(model_dir.target), model_dir.plan if checkpoint is None else checkpoint
    if isinstance(model_dir, (Checkpoint, MergePlan)):
        raise OptionError(
            f"a {type(model_dir).__name__} is no merged directory",
            fix="merge it and validate the report, or pass both: nbmerge.validate(DIR, checkpoint=…)",
        )
    if not isinstance(model_dir, (str, os.PathLike)):
        raise OptionError(f"a {type(model_dir).__name__} is no directory", fix="pass a path, or a merge's report")
    return expanded_path(os.fspath(model_dir)), checkpoint


def _no_source(option: str, value: object) -> OptionError:
    return OptionError(
        f"{option}= is a {type(value).__name__}", fix="pass a path, an opened checkpoint, a plan or a merge's report"
    )


def _labels(checkpoint: Any, reference: Any) -> dict[str, str]:
    """What the values were compared with, in words."""
    found: dict[str, str] = {}
    for name, source in (("checkpoint", checkpoint), ("reference", reference)):
        if source is None:
            continue
        if isinstance(source, MergeReport):
            source = source.plan if source.target is None else source.target
        if isinstance(source, MergePlan):
            source = source.checkpoint
        path = source.path if isinstance(source, Checkpoint) else source
        found[name] = str(path) if isinstance(path, (str, os.PathLike)) else type(source).__name__
    return found
