"""Whether what is known of a directory is enough to publish it."""

from __future__ import annotations

from nbmerge.validation.findings import ERROR, FAILED, SKIPPED
from nbmerge.validation.report import ValidationReport


def is_proved(found: ValidationReport) -> bool:
    """Whether all checks that were asked for passed, or a merge that verified is unchanged and no check found an error.

    The second is for what cannot be checked without its merge, such as an adapter alone: the receipt stands in for it.
    """
    if found.ok:
        return True
    as_merged = any(one.name == "receipt" and one.status not in (FAILED, SKIPPED) for one in found.results)
    return as_merged and not any(finding.severity == ERROR for finding in found.findings)
