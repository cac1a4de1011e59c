"""Names and shapes of the tensors against the class that config.json names, made on the meta device; and ties."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nbmerge.errors import NbmergeError, listing, plural
from nbmerge.geometry import Shape
from nbmerge.naming.prefixes import strip_wrappers
from nbmerge.validation.expectation import Expectation, names_a_method, quantization_configs
from nbmerge.validation.findings import WARNING, Check, Finding, Outcome
from nbmerge.validation.quiet import first_line
from nbmerge.validation.subject import Subject

_BLOCK = 2**20  # bytes that are compared at a time
_LORA = re.compile(r"(^|\.)(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save)\.")
_CONFIG = "check that config.json is this model's; merge with the trained model's: --hf_model_config_path DIR"
_RENAME = "merge the checkpoint with nbmerge, which writes the names of the class"


def _no_model(error: NbmergeError) -> Outcome:
    problem = error.problem
    finding = Finding("makes no model", "config.json", problem.what, why=problem.why, fix=problem.fix)
    return Outcome((finding,), "there is nothing to compare with")


class StructureCheck(Check):
    """The files hold every tensor that the class has, in its shape, and no other."""

    name = "structure"
    title = "every tensor that the config's class has is there, in its shape, and no other"

    def run(self, subject: Subject) -> Outcome:
        """Compares the headers with the class. Makes the class on the meta device, without weights."""
        expected = Expectation.of(subject)
        if isinstance(expected, str):
            return Outcome(said=expected, ran=False)
        if isinstance(expected, NbmergeError):
            return _no_model(expected)
        lost = set(_lost(subject, expected))
        findings = [
            *_unread(subject, expected, lost), *_missing(expected, lost), *_unexpected(expected),
            *_mismatched(expected), *_unnamed_quantization(subject),
        ]  # fmt: skip
        said = f"{plural(len(expected.shapes), 'tensor')} of {expected.facts.class_name}"
        if expected.in_memory and not expected.facts.published.keys() >= expected.shapes.keys():
            said += ", under the names that transformers has in memory"
        if expected.unloaded:
            said += f", and {len(expected.unloaded):,} that it knows and does not load"
        return Outcome(tuple(findings), said)


def _lost(subject: Subject, expected: Expectation) -> list[str]:
    """Tensors of the class that are missing because a file could not be read: where the index says which, those."""
    if not subject.unread:
        return []
    index = subject.index
    return [name for name in expected.missing() if not index or index.get(name) in subject.unread]


def _unread(subject: Subject, expected: Expectation, lost: set[str]) -> Iterator[Finding]:
    if lost or subject.unread:
        of = f"{len(lost):,} of the {plural(len(expected.shapes), 'tensor')} of {expected.facts.class_name}"
        yield Finding(
            "cannot be read, and what it holds could not be compared", listing(subject.unread),
            f"{of} were not found: {listing(name for name in expected.shapes if name in lost)}",
            why="the file is damaged, or is not there; the checks `headers` and `index` say which",
            fix="mend what those checks found, and validate again",
        )  # fmt: skip
    elif not subject.headers:
        yield Finding(
            "holds no safetensors files", str(subject.directory),
            f"{expected.facts.class_name} has {plural(len(expected.shapes), 'tensor')}",
            why="the check `headers` says what the directory has instead",
            fix="pass the directory that a merge wrote",
        )  # fmt: skip


def _unnamed_quantization(subject: Subject) -> Iterator[Finding]:
    if not all(map(names_a_method, quantization_configs(subject))):
        yield Finding(
            "has a quantization_config that names no quant_method", "config.json",
            "the tensors were compared as weights that are not quantised",
            why="transformers and servers refuse such a config, or take the weights for packed ones",
            fix="remove quantization_config from config.json, or write the method's whole one",
            severity=WARNING,
        )  # fmt: skip


def _missing(expected: Expectation, lost: set[str]) -> Iterator[Finding]:
    for name in expected.missing() if expected.found else ():
        if name in lost:
            continue
        yield Finding(
            "is missing", name, f"shape {list(expected.shapes[name])}",
            why=f"{expected.facts.class_name} has it; without it, loading fills it with random values",
            fix=_CONFIG,
        )  # fmt: skip


def _unexpected(expected: Expectation) -> Iterator[Finding]:
    absent = {(_end(name), expected.shapes[name]) for name in expected.missing()}
    for name in expected.unexpected():
        known = (_end(name), expected.found[name]) in absent
        why, fix = _cause(name, elsewhere=known)
        yield Finding(
            f"is no tensor of {expected.facts.class_name}", name, f"shape {list(expected.found[name])}", why, fix
        )


def _cause(name: str, *, elsewhere: bool) -> tuple[str, str]:
    """Why a name may be there that the class has not, by the patterns that are known, and what to do.

    elsewhere: whether the class lacks a tensor of the same shape whose name ends in the same way.
    """
    if _LORA.search(name):
        why = "the adapter was saved beside the weights, not folded into them"
        return why, "merge again with --lora fold, or fold it in the training job (peft's merge_and_unload)"
    if strip_wrappers(name) != name:
        return "the name has the prefix of a training wrapper, which loading does not take off", _RENAME
    if elsewhere:
        return "the class has it under another prefix: transformers 4 and 5 and vLLM differ in some", _RENAME
    return "the class neither loads it nor knows it, so that what it holds is lost", _CONFIG


def _end(name: str) -> str:
    """The part of a name that other prefixes leave as it is: `0.norm.weight` of `model.layers.0.norm.weight`."""
    end = re.search(r"(?<=\.)\d+\..*$", name) or re.search(r"[^.]+\.[^.]+$", name)
    return end[0] if end else name


def _mismatched(expected: Expectation) -> Iterator[Finding]:
    for name, got, want in expected.mismatched():
        yield Finding(
            "has another shape than the class", name, f"{list(got)} here, {list(want)} in {expected.facts.class_name}",
            _reason(got, want), _CONFIG,
        )  # fmt: skip


def _reason(got: Shape, want: Shape) -> str:
    """The cause of a shape, where the two shapes show it."""
    rest = len(got) == len(want) > 0 and got[1:] == want[1:]
    if rest and want[0] and got[0] > want[0] and got[0] % want[0] == 0:
        return f"{got[0] // want[0]} times as many rows: a replicated tensor was concatenated, once for each rank"
    if rest and got[0] > want[0]:
        return "too many rows: the padding of an uneven shard, or of the vocabulary, was not cut off"
    if rest:
        return "too few rows: a rank's shard is missing, or the vocabulary was resized without the config"
    return "config.json is of another model, or the tensor was put together along another dimension"


class TiedCheck(Check):
    """Tensors that the config ties are written once, or hold the same values."""

    name = "tied"
    title = "tensors that the config ties are written once, or are equal"

    def run(self, subject: Subject) -> Outcome:
        """Reads both sides of a tie where both are written."""
        expected = Expectation.of(subject)
        if not isinstance(expected, Expectation):
            return Outcome(said="the class is not known", ran=False)
        if not expected.tied:
            return Outcome(said=f"{expected.facts.class_name} ties nothing with this config")
        if not expected.found:
            return Outcome(said="there are no tensors that can be read", ran=False)
        both = [(alias, kept) for alias, kept in expected.tied.items() if {alias, kept} <= expected.found.keys()]
        findings = [_tie(subject, alias, kept) for alias, kept in both]
        said = f"{plural(len(expected.tied), 'tie')}, {len(both):,} of them written twice"
        return Outcome(tuple(findings), said)


def _tie(subject: Subject, alias: str, kept: str) -> Finding:
    difference = _difference(subject, alias, kept)
    if not difference:
        return Finding(
            "is written though it is tied", alias, f"the same values as {kept}",
            why="the tool that saved it did not leave the shared tensor out; it takes its bytes twice",
            fix="leave it, or merge with nbmerge, which writes it once",
            severity=WARNING,
        )  # fmt: skip
    return Finding(
        "is tied to a tensor with other values", alias, f"{kept}: {difference}",
        why="config.json ties the two, but training moved them apart, or one of them was replaced",
        fix='set "tie_word_embeddings": false in config.json if both were trained',
    )  # fmt: skip


def _difference(subject: Subject, alias: str, kept: str) -> str:
    """In what two tensors differ; empty where they hold the same bits."""
    from nbmerge.engine.comparison import first_difference
    from nbmerge.engine.sources import LocalFiles

    a, b = subject.tensors[alias], subject.tensors[kept]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
    try:
        with LocalFiles() as sources:
            index = first_difference(a, b, _BLOCK, sources)
    except (NbmergeError, OSError) as error:
        said = error.problem.what if isinstance(error, NbmergeError) else first_line(error)
        return f"they cannot be compared: {said}"
    return "" if index is None else f"the first difference is at {list(index)}"
