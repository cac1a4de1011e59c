"""Every element of a directory against its checkpoint, bit by bit, or against a model that it should be close to."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from nbmerge.dtypes import DType
from nbmerge.engine.events import Listener, silent
from nbmerge.engine.read import Words, to_torch
from nbmerge.engine.scan import Scanned, Walk, scan
from nbmerge.expressions import Expr
from nbmerge.geometry import Box, Shape, ravel, unravel
from nbmerge.validation.findings import Finding, Outcome
from nbmerge.validation.health import HealthTally


@dataclass(slots=True)
class Difference:
    """In how many elements a tensor differs, and the one that is shown: its row-major number and both values."""

    elements: int = 0
    at: int = -1
    here: float = 0.0
    there: float = 0.0
    size: float = 0.0


class Comparator(ABC):
    """What the tensors of a directory are compared with. `visit` is called from several threads."""

    def __init__(self, tensors: Mapping[str, Expr]) -> None:
        self.tensors = tensors
        self.stand_ins: dict[str, str] = {}  # a name of theirs → the tensor of ours that stands for it
        self.findings: list[Finding] = []
        self._shapes: dict[str, tuple[Shape, DType]] = {}
        self._found: dict[str, Difference] = {}
        self._lock = threading.Lock()

    @abstractmethod
    def visit(self, name: str, region: Box, ours: Words, theirs: Words) -> None:
        """Compares a block."""

    @abstractmethod
    def differing(self, name: str, difference: Difference) -> Finding:
        """What is said of a tensor that differs."""

    @abstractmethod
    def unlike(self, name: str, ours: Expr, theirs: Expr) -> Finding:
        """What is said of a tensor of another shape or dtype, which is not compared."""

    def partner(self, name: str, ours: Expr) -> Expr | None:
        """The tensor to compare with; None where there is none of the same shape and dtype."""
        theirs = self.tensors.get(name)
        if theirs is None:
            return None
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            self.findings.append(self.unlike(name, ours, theirs))
            return None
        self._shapes[name] = (ours.shape, ours.dtype)
        return theirs

    def _differ(self, name: str, region: Box, ours: Words, theirs: Words, unequal: Any, by: Any) -> None:
        """Takes note of a block in which `unequal` elements differ `by` so much; the first of the greatest is shown."""
        shape, dtype = self._shapes[name]
        flat = int(by.argmax())
        index = tuple(int(i) + start for i, start in zip(np.unravel_index(flat, by.shape), region.offset, strict=True))
        size, at = float(by.reshape(-1)[flat]), ravel(index, shape)
        values = tuple(float(to_torch(words.reshape(-1)[flat : flat + 1], dtype)) for words in (ours, theirs))
        with self._lock:
            known = self._found.setdefault(name, Difference())
            known.elements += int(np.count_nonzero(unequal))
            if known.at < 0 or (size, -at) > (known.size, -known.at):
                known.at, known.size, known.here, known.there = at, size, *values

    def outcome(self, names: Sequence[str], scanned: Scanned, what: str) -> Outcome:
        """What the comparison found. names: the directory's tensors; what: they were compared with."""
        every = (*names, *self.stand_ins)
        differing = [self.differing(name, self._found[name]) for name in every if name in self._found]
        return Outcome((*self.findings, *differing), f"{self._looked(scanned)} {what}", share=share_of(scanned))

    def _looked(self, scanned: Scanned) -> str:
        tensors = f"{len(self._shapes):,} tensors"
        if scanned.whole:
            return f"compared every element of {tensors} with"
        share = f"{100 * share_of(scanned):.1f}% of the bytes"
        blocks = f"{scanned.blocks:,} of {scanned.all_blocks:,} blocks ({share})"
        return f"sampled {blocks} of {tensors} against"

    def _place(self, name: str, difference: Difference) -> tuple[str, list[int]]:
        """`3 of 4,096 elements`, and the index that is shown."""
        shape, _ = self._shapes[name]
        return f"{difference.elements:,} of {prod(shape):,} elements", list(unravel(difference.at, shape))


class SameBits(Comparator):
    """Bit for bit, after the casts that the plan has."""

    def visit(self, name: str, region: Box, ours: Words, theirs: Words) -> None:
        if same_words(ours, theirs):
            return
        unequal = ours != theirs
        self._differ(name, region, ours, theirs, unequal, unequal)

    def differing(self, name: str, difference: Difference) -> Finding:
        count, index = self._place(name, difference)
        return Finding(
            "differs from the checkpoint",
            name,
            f"{count}, the first at {index}: {difference.here!r} here, {difference.there!r} there",
            why="the file or the checkpoint changed after the merge, is damaged, or is of another step",
            fix="merge the checkpoint again; if it differs again, check disk and memory of the machine",
        )

    def unlike(self, name: str, ours: Expr, theirs: Expr) -> Finding:
        return Finding(
            "has another shape or dtype than the checkpoint gives it",
            name,
            f"{_kind(ours)} here, {_kind(theirs)} by the plan",
            why="it was merged from another checkpoint, with other options, or was changed since",
            fix="pass the checkpoint that it was merged from, or merge again",
        )


