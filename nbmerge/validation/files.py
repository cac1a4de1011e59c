"""The weight files: each is whole, and together they are what the index says."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbmerge.dtypes import BY_CODE
from nbmerge.engine.safetensors_file import Entry
from nbmerge.errors import NbmergeError, listing, plural
from nbmerge.validation.findings import WARNING, Check, Finding, Outcome
from nbmerge.validation.subject import INDEX_NAME, WEIGHTS_NAME, Subject

_AGAIN = "merge again; if it was downloaded, download it again"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class HeadersCheck(Check):
    """Every safetensors file is whole, byte by byte, and the safetensors library opens it."""

    name = "headers"
    title = "every weight file is whole: its header describes all of its bytes"

    def run(self, subject: Subject) -> Outcome:
        """Reads the headers. Nothing else of the files."""
        if not subject.headers:
            return Outcome((_no_weights(subject.directory),), "no safetensors files")
        findings = [found for name, read in subject.headers.items() for found in _of_file(subject, name, read)]
        said = f"{plural(len(subject.headers), 'file')}, {plural(len(subject.entries), 'tensor')}"
        return Outcome(tuple(findings), f"{said}, {subject.nbytes:,} bytes")


def _no_weights(directory: Path) -> Finding:
    others = sorted(path.name for path in directory.iterdir() if path.name.endswith((*_PICKLES, ".gguf")))
    return Finding(
        "holds no safetensors files", str(directory), f"it has {listing(others)}" if others else "",
        why="the weights were saved in another form" if others else "in training they are elsewhere, in shards",
        fix="pass the directory that a merge wrote; to make one: nbmerge.merge(CHECKPOINT, DIR)",
    )  # fmt: skip


def _of_file(subject: Subject, name: str, read: Mapping[str, Entry] | NbmergeError) -> Iterator[Finding]:
    path = subject.directory / name
    pairs = _header_pairs(path)
    if twice := [key for key, number in Counter(key for key, _ in pairs).items() if number > 1]:
        yield Finding("names a tensor twice in its header", name, listing(twice), fix=_AGAIN)
    elif isinstance(read, NbmergeError) and (unknown := _unknown_dtypes(pairs)):
        refusal = _refusal(path)
        yield Finding(
            "holds a dtype that is not known", name,
            listing(f"{tensor} is {code}" for tensor, code in unknown.items())
            + (f"; the safetensors library: {refusal}" if refusal else ""),
            why="it is none of the installed safetensors' dtypes" if refusal
            else "safetensors has the dtype; this version of nbmerge does not, so that nothing in the file is checked",
            fix="merge again with a dtype that torch has" if refusal
            else "cast these tensors, or validate with a version that knows the dtype",
        )  # fmt: skip
    elif isinstance(read, NbmergeError):
        problem = read.problem
        yield Finding("is damaged", name, problem.what, why=problem.why, fix=problem.fix or _AGAIN)
    elif refusal := _refusal(path):
        yield Finding("is refused by the safetensors library", name, refusal, fix=_AGAIN)
    elif ("format", "pt") not in (dict(pairs).get("__metadata__") or ()):
        yield Finding(
            "does not say for which framework it is", name, '{"format": "pt"} is not in its metadata',
            why="it was written without that metadata; transformers 4 refuses to load such a file, 5 loads it",
            fix='write it with safetensors.torch.save_file(…, metadata={"format": "pt"})',
            severity=WARNING,
        )  # fmt: skip


def _header_pairs(path: Path) -> list[tuple[str, Any]]:
    """The header as the file has it, where a name may stand twice; empty where it cannot be read."""
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            pairs = json.loads(stream.read(min(length, path.stat().st_size)), object_pairs_hook=list)
    except (OSError, ValueError, RecursionError):
        return []
    return [pair for pair in pairs if isinstance(pair, tuple)] if isinstance(pairs, list) else []


def _unknown_dtypes(pairs: list[tuple[str, Any]]) -> dict[str, str]:
    """Tensors of a header whose dtype is a code that is not known, and the code."""
    codes = ((name, dict(entry).get("dtype")) for name, entry in pairs if name != "__metadata__" and _is_object(entry))
    return {name: code for name, code in codes if isinstance(code, str) and code not in BY_CODE}


def _is_object(pairs: object) -> bool:
    """Whether a value of a header that was read as pairs is an object."""
    return isinstance(pairs, list) and all(isinstance(pair, tuple) for pair in pairs)


def _refusal(path: Path) -> str:
    """Why the safetensors library does not open a file; empty where it does."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return ""
    except (SafetensorError, OSError) as error:
        return str(error)


class IndexCheck(Check):
    """The index names exactly the tensors of exactly these files, and no file is missing or left over."""

    name = "index"
    title = "the index and the files name the same tensors, and no file is missing or left over"

    def run(self, subject: Subject) -> Outcome:
        """Compares the index with the headers."""
        if not subject.headers:
            return Outcome(said="there are no safetensors files", ran=False)
        outcome = self._compared(subject)
        damaged = [file for file in subject.loaded if isinstance(subject.headers[file], NbmergeError)]
        if not damaged:
            return outcome
        ran = bool(outcome.findings) or len(damaged) < len(subject.loaded)
        return replace(outcome, said=f"{outcome.said}; not compared, since not readable: {listing(damaged)}", ran=ran)

    def _compared(self, subject: Subject) -> Outcome:
        findings = [*_two_files(subject), *_gaps(subject), *_leftovers(subject)]
        path = subject.directory / INDEX_NAME
        if not path.is_file():
            return Outcome((*_without_index(subject), *findings), f"{plural(len(subject.headers), 'file')}, no index")
        fault = _fault(path)
        if fault:
            finding = Finding("is no index of tensors", INDEX_NAME, fault, fix="merge again; it is written last")
            return Outcome((finding, *findings), "the index cannot be read")
        findings = [*_compared(subject), *_total(subject), *findings]
        return Outcome(
            tuple(findings),
            f"{plural(len(subject.index), 'tensor')} in the index, {plural(len(subject.headers), 'file')}",
        )


