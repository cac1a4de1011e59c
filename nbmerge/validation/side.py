"""What lies beside the weights: the config, the tokenizer's files, and where links and paths lead."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbmerge.errors import plural
from nbmerge.receipt import RECEIPT_NAME
from nbmerge.validation.adapter import adapter_findings
from nbmerge.validation.findings import WARNING, Check, Finding, Outcome
from nbmerge.validation.subject import INDEX_NAME, Subject
from nbmerge.validation.templates import syntax_error, templates

_FROM_BASE = "copy it from the model that was trained, or from the checkpoint's huggingface/"
_TOKENIZER_JSON = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "chat_template.json",
)  # fmt: skip
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "*.tiktoken",
    "*.bpe.model",
)
# Files that must be JSON objects; any other JSON file may hold what it likes.
_OBJECTS = {"config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"}
_OBJECTS |= {"video_preprocessor_config.json", *_TOKENIZER_JSON}


class ConfigCheck(Check):
    """config.json is there and names a class, and every JSON file beside the weights is JSON."""

    name = "config"
    title = "config.json is there and names a class, and the files beside it can be read"

    def run(self, subject: Subject) -> Outcome:
        """Reads the JSON files, but for the tokenizer's and the index, which have their own checks."""
        others = {*_TOKENIZER_JSON, INDEX_NAME, RECEIPT_NAME, "config.json"}
        files = sorted(path.name for path in subject.directory.glob("*.json") if path.name not in others)
        findings = [*_config(subject), *_unreadable(subject, files), *adapter_findings(subject)]
        config = subject.json("config.json")
        named = config.get("architectures") if isinstance(config, dict) else None
        said = f"{', '.join(map(str, named))}, " if isinstance(named, list) and named else ""
        return Outcome(tuple(findings), f"{said}{plural(len(files), 'further JSON file')}")


def _config(subject: Subject) -> Iterator[Finding]:
    if subject.is_adapter_alone:
        return
    if not (subject.directory / "config.json").is_file():
        adapter = (subject.directory / "adapter_config.json").is_file()
        yield Finding(
            "is missing", "config.json",
            why="the directory holds a LoRA adapter, which is no model by itself" if adapter else "",
            fix="fold the adapter into its base model, and validate that" if adapter else _FROM_BASE,
        )  # fmt: skip
        return
    yield from _unreadable(subject, ["config.json"])
    config = subject.json("config.json")
    if isinstance(config, dict) and not _names_a_class(config.get("architectures")):
        yield Finding(
            "names no class", "config.json", f"architectures is {config.get('architectures')!r}",
            why="vLLM, SGLang and other servers choose the model's code by it",
            fix='add it, for example "architectures": ["Qwen2ForCausalLM"]',
            severity=WARNING,
        )  # fmt: skip


def _names_a_class(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _unreadable(subject: Subject, files: list[str]) -> Iterator[Finding]:
    for name in files:
        if fault := _json_fault(subject.directory / name):
            yield Finding("cannot be read", name, fault, why="it is cut short, or was edited by hand", fix=_FROM_BASE)


def _json_fault(path: Path) -> str:
    """Why a file cannot be read as transformers reads it, in UTF-8 without a mark; empty where it can."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"it is no JSON: {error}"
    return "" if isinstance(content, dict) or path.name not in _OBJECTS else "it is no JSON object"


class TokenizerFilesCheck(Check):
    """The tokenizer's files are there, can be read, and their chat templates can be parsed."""

    name = "tokenizer_files"
    title = "the tokenizer's files are there and can be read, and chat templates can be parsed"

    def run(self, subject: Subject) -> Outcome:
        """Reads the tokenizer's JSON files and parses the chat templates."""
        files = [name for name in _TOKENIZER_JSON if (subject.directory / name).exists()]
        found = has_tokenizer(subject.directory)
        if not (found or files or vocabulary_size(subject)):
            return Outcome(said="the config has no vocabulary, so it needs no tokenizer", ran=False)
        findings = [*_unreadable(subject, files), *_templates(subject)]
        if not found:
            findings.insert(0, _no_tokenizer(subject))
        texts = templates(subject)
        said = (
            f"{plural(len(files), 'JSON file')}, {plural(len(texts), 'chat template') if texts else 'no chat template'}"
        )
        return Outcome(tuple(findings), said)


def has_tokenizer(directory: Path) -> bool:
    """Whether a vocabulary of some form is in the directory."""
    return any(next(directory.glob(pattern), None) for pattern in _VOCABULARIES)


def vocabulary_size(subject: Subject) -> int | None:
    """vocab_size of the config, or of its text part; None where there is none."""
    config = subject.json("config.json")
    parts = [config, config.get("text_config")] if isinstance(config, dict) else []
    sizes = [part.get("vocab_size") for part in parts if isinstance(part, dict)]
    return next((size for size in sizes if isinstance(size, int)), None)


def _no_tokenizer(subject: Subject) -> Finding:
    return Finding(
        "has no tokenizer", str(subject.directory), "neither tokenizer.json nor another vocabulary",
        why="the checkpoint was saved without it",
        fix="copy the tokenizer's files of the model that was trained; merging with --hf_model_config_path DIR does it",
        severity=WARNING,
    )  # fmt: skip


def _templates(subject: Subject) -> Iterator[Finding]:
    for name, text in templates(subject).items():
        if fault := syntax_error(text):
            yield Finding(
                "holds a chat template that cannot be parsed", name, fault,
                why="it was edited or cut short; apply_chat_template fails", fix=_FROM_BASE,
            )  # fmt: skip


class PathsCheck(Check):
    """Links and the index's paths stay inside the directory."""

    name = "paths"
    title = "no link and no path leads out of the directory"

    def run(self, subject: Subject) -> Outcome:
        """Resolves links; reads no file but the index."""
        paths = sorted(subject.directory.rglob("*"))
        links = [path for path in paths if path.is_symlink()]
        names = sorted(set(subject.index.values()))
        findings = [*_links(subject.directory, links), *_paths(names)]
        return Outcome(tuple(findings), f"{plural(len(links), 'link')}, {plural(len(names), 'path')} in the index")


def _links(directory: Path, links: list[Path]) -> Iterator[Finding]:
    for link in links:
        name = link.relative_to(directory).as_posix()
        if not link.exists():
            yield Finding(
                "is a link to nothing", name, why="the file that it led to was moved or deleted",
                fix="put the file in its place",
            )  # fmt: skip
        elif not _stays(link.resolve(), directory.resolve()):
            yield Finding(
                "is a link out of the directory", name,
                why="the directory is not whole by itself; copying or publishing it would take, or lose, what is there",
                fix="put the file in its place",
            )  # fmt: skip


def _stays(real: Path, directory: Path) -> bool:
    """Whether a file is in the directory, or among the `blobs` to which the Hub's cache links every file."""
    return directory in real.parents or real.parent == directory.parent.parent / "blobs"


def _paths(names: list[str]) -> Iterator[Finding]:
    for name in names:
        if not name or name in (".", "..") or "/" in name or "\\" in name:
            yield Finding(
                "is no name of a file in the directory", name, "the index names it",
                why="weights lie beside the index; a path could lead to any file of the machine that loads the model",
                fix="trust the index only if you know who wrote it; merge again",
            )  # fmt: skip