class Close(Comparator):
    """Within tolerances: |a - b| ≤ atol + rtol · |b|, as torch.testing.assert_close has it."""

    def __init__(self, tensors: Mapping[str, Expr], atol: float, rtol: float) -> None:
        super().__init__(tensors)
        self.atol, self.rtol = atol, rtol
        self.within: set[str] = set()

    def visit(self, name: str, region: Box, ours: Words, theirs: Words) -> None:
        if same_words(ours, theirs):
            return
        _, dtype = self._shapes[name]
        a, b = (_as_float64(words, dtype) for words in (ours, theirs))
        with np.errstate(invalid="ignore", over="ignore"):
            by = np.abs(a - b)
            by[(a == b) | (ours == theirs)] = 0.0  # infinities of one sign, and a NaN that both hold with the same bits
            by[np.isnan(by)] = np.inf
            unequal = by > self.atol + self.rtol * np.abs(b)
        unequal |= np.isinf(by)
        if unequal.any():
            self._differ(name, region, ours, theirs, unequal, by)
        else:
            with self._lock:
                self.within.add(name)

    def differing(self, name: str, difference: Difference) -> Finding:
        count, index = self._place(name, difference)
        return Finding(
            f"is not close to the reference (atol {self.atol:g}, rtol {self.rtol:g})",
            name,
            f"{count}; the largest difference is {difference.size:g} at {index}: "
            f"{difference.here!r} here, {difference.there!r} there",
            why="the two models hold other weights: another step, another merge, or another rounding",
            fix="compare with the model of the same step; nbmerge.diff shows where they differ",
        )

    def unlike(self, name: str, ours: Expr, theirs: Expr) -> Finding:
        return Finding(
            "has another shape or dtype than the reference",
            name,
            f"{_kind(ours)} here, {_kind(theirs)} there",
            why="the reference is another model, or was saved in another dtype",
            fix="merge with the reference's dtype (dtype=), or pass the reference of this model",
        )

    def outcome(self, names: Sequence[str], scanned: Scanned, what: str) -> Outcome:
        """As for every comparison; says how many tensors are close without being equal."""
        found = super().outcome(names, scanned, what)
        within = len(self.within - self._found.keys())
        same = ", which holds the same bits" if scanned.whole else ", which holds the same bits there"
        note = f"; {within:,} differ within the tolerance" if within else same
        return replace(found, said=found.said + ("" if found.findings else note))


def share_of(scanned: Scanned) -> float:
    """The share of the bytes that was looked at; 1 only where nothing was left out."""
    return 1.0 if scanned.whole else scanned.nbytes / max(scanned.all_bytes, 1)


def same_words(a: Words, b: Words) -> bool:
    """Whether two arrays of one shape and kind hold the same bits."""
    if a.flags.c_contiguous and b.flags.c_contiguous and a.nbytes % 8 == 0:
        a, b = a.reshape(-1).view(np.uint64), b.reshape(-1).view(np.uint64)
    return bool(np.array_equal(a, b))


def _as_float64(words: Words, dtype: DType) -> Any:
    import torch

    return to_torch(words, dtype).to(torch.float64).numpy()


def _kind(expr: Expr) -> str:
    return f"{expr.dtype} {list(expr.shape)}"


def look_through(
    tensors: Mapping[str, Expr],
    comparators: Sequence[Comparator] = (),
    health: HealthTally | None = None,
    *,
    workers: int | None = None,
    sample: float = 1.0,
    listener: Listener = silent,
) -> Scanned:
    """Reads every tensor once, for all comparisons and for its health. Raises CorruptFileError where a file ends."""
    walks: list[Walk] = []
    visited: dict[str, list[Comparator]] = {}
    stand_ins = {name: tensors[ours] for one in comparators for name, ours in one.stand_ins.items()}
    for name, expr in {**stand_ins, **tensors}.items():
        asked = comparators if name in tensors else [one for one in comparators if name in one.stand_ins]
        pairs = [(one, theirs) for one in asked if (theirs := one.partner(name, expr)) is not None]
        visited[name] = [one for one, _ in pairs]
        if pairs or (health is not None and name in tensors):
            walks.append(Walk(name, (expr, *(theirs for _, theirs in pairs))))

    def visit(name: str, region: Box, words: tuple[Words, ...]) -> None:
        for one, theirs in zip(visited[name], words[1:], strict=True):
            one.visit(name, region, words[0], theirs)
        if health is not None and name in tensors:
            health.visit(name, region, words[0], tensors[name].dtype)

    return scan(walks, visit, phase="validating", workers=workers, sample=sample, listener=listener)
