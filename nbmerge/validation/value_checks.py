"""The checks that read every element: the source, a reference, health. One pass serves all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from nbmerge.engine.events import Listener
from nbmerge.errors import NbmergeError, NotACheckpointError
from nbmerge.layout import Checkpoint
from nbmerge.naming.facts import ModelFacts
from nbmerge.opening import PathLike
from nbmerge.options import ValidateOptions
from nbmerge.plan import MergePlan
from nbmerge.validation.against import against_plan, against_reference
from nbmerge.validation.findings import CheckResult, Finding, Outcome
from nbmerge.validation.health import HealthTally
from nbmerge.validation.planned import as_finding, plan_of
from nbmerge.validation.subject import Subject
from nbmerge.validation.values import Comparator, look_through
from nbmerge.weights import Source, weights_of

SOURCE, REFERENCE, HEALTH = "source", "reference", "health"
TITLES = {
    SOURCE: "every element is what the checkpoint holds",
    REFERENCE: "every element is close to the reference model's",
    HEALTH: "no NaN, no infinity, nothing that looks lost or untrained",
}
_NOUNS = {SOURCE: "checkpoint", REFERENCE: "reference"}


@dataclass(frozen=True)
class Given:
    """What the values are compared with, and how: as `Validator` takes it."""

    checkpoint: PathLike | Checkpoint | MergePlan | None
    reference: Source | None
    options: ValidateOptions
    progress: bool | None = None


class ValueChecks:
    """The one pass over all elements, for the checks that need it."""

    def __init__(self, subject: Subject, given: Given, listener: Listener) -> None:
        self._subject, self._given, self._listener = subject, given, listener
        self._before: dict[str, Outcome] = {}  # outcomes that need no pass
        self._extra: dict[str, tuple[tuple[Finding, ...], str]] = {}

    def results(self) -> list[CheckResult]:
        """The results of the checks that are wanted. Those that cannot be run say why."""
        start = time.perf_counter()
        wanted = [name for name in TITLES if not self._given.options.checks or name in self._given.options.checks]
        comparators = {
            name: made
            for name, make in ((SOURCE, self._source), (REFERENCE, self._reference))
            if name in wanted and (made := self._try(name, make)) is not None
        }
        health = HealthTally() if HEALTH in wanted else None
        outcomes = self._outcomes(comparators, health) if comparators or health is not None else {}
        seconds = time.perf_counter() - start
        return [
            CheckResult(
                name, TITLES[name], outcomes.get(name) or self._before[name], seconds if name in outcomes else 0.0
            )
            for name in wanted
        ]

    def _outcomes(self, comparators: dict[str, Comparator], health: HealthTally | None) -> dict[str, Outcome]:
        subject, options = self._subject, self._given.options
        try:
            scanned = look_through(
                subject.tensors, list(comparators.values()), health,
                workers=options.workers, sample=options.sample, listener=self._listener,
            )  # fmt: skip
        except (NbmergeError, OSError) as error:
            known = error if isinstance(error, NbmergeError) else NbmergeError(str(error))
            failed = Outcome((as_finding(known, "cannot be read to its end"),), "stopped")
            return dict.fromkeys([*comparators, *([HEALTH] if health else [])], failed)
        found: dict[str, Outcome] = {}
        for name, comparator in comparators.items():
            extra, said = self._extra[name]
            outcome = comparator.outcome(list(subject.tensors), scanned, said)
            found[name] = Outcome((*extra, *outcome.findings), outcome.said)
        if health is not None:
            found[HEALTH] = health.outcome(subject, scanned)
        return found

    def _try(self, name: str, make: Callable[[], Comparator | None]) -> Comparator | None:
        try:
            return make()
        except NotACheckpointError:
            raise
        except NbmergeError as error:
            self._before[name] = Outcome((as_finding(error, f"the {_NOUNS[name]} cannot be compared"),), "not compared")
            return None

    def _source(self) -> Comparator | None:
        checkpoint = self._given.checkpoint
        if checkpoint is None:
            hint = self._subject.receipt_source
            said = "pass checkpoint= to compare with the shards" + (f"; the receipt names {hint}" if hint else "")
            self._before[SOURCE] = Outcome(said=said, ran=False)
            return None
        options = self._given.options
        given = {name: getattr(options, name) for name in ("trust_pickle", "trust_remote_code", "workers")}
        planned = plan_of(self._subject, checkpoint, given, self._given.progress)
        self._extra[SOURCE] = planned.findings, f"{planned.plan.checkpoint.path}, {planned.said}"
        return against_plan(self._subject.tensors, planned.plan)

    def _reference(self) -> Comparator | None:
        if self._given.reference is None:
            self._before[REFERENCE] = Outcome(said="pass reference= to compare with another model", ran=False)
            return None
        options, facts = self._given.options, self._subject.facts
        reference = weights_of(self._given.reference, progress=self._given.progress)
        self._extra[REFERENCE] = (), reference.label
        known = facts if isinstance(facts, ModelFacts) else None
        return against_reference(self._subject.tensors, reference, known, atol=options.atol, rtol=options.rtol)
