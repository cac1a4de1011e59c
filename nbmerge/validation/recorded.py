"""The directory against its own receipt: the files that the merge wrote, their sizes and their digests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nbmerge.engine.pool import Pool, default_workers
from nbmerge.errors import plural
from nbmerge.loaders.reading import is_file
from nbmerge.receipt import RECEIPT_NAME, SCHEMA
from nbmerge.validation.beside import additions, recorded_beside, severity_of
from nbmerge.validation.findings import WARNING, Check, Finding, Outcome
from nbmerge.validation.on_disk import digest_of, is_inside, size_of
from nbmerge.validation.subject import Subject

_CHANGED = "the file was changed, damaged or replaced after the merge"
_FIX = "merge again; if the change was meant, remove the receipt, which speaks of another directory"


class ReceiptCheck(Check):
    """Every file that the receipt lists is there and has its size, and small ones their sha256, if it is recorded."""

    name = "receipt"
    title = "every file that the merge wrote is there, as its receipt describes it"

    def run(self, subject: Subject) -> Outcome:
        """Compares the receipt with the directory's listing, and hashes the small files."""
        if not (subject.directory / RECEIPT_NAME).exists():
            return Outcome(said=f"there is no {RECEIPT_NAME}: the directory was not merged by nbmerge", ran=False)
        files = _written(subject)
        sides = {name: entry for name, entry in recorded_beside(subject).items() if is_inside(name)}
        if not files:
            fault = Finding("cannot be read", RECEIPT_NAME, "it lists no files", why="it was edited or cut", fix=_FIX)
            return Outcome((fault,), "it lists no files")
        hashed = {name: entry for name, entry in sides.items() if entry.get("sha256")}
        findings = [
            *_of_another_version(subject), *_weights(subject, files), *_missing(subject.directory, list(sides)),
            *_changed(subject.directory, hashed),
            *additions(subject.directory, set(sides), "was added after the merge"),
        ]  # fmt: skip
        said = f"{plural(len(files), 'weight file')} and {plural(len(sides), 'further file')} of the merge: sizes"
        said += f", and the sha256 of {plural(len(hashed), 'small one')}" if hashed else " of the weight files"
        return Outcome(tuple(findings), said)


def _of_another_version(subject: Subject) -> Iterator[Finding]:
    schema = (subject.receipt or {}).get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        yield Finding(
            "is of another version", RECEIPT_NAME, f"its schema is {schema!r}; this version reads {SCHEMA}",
            why="another version of nbmerge wrote it, or it was edited; what it says may be misread",
            fix="validate with the version that merged, or pass checkpoint= to prove the values themselves",
            severity=WARNING,
        )  # fmt: skip


def _written(subject: Subject) -> list[Mapping[str, Any]]:
    """The receipt's entries of weight files; those that are none are left out."""
    listed = subject.receipt.get("files") if subject.receipt else None
    entries = listed if isinstance(listed, list) else []
    return [each for each in entries if isinstance(each, dict) and is_inside(each.get("name"))]


def _weights(subject: Subject, files: list[Mapping[str, Any]]) -> Iterator[Finding]:
    yield from _missing(subject.directory, [entry["name"] for entry in files])
    for entry in files:
        size = size_of(subject.directory / entry["name"])
        if size is not None and size != entry.get("bytes"):
            yield Finding(
                "has another size than when it was merged", entry["name"],
                f"{size:,} bytes, the receipt says {entry.get('bytes')!r}", why=_CHANGED, fix=_FIX,
            )  # fmt: skip


def _missing(directory: Path, names: list[str]) -> Iterator[Finding]:
    for name in names:
        if not is_file(directory / name):
            yield Finding(
                "was written by the merge, and is missing", name,
                why="it was deleted, or not copied with the rest",
                fix="copy it from where the merge wrote it, or merge again",
            )  # fmt: skip


def _changed(directory: Path, recorded: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Small files that are not what the merge wrote: an error where they decide the model or its tokens."""
    for name, entry in recorded.items():
        digest = digest_of(directory / name)
        if digest in ("", entry["sha256"]):  # one that is missing, or cannot be read, is told elsewhere
            continue
        yield Finding(
            "was changed after the merge", name,
            f"{size_of(directory / name) or 0:,} bytes, {entry.get('bytes')!r} when it was written",
            why="it was edited, or copied from another model",
            fix="copy it again from the checkpoint, or merge again; if the change was meant, choose the other "
            "checks: checks= (--checks)",
            severity=severity_of(name),
        )  # fmt: skip


class DigestsCheck(Check):
    """Every weight file has the sha256 that the receipt records. workers: threads; by default one per processor."""

    name = "digests"
    title = "every weight file has the sha256 that the merge recorded"

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers

    def run(self, subject: Subject) -> Outcome:
        """Reads the files whose digest is recorded once more."""
        recorded = {entry["name"]: entry["sha256"] for entry in _written(subject) if entry.get("sha256")}
        if not recorded:
            return Outcome(said="the receipt records no digests; merge with digests=True (--digests)", ran=False)
        found: dict[str, str] = {}
        with Pool(self._workers or default_workers()) as pool:
            for name in recorded:
                pool.submit(lambda name=name: found.update({name: digest_of(subject.directory / name)}))  # type: ignore[misc]
            pool.drain()
        findings = [
            _unlike(name, found[name], want) for name, want in recorded.items() if found[name] not in ("", want)
        ]
        return Outcome(tuple(findings), f"hashed {plural(sum(map(bool, found.values())), 'file')}")


def _unlike(name: str, found: str, want: object) -> Finding:
    detail = f"sha256 {found[:12]}…, the receipt says {str(want)[:12]}…"
    return Finding("has another digest than when it was merged", name, detail, why=_CHANGED, fix=_FIX)
