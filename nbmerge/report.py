"""What a merge returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbmerge.layout import Drift
from nbmerge.plan import MergePlan
from nbmerge.shown import Displayed
from nbmerge.verification import Verification

if TYPE_CHECKING:
    from nbmerge.export.hub import PushReport


@dataclass(frozen=True, repr=False)
class MergeReport(Displayed):
    """What was done. After a dry run only the plan: nothing was written, and `verification` is None.

    target: the directory that was written; seconds: of writing; written_bytes: what this run wrote;
    reused: files that an earlier, interrupted run had finished; drift: copies on several ranks that differ;
    receipt: as it stands in the directory; pushed: where it was uploaded to, if it was.
    """

    plan: MergePlan
    target: Path | None = None
    seconds: float = 0.0
    written_bytes: int = 0
    reused: tuple[str, ...] = ()
    drift: tuple[Drift, ...] = ()
    verification: Verification | None = None
    receipt: Mapping[str, Any] | None = None
    pushed: PushReport | None = None

    @property
    def sentence(self) -> str:
        """What was done, in a sentence."""
        return self.view().sentence

    @property
    def bytes_per_second(self) -> float:
        """Speed of writing."""
        return self.written_bytes / self.seconds if self.seconds else 0.0
