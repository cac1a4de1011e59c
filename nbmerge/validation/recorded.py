"""The directory against its own receipt: the files that the merge wrote, their sizes and their digests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nbmerge.engine.pool import Pool, default_workers
from nbmerge.errors import plural
from nbmerge.receipt import RECEIPT_NAME, sha256_of
from nbmerge.validation.findings import Check, Finding, Outcome
from nbmerge.validation.subject import Subject

_CHANGED = "the file was changed, damaged or replaced after the merge"
_FIX = "merge again; if the change was meant, remove the receipt, which speaks of another directory"


class ReceiptCheck(Check):
    """Every file that the receipt lists is there and has its size."""

    name = "receipt"
    title = "every file that the merge wrote is there, with its size"

    def run(self, subject: Subject) -> Outcome:
        """Compares the receipt with the directory's listing."""
        if not (subject.directory / RECEIPT_NAME).exists():
            return Outcome(said=f"there is no {RECEIPT_NAME}: the directory was not merged by nbmerge", ran=False)
        files, sides = _written(subject), _names(subject.receipt, "side_files")
        if not files:
            fault = Finding("cannot be read", RECEIPT_NAME, "it lists no files", why="it was edited or cut", fix=_FIX)
            return Outcome((fault,), "it lists no files")
        findings = [*_weights(subject, files), *_missing(subject.directory, sides)]
        said = f"{plural(len(files), 'weight file')} and {plural(len(sides), 'further file')} of the merge"
        return Outcome(tuple(findings), said)


def _written(subject: Subject) -> list[Mapping[str, Any]]:
    """The receipt's entries of weight files; those that are none are left out."""
    listed = subject.receipt.get("files") if subject.receipt else None
    entries = listed if isinstance(listed, list) else []
    return [each for each in entries if isinstance(each, dict) and _is_inside(each.get("name"))]


def _names(receipt: Mapping[str, Any] | None, key: str) -> list[str]:
    listed = receipt.get(key) if receipt else None
    return [name for name in listed if _is_inside(name)] if isinstance(listed, list) else []


def _is_inside(name: object) -> bool:
    """Whether it names a file below the directory."""
    return isinstance(name, str) and bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts


def _weights(subject: Subject, files: list[Mapping[str, Any]]) -> Iterator[Finding]:
    yield from _missing(subject.directory, [entry["name"] for entry in files])
    for entry in files:
        path = subject.directory / entry["name"]
        if path.is_file() and path.stat().st_size != entry.get("bytes"):
            yield Finding(
                "has another size than when it was merged", entry["name"],
                f"{path.stat().st_size:,} bytes, the receipt says {entry.get('bytes')!r}", why=_CHANGED, fix=_FIX,
            )  # fmt: skip


def _missing(directory: Path, names: list[str]) -> Iterator[Finding]:
    for name in names:
        if not (directory / name).is_file():
            yield Finding(
                "was written by the merge, and is missing", name,
                why="it was deleted, or not copied with the rest",
                fix="copy it from where the merge wrote it, or merge again",
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
                pool.submit(lambda name=name: found.update({name: _digest(subject.directory / name)}))  # type: ignore[misc]
            pool.drain()
        findings = [
            _unlike(name, found[name], want) for name, want in recorded.items() if found[name] not in ("", want)
        ]
        return Outcome(tuple(findings), f"hashed {plural(sum(map(bool, found.values())), 'file')}")


def _digest(path: Path) -> str:
    """The sha256 of a file; empty where it cannot be read, which is another check's finding."""
    try:
        return sha256_of(path)
    except OSError:
        return ""


def _unlike(name: str, found: str, want: object) -> Finding:
    detail = f"sha256 {found[:12]}…, the receipt says {str(want)[:12]}…"
    return Finding("has another digest than when it was merged", name, detail, why=_CHANGED, fix=_FIX)
