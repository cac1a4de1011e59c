"""Health of weights: NaN, infinity, what looks lost or untrained, what a cast could not hold. Looks at bits only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

from nbmerge.dtypes import DType
from nbmerge.engine.read import Words, to_torch, words
from nbmerge.engine.scan import Scanned
from nbmerge.errors import plural
from nbmerge.geometry import Box, Shape
from nbmerge.validation.bits import FORMATS, Counts, Format, count
from nbmerge.validation.findings import WARNING, Finding, Outcome
from nbmerge.validation.subject import Subject

_MATRIX = 2  # dimensions from which on a constant tensor is odd; a norm's weight is one value until it is trained
_MOSTLY = 0.5  # share of the non-zero elements that must be denormal to be worth a word


class HealthTally:
    """Adds up what every element is. `visit` is called from several threads; integers have nothing to look for."""

    name = "health"
    title = "no NaN, no infinity, nothing that looks lost or untrained"

    def __init__(self) -> None:
        self._counts: dict[str, Counts] = {}
        self._lock = threading.Lock()

    def visit(self, name: str, region: Box, words: Words, dtype: DType) -> None:
        """Looks at a block. words: its elements as unsigned integers."""
        form = FORMATS.get(dtype.name)
        if form is None or not words.size:
            return
        found = count(words, form, region)
        with self._lock:
            self._counts.setdefault(name, Counts()).add(found)

    def outcome(self, subject: Subject, scanned: Scanned) -> Outcome:
        """What is wrong, tensor by tensor in the order of the files."""
        casts = _casts(subject)
        looked = [(name, self._counts[name]) for name in subject.tensors if name in self._counts]
        findings = tuple(
            finding
            for name, counts in looked
            for finding in _Patient(name, *_kind(subject, name), counts, casts.get(name)).findings()
        )
        elements = sum(counts.elements for _, counts in looked)
        said = f"looked at {elements:,} elements of {plural(len(looked), 'floating tensor')}"
        return Outcome(findings, said if scanned.whole else f"{said}, a sample")


def _kind(subject: Subject, name: str) -> tuple[Shape, DType]:
    expr = subject.tensors[name]
    return expr.shape, expr.dtype


def _casts(subject: Subject) -> dict[str, str]:
    """Of the tensors that the merge cast, the dtype that each had before, by name."""
    casts = subject.receipt.get("casts") if subject.receipt else None
    known = [cast for cast in casts if isinstance(cast, dict)] if isinstance(casts, list) else []
    return {str(cast.get("tensor")): str(cast.get("from")) for cast in known}


@dataclass(frozen=True)
class _Patient:
    """A tensor and what was counted. cast: the dtype that the merge cast it from."""

    name: str
    shape: Shape
    dtype: DType
    counts: Counts
    cast: str | None

    @cached_property
    def _form(self) -> Format:
        return FORMATS[self.dtype.name]

    def findings(self) -> Iterator[Finding]:
        """All that is wrong with it."""
        counts = self.counts
        overflows_to_nan = self.cast is not None and self._form.infinity is None
        if counts.nan:
            yield self._overflow(counts.nan, counts.first_nan, "NaN") if overflows_to_nan else self._nan()
        if counts.infinity:
            yield self._overflow(counts.infinity, counts.first_infinity, "infinity") if self.cast else self._infinity()
        if counts.largest and self.cast:
            yield self._at_limit()
        if counts.zero == counts.elements > 1:
            if not self.name.endswith("bias"):  # biases, of layers and of norms, begin as zeros, and many stay it
                yield self._zeros()
        elif counts.word is not None and counts.elements > 1 and len(self.shape) >= _MATRIX:
            yield self._constant(counts.word)
        values = counts.elements - counts.zero
        if values and counts.denormal > _MOSTLY * values and len(self.shape) >= _MATRIX:
            yield self._denormal(values)

    def _share(self, number: int, first: Shape | None = None) -> str:
        where = "" if first is None else f", the first at {list(first)}" if first else ", a scalar"
        return f"{number:,} of {self._looked}{where}"

    @property
    def _looked(self) -> str:
        """`4,096 elements`, or how many of them a sample had."""
        numel, seen = prod(self.shape), self.counts.elements
        return plural(numel, "element") if seen == numel else f"the {seen:,} elements looked at, of {numel:,}"

    def _nan(self) -> Finding:
        return Finding(
            "holds NaN", self.name, self._share(self.counts.nan, self.counts.first_nan),
            why="training diverged before this checkpoint was saved, or its file is damaged",
            fix="validate an earlier checkpoint, and merge the last one whose weights are finite",
        )  # fmt: skip

    def _infinity(self) -> Finding:
        return Finding(
            "holds infinity", self.name, self._share(self.counts.infinity, self.counts.first_infinity),
            why="training diverged, or a 16-bit dtype could not hold the values",
            fix="validate an earlier checkpoint, and merge the last one whose weights are finite",
        )  # fmt: skip

    def _overflow(self, number: int, first: Shape | None, became: str) -> Finding:
        return Finding(
            f"holds {became} after a cast to {self.dtype}", self.name, self._share(number, first),
            why=f"its {self.cast} values are beyond the range of {self.dtype}, or were {became} before",
            fix="merge without dtype=, or with dtype=bfloat16, which has the range of float32",
        )  # fmt: skip

    def _at_limit(self) -> Finding:
        return Finding(
            f"reaches the largest {self.dtype} after a cast", self.name, self._share(self.counts.largest),
            why="a cast that saturates gives this value to all that is larger",
            fix="compare with the checkpoint; merge without dtype= if values were cut",
            severity=WARNING,
        )  # fmt: skip

    def _zeros(self) -> Finding:
        return Finding(
            "is zero everywhere", self.name, f"{self._looked}, {self.dtype}",
            why="initialised and never trained, or lost on the way",
            fix="look at the same tensor of the checkpoint; compare with it: checkpoint=",
            severity=WARNING,
        )  # fmt: skip

    def _constant(self, word: int) -> Finding:
        bits = words((1,), self.dtype)
        bits[0] = word
        value = float(to_torch(bits, self.dtype)[0])
        return Finding(
            "holds one value everywhere", self.name, f"{self._looked}, all {value}",
            why="initialised and never trained, or filled by a tool",
            fix="look at the same tensor of the checkpoint; compare with it: checkpoint=",
            severity=WARNING,
        )  # fmt: skip

    def _denormal(self, values: int) -> Finding:
        return Finding(
            "is mostly denormal", self.name,
            f"{self.counts.denormal:,} of {values:,} elements that are not 0 lie below the normal {self.dtype}",
            why="the values are too small for the dtype, which keeps few of their bits",
            fix="merge in float32 or bfloat16, which hold smaller values",
            severity=WARNING,
        )  # fmt: skip
