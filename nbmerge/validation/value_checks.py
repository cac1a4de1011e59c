"""The checks of what is in the files: the source, what lies beside it, a reference, health. One pass serves all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from nbmerge.engine.events import Listener
from nbmerge.errors import NotACheckpointError
from nbmerge.layout import Checkpoint
from nbmerge.naming.facts import ModelFacts
from nbmerge.opening import PathLike
from nbmerge.options import ValidateOptions
from nbmerge.plan import MergePlan
from nbmerge.validation.against import against_plan, against_reference
from nbmerge.validation.beside import same_beside
from nbmerge.validation.findings import CheckResult, Finding, Outcome
from nbmerge.validation.health import HealthTally
from nbmerge.validation.planned import Planned, as_finding, plan_of
from nbmerge.validation.subject import Subject
from nbmerge.validation.values import Comparator, look_through, share_of
from nbmerge.weights import Source, weights_of

SOURCE, BESIDE, REFERENCE, HEALTH = "source", "side_files", "reference", "health"
TITLES = {
    SOURCE: "every element is what the checkpoint holds",
    BESIDE: "config, tokenizer, templates and code say what the checkpoint's say",
    REFERENCE: "every element is close to the reference model's",
    HEALTH: "no NaN, no infinity, nothing that looks lost or untrained",
}
SAMPLED_TITLES = {
    **TITLES,
    SOURCE: "the elements of a sample are what the checkpoint holds",
    REFERENCE: "the elements of a sample are close to the reference model's",
    HEALTH: "in a sample, no NaN, no infinity, nothing that looks lost or untrained",
}


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
        """The results of the checks that are wanted. Those that cannot be run say why.

        Raises NotACheckpointError where what the caller named is not there.
        """
        start = time.perf_counter()
        wanted = [name for name in TITLES if not self._given.options.checks or name in self._given.options.checks]
        planned = self._planned([name for name in (SOURCE, BESIDE) if name in wanted])
        if planned is not None and BESIDE in wanted:
            self._before[BESIDE] = self._beside(planned)
        beside = time.perf_counter()
        makers: dict[str, Callable[[], Comparator | None]] = {
            SOURCE: partial(self._source, planned),
            REFERENCE: self._reference,
        }
        comparators = {
            name: made for name, make in makers.items() if name in wanted and (made := self._try(name, make))
        }
        health = HealthTally() if HEALTH in wanted and self._subject.tensors else None
        self._before[HEALTH] = Outcome(said="there are no tensors to look at", ran=False)
        outcomes = self._outcomes(comparators, health) if comparators or health is not None else {}
        seconds = dict.fromkeys(outcomes, time.perf_counter() - beside) | {BESIDE: beside - start if planned else 0.0}
        return [self._result(name, outcomes.get(name) or self._before[name], seconds.get(name, 0.0)) for name in wanted]

    @staticmethod
    def _result(name: str, outcome: Outcome, seconds: float) -> CheckResult:
        titles = TITLES if outcome.share >= 1 else SAMPLED_TITLES
        return CheckResult(name, titles[name], outcome, seconds)

    def _outcomes(self, comparators: dict[str, Comparator], health: HealthTally | None) -> dict[str, Outcome]:
        subject, options = self._subject, self._given.options
        tensors = {**subject.tensors, **subject.adapter_tensors}
        found: dict[str, Outcome] = {}
        try:
            scanned = look_through(
                tensors, list(comparators.values()), health,
                workers=options.workers, sample=options.sample, listener=self._listener,
            )  # fmt: skip
            for name, comparator in comparators.items():
                extra, said = self._extra[name]
                outcome = comparator.outcome(list(tensors), scanned, said)
                found[name] = replace(outcome, findings=(*extra, *outcome.findings))
            if health is not None:
                found[HEALTH] = replace(health.outcome(subject, scanned), share=share_of(scanned))
        except Exception as error:  # noqa: BLE001 - whatever a file holds, the other checks are run
            failed = Outcome((as_finding(error, "cannot be read to its end"),), "stopped")
            return dict.fromkeys([*comparators, *([HEALTH] if health else [])], failed)
        return found

    def _try(self, name: str, make: Callable[[], Comparator | None]) -> Comparator | None:
        try:
            return make()
        except NotACheckpointError:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            self._before[name] = Outcome((as_finding(error, f"the {name} cannot be compared"),), "not compared")
            return None

    def _planned(self, names: list[str]) -> Planned | None:
        """The plan that these checks compare with; None where there is none, and they say why."""
        checkpoint, options = self._given.checkpoint, self._given.options
        if not names:
            return None
        if checkpoint is None:
            hint = self._subject.receipt_source
            said = "pass checkpoint= to compare with {}" + (f"; the receipt names {hint}" if hint else "")
            for name in names:
                what = "the shards" if name == SOURCE else "what lies beside the shards"
                self._before[name] = Outcome(said=said.replace("{}", what, 1), ran=False)
            return None
        given = {name: getattr(options, name) for name in ("trust_pickle", "trust_remote_code", "workers")}
        try:
            return plan_of(self._subject, checkpoint, given, self._given.progress)
        except NotACheckpointError:
            raise
        except Exception as error:  # noqa: BLE001 - a receipt, or a checkpoint, may hold anything
            finding = as_finding(error, "the checkpoint cannot be compared")
            self._before = {name: Outcome(said=f"the checkpoint cannot be read: see {names[0]}", ran=False)
                            for name in names}  # fmt: skip
            self._before[names[0]] = Outcome((finding,), "not compared")
            return None

    def _beside(self, planned: Planned) -> Outcome:
        try:
            return same_beside(self._subject, planned.plan)
        except Exception as error:  # noqa: BLE001 - as above
            return Outcome((as_finding(error, "the files beside the weights cannot be compared"),), "not compared")

    def _source(self, planned: Planned | None) -> Comparator | None:
        if planned is None:
            return None
        self._extra[SOURCE] = planned.findings, f"{planned.plan.checkpoint.path}, {planned.said}"
        return against_plan({**self._subject.tensors, **self._subject.adapter_tensors}, planned.plan, self._facts)

    def _reference(self) -> Comparator | None:
        if self._given.reference is None:
            self._before[REFERENCE] = Outcome(said="pass reference= to compare with another model", ran=False)
            return None
        options = self._given.options
        reference = weights_of(self._given.reference, progress=self._given.progress)
        self._extra[REFERENCE] = (), reference.label
        return against_reference(self._subject.tensors, reference, self._facts, atol=options.atol, rtol=options.rtol)

    @property
    def _facts(self) -> ModelFacts | None:
        facts = self._subject.facts
        return facts if isinstance(facts, ModelFacts) else None
