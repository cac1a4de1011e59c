"""What `nbmerge.explain` returns: the tensors that are not as the model wants them, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nbmerge.errors import Problem, plural
from nbmerge.explaining.candidates import Candidate, Strength
from nbmerge.explaining.table import leading
from nbmerge.geometry import Shape
from nbmerge.shown import Displayed

MISMATCH, MISSING, UNEXPECTED, FITS, FAILED = "mismatch", "missing", "unexpected", "fits", "error"
RENAMED = "renamed"


@dataclass(frozen=True)
class Subject:
    """Tensors that differ in nothing but the number of a layer or an expert, and what may have caused it.

    name: the one of which causes are told, or empty for two shapes alone; got: the shape in the checkpoint, None where
    it is missing; expected: the shape that the model has, None where it has no such tensor; names: all of them;
    candidates: the causes that fit, strongest first; lies: for a tensor that fits, how it lies on the ranks; message:
    for an error that is about no shape, its text; held_as: the names that the checkpoint has for them, one for each of
    `names`, where it has them under others.
    """

    name: str
    got: Shape | None
    expected: Shape | None
    candidates: tuple[Candidate, ...] = ()
    names: tuple[str, ...] = ()
    lies: str = ""
    message: str = ""
    held_as: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """`mismatch`, `missing`, `unexpected`, `renamed`, `fits`, or `error` for an error's text without shapes."""
        if self.message:
            return FAILED
        if self.held_as:
            return RENAMED
        if self.got is None:
            return MISSING
        if self.expected is None:
            return UNEXPECTED
        return FITS if self.got == self.expected else MISMATCH

    @property
    def best(self) -> Candidate | None:
        """The strongest candidate; the first of the table where several are equally strong."""
        return self.candidates[0] if self.candidates else None

    @property
    def is_ambiguous(self) -> bool:
        """Whether several candidates are equally strong."""
        return len(leading(self.candidates)) > 1

    def is_about(self, name: str) -> bool:
        """Whether a tensor of that name, as the model or as the checkpoint calls it, is among them."""
        return name in self.names or name in self.held_as

    def only(self, name: str) -> Subject:
        """The one tensor of that name."""
        at = (self.names if name in self.names else self.held_as).index(name)
        return replace(self, name=self.names[at], names=self.names[at : at + 1], held_as=self.held_as[at : at + 1])

    @property
    def sentence(self) -> str:
        """What is known of it, and the best candidates."""
        more = f" (and {len(self.names) - 1:,} more like it)" if self.names[1:] else ""
        what = self.name or "the tensor"
        verb = {
            FITS: f"fits: {what} has shape {list(self.got or ())}{f', {self.lies}' if self.lies else ''}",
            MISSING: f"{what} is missing{more}",
            RENAMED: f"{what} is missing under this name{more}",
            UNEXPECTED: f"the model has no {what}{more}",
            MISMATCH: f"{what} has shape {list(self.got or ())} where {list(self.expected or ())} is expected{more}",
            FAILED: self.message,
        }[self.kind]
        return verb if self.kind == FITS else f"{verb}; {self._causes()}"

    def _causes(self) -> str:
        if self.best is None:
            return "no known pattern fits"
        first = leading(self.candidates)
        if len(first) > 1:
            return f"{len(first)} causes fit equally well: {' · '.join(str(each) for each in first[:3])}"
        said = {Strength.STRONG: "", Strength.FAIR: "probably ", Strength.WEAK: "possibly "}[self.best.strength]
        return said + (self.best.sentence if self.held_as else str(self.best))


@dataclass(frozen=True, repr=False)
class Explanation(Displayed):
    """Why tensors are not as the model wants them.

        explanation = nbmerge.explain("global_step_100/actor", hf_model_config_path="qwen")
        explanation.best.fix

    asked: what was explained, in words; subjects: the tensors, those that differ in shape first; diagnosis: what is
    wrong with the config as a whole, where something is; ranks: how many wrote the checkpoint, where known; problems:
    what else is wrong, which no pattern reads; checked: how many tensors were looked at.
    """

    asked: str
    subjects: tuple[Subject, ...] = ()
    diagnosis: str = ""
    ranks: int | None = None
    problems: tuple[Problem, ...] = ()
    checked: int = 0

    @property
    def best(self) -> Candidate | None:
        """The strongest candidate of all subjects; the first where several are equally strong."""
        found = [subject.best for subject in self.subjects if subject.best is not None]
        return max(found, key=lambda candidate: candidate.strength, default=None)

    @property
    def fits(self) -> bool:
        """Whether something was looked at, all of it fits, and nothing else is wrong."""
        return not (self.mismatches or self.problems or self.diagnosis) and (self.checked > 0 or bool(self.subjects))

    @property
    def is_ambiguous(self) -> bool:
        """Whether for some tensor several candidates are equally strong, and nothing else decides."""
        return any(subject.is_ambiguous for subject in self.subjects) and not self.diagnosis

    @property
    def mismatches(self) -> tuple[Subject, ...]:
        """The subjects that are not as they should be."""
        return tuple(subject for subject in self.subjects if subject.kind != FITS)

    @property
    def sentence(self) -> str:
        """The answer in one sentence."""
        if self.diagnosis:
            return self.diagnosis
        wrong = self.mismatches
        if not wrong:
            if self.subjects:
                return self.subjects[0].sentence
            return self._nothing_wrong()
        first = wrong[0].sentence
        others = sum(max(len(subject.names), 1) for subject in wrong[1:])
        more = f"; {plural(others, 'other tensor')} below" if others else ""
        more += f"; {plural(len(self.problems), 'problem')} beside the shapes" if self.problems else ""
        return first + more

    def _nothing_wrong(self) -> str:
        """What can be said without a mismatch. That all fits is said only of what was looked at."""
        count = f" (1 of {len(self.problems):,} problems)" if self.problems[1:] else ""
        if self.problems and not self.checked:
            return f"it says nothing of names or shapes that is known: {self.problems[0].what}{count}"
        if self.problems:
            return f"{self.problems[0].what}{count}; no known pattern says more"
        if not self.checked:
            return "it says nothing of names or shapes that is known"
        return f"every tensor fits: {plural(self.checked, 'tensor')} have the names and shapes of the model"


def in_order(subjects: Sequence[Subject]) -> tuple[Subject, ...]:
    """Shapes that differ first, then what is missing or renamed, then what is too much."""
    order = (MISMATCH, FAILED, MISSING, RENAMED, UNEXPECTED, FITS)
    return tuple(sorted(subjects, key=lambda subject: order.index(subject.kind)))
