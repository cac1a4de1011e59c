"""Config, tokenizer, templates and code against those that the merge of the checkpoint writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import Path
from typing import Any

from nbmerge.errors import listing, plural
from nbmerge.loaders.reading import is_file
from nbmerge.naming.facts import ModelFacts
from nbmerge.plan import MergePlan, SideFile
from nbmerge.validation.findings import ERROR, WARNING, Finding, Outcome
from nbmerge.validation.on_disk import content_of
from nbmerge.validation.subject import INDEX_NAME, Subject

# What decides which model it is and what its tokens mean. The rest (sampling, templates, notes) is often changed
# after a merge on purpose, and is for a person to judge.
_CRITICAL = (
    "config.json", "*.py", "tokenizer.json", "tokenizer.model", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "spiece.model", "*.tiktoken", "*.bpe.model",
)  # fmt: skip
_ADDED = ("*.py", "*.jinja", "additional_chat_templates/*.jinja", "chat_template.json")
# Keys that say how a config was written rather than what the model is.
_INCIDENTAL = {"transformers_version", "dtype", "torch_dtype", "_name_or_path", "_attn_implementation_autoset"}
# Files that a tokenizer with tokenizer.json does without, and that transformers 5 does not write.
_LEGACY = {"special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"}
_MEANT = "if the change was meant, choose the other checks: checks= (--checks)"
_SHOWN = 60  # characters of a value


def severity_of(name: str) -> str:
    """An error for what decides the model or its tokens, a warning for what is often changed on purpose."""
    return ERROR if any(fnmatch(Path(name).name, pattern) for pattern in _CRITICAL) else WARNING


def additions(
    directory: Path, known: set[str], what: str, why: str = "", patterns: tuple[str, ...] = _ADDED
) -> list[Finding]:
    """Code and templates in the directory that are not known: transformers would use them. why: besides that."""
    found = {path.relative_to(directory).as_posix() for pattern in patterns for path in directory.glob(pattern)}
    return [
        Finding(
            what, name, why=f"{why}transformers uses code and templates that lie beside the weights",
            fix="remove it unless you put it there", severity=WARNING,
        )
        for name in sorted(found - known)
    ]  # fmt: skip


def same_beside(subject: Subject, plan: MergePlan) -> Outcome:
    """The comparison with the plan's small files.

    JSON is compared by what it says. Without a receipt another tool may have written the directory: then config.json
    is compared with the defaults put in, and all that differs is a warning.
    """
    if _is_same_directory(plan.config_dir, subject.directory):
        return Outcome(said="there is no config beside the checkpoint: the directory's own was taken", ran=False)
    files = [file for file in plan.side_files if file.name != INDEX_NAME]
    findings = [finding for file in files for finding in _of_file(subject, plan, file)]
    patterns = _ADDED if subject.receipt is not None else ("*.py",)
    findings += additions(
        subject.directory, {file.name for file in files}, "is in the directory, and not beside the checkpoint",
        "it was added after the merge; ", patterns,
    )  # fmt: skip
    return Outcome(tuple(findings), f"{plural(len(files), 'file')} of {plan.config_dir}")


def _is_same_directory(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        return False


def _of_file(subject: Subject, plan: MergePlan, file: SideFile) -> Iterator[Finding]:
    ours = content_of(subject.directory / file.name)
    theirs = file.content if file.content is not None or file.source is None else content_of(file.source.path)
    severity = severity_of(file.name) if subject.receipt is not None else WARNING
    if theirs is None:
        yield Finding(
            "cannot be compared", file.name, f"{file.source.path if file.source else file.name} cannot be read",
            why="it was removed from the checkpoint, or may not be read", fix="put it back, or plan the merge again",
            severity=WARNING,
        )  # fmt: skip
    elif ours is None:
        if _is_missed(subject, file.name):
            yield Finding(
                "is beside the checkpoint, and not in the directory", file.name,
                why="it was deleted, or not copied with the rest", fix="copy it from the checkpoint's config directory",
                severity=severity,
            )  # fmt: skip
    elif ours != theirs and (detail := _difference(subject, plan, file.name, ours, theirs)):
        what = "is not what the merge of the checkpoint writes"
        if subject.receipt is None:
            what = "says something else than the checkpoint's"
        yield Finding(
            what, file.name, detail,
            why="one of the two was changed after the merge, or another tool wrote the directory",
            fix=f"merge again, or copy the file from the checkpoint; {_MEANT}",
            severity=severity,
        )  # fmt: skip


def _is_missed(subject: Subject, name: str) -> bool:
    """Whether a file that is not there should be: not one that came to the checkpoint after the merge."""
    written = recorded_beside(subject)
    if written:
        return name in written or name == "config.json"
    return name not in _LEGACY or not is_file(subject.directory / "tokenizer.json")


def recorded_beside(subject: Subject) -> dict[str, dict[str, Any]]:
    """The small files that the receipt lists, by name, with `bytes` and `sha256` where it has them."""
    receipt = subject.receipt or {}
    found: dict[str, dict[str, Any]] = {}
    for key in ("side_files", "side_digests"):
        listed = receipt.get(key)
        for each in listed if isinstance(listed, list) else ():
            entry = {"name": each} if isinstance(each, str) else each if isinstance(each, dict) else {}
            if isinstance(name := entry.get("name"), str):
                found[name] = {**found.get(name, {}), **entry}
    return found


def _difference(subject: Subject, plan: MergePlan, name: str, ours: bytes, theirs: bytes) -> str:
    """In what two files differ; empty where they say the same."""
    if not name.endswith(".json"):
        return f"{len(ours):,} bytes here, {len(theirs):,} there, and not the same"
    here, there = _parsed(ours), _parsed(theirs)
    if not isinstance(here, dict) or not isinstance(there, dict):
        return "" if here is not None and here == there else "they do not hold the same JSON"
    keys = _differing(here, there)
    if name == "config.json" and subject.receipt is None:
        keys = _without_incidentals(keys, here, there)
        if keys and (full := _with_defaults(subject, plan)):
            keys = _without_incidentals(_differing(*full), *full)
    return listing(keys.values())


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _differing(here: dict[str, Any], there: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The keys whose values differ, those of inner objects as `outer.inner`: what each has."""
    found: dict[str, str] = {}
    for key in dict.fromkeys([*here, *there]):
        one, other = here.get(key, ...), there.get(key, ...)
        if isinstance(one, dict) and isinstance(other, dict):
            found |= _differing(one, other, f"{prefix}{key}.")
        elif _differ(one, other):
            if isinstance(one, list) and isinstance(other, list) and _is_long(one, other):
                found |= _differing(*_first_differing(one, other), f"{prefix}{key}")
            else:
                found[prefix + key] = f"{prefix}{key} {_shown(one)} here, {_shown(other)} there"
    return found


