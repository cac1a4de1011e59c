"""The checks that a validation runs beside the comparison of values, in their order."""

from __future__ import annotations

from pathlib import Path

from nbmerge.options import ValidateOptions
from nbmerge.validation.element_types import DtypesCheck
from nbmerge.validation.files import HeadersCheck, IndexCheck
from nbmerge.validation.findings import Check, Outcome
from nbmerge.validation.recorded import DigestsCheck, ReceiptCheck
from nbmerge.validation.running import RunningCheck
from nbmerge.validation.side import ConfigCheck, PathsCheck, TokenizerFilesCheck
from nbmerge.validation.structure import StructureCheck, TiedCheck
from nbmerge.validation.subject import Subject
from nbmerge.validation.tokenizer import TokenizerCheck


def of_files(options: ValidateOptions) -> list[Check]:
    """The checks of files and headers: they read few bytes, but for recorded digests."""
    return [
        HeadersCheck(), IndexCheck(), PathsCheck(), ConfigCheck(), TokenizerFilesCheck(), ReceiptCheck(),
        DigestsCheck(options.workers), StructureCheck(), DtypesCheck(), TiedCheck(),
    ]  # fmt: skip


def of_use(reference: Path | None, options: ValidateOptions) -> list[Check]:
    """The checks of what the weights are used with. reference: a directory whose logits are compared."""
    running: Check = RunningCheck(reference, atol=options.atol, rtol=options.rtol)
    return [TokenizerCheck(), _LeftOut(running) if options.no_run else running]


class _LeftOut(Check):
    """A check that the user does not want: it stands in the report, and says so."""

    def __init__(self, check: Check) -> None:
        self.name, self.title = check.name, check.title  # type: ignore[misc]  # of the instance, not of the class

    def run(self, subject: Subject) -> Outcome:
        """Nothing."""
        return Outcome(said="left out: no_run", ran=False)
