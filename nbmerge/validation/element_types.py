"""The dtypes of the tensors against those that the config and the class state."""

from __future__ import annotations

from collections import Counter

from nbmerge.dtypes import DType, parse_dtype
from nbmerge.validation.expectation import Expectation
from nbmerge.validation.findings import WARNING, Check, Finding, Outcome
from nbmerge.validation.subject import Subject


class DtypesCheck(Check):
    """Floating tensors have the config's dtype, or the one that the class keeps; integers are where it has integers."""

    name = "dtypes"
    title = "every tensor has the dtype that config.json states, or the class keeps"

    def run(self, subject: Subject) -> Outcome:
        """Compares the headers with the config and the class."""
        expected = Expectation.of(subject)
        if not isinstance(expected, Expectation):
            return Outcome(said="the class is not known", ran=False)
        if not subject.entries:
            return Outcome(said="there are no tensors that can be read", ran=False)
        stated = stated_dtype(subject)
        entries = [entry for _, entry in subject.entries.values()]
        findings = [
            finding
            for entry in entries
            if (finding := _dtype(entry.name, entry.dtype, stated, expected)) is not None
        ]  # fmt: skip
        counts = Counter(entry.dtype.name for entry in entries)
        said = ", ".join(f"{number:,} {name}" for name, number in counts.most_common())
        return Outcome(tuple(findings), said if stated else f"{said}; config.json states no dtype")


def stated_dtype(subject: Subject) -> DType | None:
    """The dtype that the config states: for the model, or for its text part."""
    config = subject.json("config.json")
    parts = [config, config.get("text_config")] if isinstance(config, dict) else []
    for part in parts:
        for key in ("dtype", "torch_dtype"):
            if isinstance(part, dict) and isinstance(part.get(key), str):
                try:
                    return parse_dtype(part[key])
                except KeyError:
                    return None
    return None


def _dtype(name: str, dtype: DType, stated: DType | None, expected: Expectation) -> Finding | None:
    made = expected.dtypes.get(name)
    here, there = ("integers", "floats") if not dtype.is_floating else ("floats", "integers")
    if made is not None and made.is_floating != dtype.is_floating:
        return Finding(
            f"holds {here} where the class has {there}", name, f"{dtype} here, {made} in {expected.facts.class_name}",
            why="it was quantised, or cast, without the config saying so",
            fix="merge again; to publish quantised weights, write their quantization_config",
        )  # fmt: skip
    if stated is None or not dtype.is_floating or dtype == stated or expected.facts.is_kept_from(stated, name):
        return None
    return Finding(
        f"is {dtype}, and config.json says {stated}", name,
        why="most loaders cast to the config's dtype, so that what is loaded is not what is stored",
        fix=f'set "dtype": "{dtype}" in config.json, or merge with dtype="{stated}"',
        severity=WARNING,
    )  # fmt: skip