def _fault(path: Path) -> str:
    """Why a file is no index that transformers can use; empty where it is one."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return f"it is no JSON: {error}"
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        return "it has no weight_map of tensor names to files"
    wrong = [name for name, file in weight_map.items() if not isinstance(file, str)]
    if wrong:
        return f"weight_map gives {listing(wrong)} something else than the name of a file"
    return "" if isinstance(content.get("metadata"), dict) else "it has no metadata, which transformers reads"


def _without_index(subject: Subject) -> Iterator[Finding]:
    if WEIGHTS_NAME not in subject.headers:
        yield Finding(
            "is missing", INDEX_NAME, f"the weights are in {listing(subject.headers)}",
            why=f"transformers looks for {WEIGHTS_NAME}, and then for the index",
            fix="merge again, or copy the index that belongs to these files",
        )  # fmt: skip


def _compared(subject: Subject) -> Iterator[Finding]:
    """The index against the headers: every tensor in the file that the index gives it, and no other."""
    holds = {file: read for file, read in subject.headers.items() if isinstance(read, Mapping)}
    named: dict[str, list[str]] = {}
    for name, file in subject.index.items():
        named.setdefault(file, []).append(name)
    for file in sorted(named.keys() - subject.headers.keys()):
        if Path(file).name == file:  # a path is the business of the check of paths
            yield Finding(
                "is named by the index, and missing", file, f"{plural(len(named[file]), 'tensor')} should be in it",
                why="a file was deleted or never downloaded, or the index is of another merge", fix=_AGAIN,
            )  # fmt: skip
    where = {name: file for file, entries in holds.items() for name in entries}
    for name, file in subject.index.items():
        if file in holds and name not in holds[file]:
            there = f"the index says {file}; it is in {where.get(name, 'no file')}"
            yield Finding(
                "is not where the index says", name, there,
                why="index and files are of two merges, or one of them was edited", fix=_AGAIN,
            )  # fmt: skip
    for file in named:
        for name in holds.get(file, ()):
            if name not in subject.index:
                yield Finding(
                    "is not in the index", name, f"it is in {file}",
                    why="index and files are of two merges, or one of them was edited", fix=_AGAIN,
                )  # fmt: skip
    if WEIGHTS_NAME in subject.headers and named.keys() - {WEIGHTS_NAME}:
        yield Finding(
            "hides the shards", WEIGHTS_NAME, f"the index names {listing(sorted(named))}",
            why=f"where {WEIGHTS_NAME} is, transformers loads it and looks at no index",
            fix=f"remove {WEIGHTS_NAME}, or the index with its shards, whichever is older",
        )  # fmt: skip


def _total(subject: Subject) -> Iterator[Finding]:
    content = subject.json(INDEX_NAME)
    stated = content["metadata"].get("total_size")
    loaded = {file for file in subject.loaded if isinstance(subject.headers[file], Mapping)}
    if loaded == set(subject.index.values()) and stated != subject.nbytes:
        yield Finding(
            "states another size than the tensors have", INDEX_NAME,
            f"total_size is {stated!r}, the tensors have {subject.nbytes:,} bytes",
            why="index and files are of two merges, or one of them was edited", fix=_AGAIN,
        )  # fmt: skip


def _two_files(subject: Subject) -> Iterator[Finding]:
    first: dict[str, str] = {}
    for file in subject.loaded:
        read = subject.headers[file]
        for name in read if isinstance(read, Mapping) else ():
            if name in first:
                yield Finding(
                    "is in two files", name, f"{first[name]} and {file}",
                    why="which of the two is loaded depends on the order of the files", fix=_AGAIN,
                )  # fmt: skip
            first.setdefault(name, file)


def _gaps(subject: Subject) -> Iterator[Finding]:
    """Numbers that are missing among the shards that are loaded, and that the index does not name either."""
    matches = [match for file in subject.loaded if (match := _SHARD.fullmatch(file))]
    for stem, total in dict.fromkeys((match[1], match[3]) for match in matches):
        numbers = {match[2] for match in matches if (match[1], match[3]) == (stem, total)}
        for number in (f"{i:05d}" for i in range(1, min(int(total), 9999) + 1)):
            file = f"{stem}-{number}-of-{total}.safetensors"
            if number not in numbers and file not in subject.index.values():
                yield Finding(
                    "is missing", file, f"the shards are numbered up to {int(total)}",
                    why="a file was deleted or never downloaded, with its tensors", fix=_AGAIN,
                )  # fmt: skip


def _leftovers(subject: Subject) -> Iterator[Finding]:
    loaded = {*subject.loaded, *subject.index.values()}
    for file in subject.headers:
        if file not in loaded and not file.startswith("adapter_"):
            yield Finding(
                "is loaded by nothing", file,
                why="a leftover of another merge, or a second copy of the weights in another form",
                fix="remove it before the directory is published",
                severity=WARNING,
            )  # fmt: skip
    for path in sorted(subject.directory.iterdir()):
        if path.name.endswith(_PICKLES):
            yield Finding(
                "is a pickle beside the safetensors files", path.name,
                why="a leftover of training; whoever loads it runs what is in it",
                fix="remove it before the directory is published",
                severity=WARNING,
            )  # fmt: skip
