"""Re-reads a directory that a merge wrote and compares it with the plan and with the model's own expectation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from nbmerge.engine.safetensors_file import Entry, read_header
from nbmerge.errors import NbmergeError, Problem, VerificationError, listing, plural
from nbmerge.plan import MergePlan


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found true on disk: files, tensors, bytes, and outputs that the class knows and does not load.

    adapter: how many of the tensors are an adapter's.
    """

    files: int
    tensors: int
    nbytes: int
    model_class: str
    unloaded: int = 0
    adapter: int = 0

    @property
    def sentence(self) -> str:
        """What was proved, in a sentence."""
        extra = f", {self.unloaded:,} known and not loaded" if self.unloaded else ""
        if self.adapter and self.adapter == self.tensors:
            return f"re-read {plural(self.files, 'file')}: {plural(self.tensors, 'tensor')} of an adapter, as planned"
        extra += f"; {self.adapter:,} of them an adapter's, as planned" if self.adapter else ""
        tensors = f"{plural(self.tensors, 'tensor')} of {self.nbytes:,} bytes"
        return (
            f"re-read {plural(self.files, 'file')}: {tensors}, each with the shape that {self.model_class} expects, "
            f"none missing, none extra{extra}"
        )


def verify(plan: MergePlan, directory: Path) -> Verification:
    """Proves that the directory is what was planned. Raises VerificationError with all that is not so."""
    problems: list[Problem] = []
    found = _read_all(plan, directory, problems)
    _against_plan(plan, found, problems)
    _adapter(plan, directory, problems)
    _against_model(plan, found, problems)
    _index(plan, directory, found, problems)
    problems += [
        Problem(f"{file.name} is missing or empty", where=str(directory))
        for file in plan.side_files
        if not (directory / file.name).is_file() or (directory / file.name).stat().st_size != file.size
    ]
    if problems:
        raise VerificationError(
            f"the result did not verify and was not published: {plural(len(problems), 'finding')}", problems=problems
        )
    return Verification(
        len(plan.weight_files),
        len(found) + sum(len(file.tensors) for file in plan.adapter_files),
        sum(entry.nbytes for _, entry in found.values()) + sum(file.data_bytes for file in plan.adapter_files),
        plan.model_class,
        len(plan.unloaded),
        sum(len(file.tensors) for file in plan.adapter_files),
    )


def _read_all(plan: MergePlan, directory: Path, problems: list[Problem]) -> dict[str, tuple[str, Entry]]:
    found: dict[str, tuple[str, Entry]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            entries = read_header(path)
        except NbmergeError as error:
            problems.append(error.problem)
            continue
        for name, entry in entries.items():
            if name in found:
                problems.append(Problem(f"{name} is in two files", where=f"{found[name][0]} and {path.name}"))
            found[name] = (path.name, entry)
    missing = {file.name for file in plan.files} - {path.name for path in directory.glob("*.safetensors")}
    problems += [Problem(f"{name} was not written", where=str(directory)) for name in sorted(missing)]
    return found


def _against_plan(plan: MergePlan, found: dict[str, tuple[str, Entry]], problems: list[Problem]) -> None:
    planned = plan.tensors
    problems += [Problem(f"{name} is missing") for name in planned.keys() - found.keys()]
    for name, (file, entry) in found.items():
        if name not in planned:
            problems.append(Problem(f"{name} was not planned", where=file))
        elif (entry.shape, entry.dtype) != (planned[name].expr.shape, planned[name].expr.dtype):
            problems.append(Problem(f"{name} is {entry.dtype} {list(entry.shape)}, not as planned", where=file))


def _adapter(plan: MergePlan, directory: Path, problems: list[Problem]) -> None:
    """The adapter's file against the plan."""
    for file in plan.adapter_files:
        if not (directory / file.name).is_file():
            problems.append(Problem(f"{file.name} was not written", where=str(directory)))
            continue
        try:
            entries = read_header(directory / file.name)
        except NbmergeError as error:
            problems.append(error.problem)
            continue
        want = {tensor.name: (tensor.expr.shape, tensor.expr.dtype) for tensor in file.tensors}
        if want != {name: (entry.shape, entry.dtype) for name, entry in entries.items()}:
            problems.append(Problem(f"{file.name} holds other tensors than were planned", where=str(directory)))


def _against_model(plan: MergePlan, found: dict[str, tuple[str, Entry]], problems: list[Problem]) -> None:
    unloaded = set(plan.unloaded)
    absent = [name for name in plan.expected if name not in found]
    if absent:
        problems.append(Problem(f"{len(absent)} tensors of {plan.model_class} are missing: {listing(absent)}"))
    extra = [name for name in found if name not in plan.expected and name not in unloaded]
    if extra:
        problems.append(Problem(f"{len(extra)} tensors are none of {plan.model_class}'s: {listing(extra)}"))
    for name, shape in plan.expected.items():
        if name in found and found[name][1].shape != shape:
            problems.append(Problem(f"{name} is {list(found[name][1].shape)}, {plan.model_class} has {list(shape)}"))


def _index(plan: MergePlan, directory: Path, found: dict[str, tuple[str, Entry]], problems: list[Problem]) -> None:
    path = directory / "model.safetensors.index.json"
    if not path.is_file():
        if len(plan.files) > 1:
            problems.append(Problem("there is no index", where=str(path)))
        return
    content = json.loads(path.read_bytes())
    if content["weight_map"] != {name: file for name, (file, _) in found.items()}:
        problems.append(Problem("the index and the files name different tensors", where=str(path)))
    total = sum(entry.nbytes for _, entry in found.values())
    if content["metadata"]["total_size"] != total:
        problems.append(Problem(f"total_size is {content['metadata']['total_size']}, not {total}", where=str(path)))