def _differ(one: object, other: object) -> bool:
    return one != other and repr(one) != repr(other)  # NaN differs from itself


def _is_long(*values: object) -> bool:
    return any(len(repr(value)) > _SHOWN for value in values)


def _first_differing(here: list[Any], there: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first items of two lists that differ, under their place: `[1]`; nothing where only NaNs do."""
    pairs = enumerate(zip_longest(here, there, fillvalue=...))
    for place, (one, other) in pairs:
        if _differ(one, other):
            return {f"[{place}]": one}, {f"[{place}]": other}
    return {}, {}


def _shown(value: object) -> str:
    text = "absent" if value is ... else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _without_incidentals(keys: dict[str, str], here: dict[str, Any], there: dict[str, Any]) -> dict[str, str]:
    left = {key: said for key, said in keys.items() if key.rsplit(".", 1)[-1] not in _INCIDENTAL}
    one, other = (config.get("architectures") for config in (here, there))
    if isinstance(one, list) and isinstance(other, list) and sorted(map(str, one)) == sorted(map(str, other)):
        left = {key: said for key, said in left.items() if key.partition("[")[0] != "architectures"}
    return left


def _with_defaults(subject: Subject, plan: MergePlan) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Both configs as transformers reads them; None where it makes no model of one."""
    if plan.model is None or not isinstance(subject.facts, ModelFacts):
        return None
    return dict(subject.facts.config), dict(plan.model.facts.config)
