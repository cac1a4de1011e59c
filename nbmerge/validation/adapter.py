"""An adapter in lora_adapter/: whether peft can load it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbmerge.engine.safetensors_file import read_header
from nbmerge.errors import NbmergeError
from nbmerge.naming.lora.facts import ADAPTER_DIRECTORY, ADAPTER_WEIGHTS
from nbmerge.validation.findings import Finding, Outcome
from nbmerge.validation.subject import Subject

_OF_A_MODEL = {"headers", "index", "tokenizer_files", "structure", "dtypes", "tied", "tokenizer", "running"}
_AGAIN = "merge again: --lora split or --lora adapter"


def not_of_an_adapter(subject: Subject, check: str) -> Outcome | None:
    """Why a check of a whole model is not run on an adapter alone; None where it is run."""
    if check in _OF_A_MODEL and subject.is_adapter_alone:
        return Outcome(said="the directory holds an adapter alone, and no model", ran=False)
    return None


def adapter_findings(subject: Subject) -> Iterator[Finding]:
    """What is wrong with the adapter's files; nothing where there is no adapter."""
    directory = subject.directory / ADAPTER_DIRECTORY
    if not directory.is_dir():
        return
    config = f"{ADAPTER_DIRECTORY}/adapter_config.json"
    content = _json(directory / "adapter_config.json")
    if not isinstance(content, dict):
        yield Finding("cannot be read", config, "it is missing, or no JSON object",
                      why="peft reads it before the weights", fix=_AGAIN)  # fmt: skip
    elif not content.get("lora_alpha") and content.get("peft_type") == "LORA":
        yield Finding("has no lora_alpha", config, f"lora_alpha is {content.get('lora_alpha')!r}",
                      why="the adapter changes nothing with it", fix=_AGAIN)  # fmt: skip
    try:
        read_header(directory / ADAPTER_WEIGHTS)
    except (NbmergeError, OSError) as error:
        said = error.problem.what if isinstance(error, NbmergeError) else error.strerror or str(error)
        yield Finding("cannot be read", f"{ADAPTER_DIRECTORY}/{ADAPTER_WEIGHTS}", said,
                      why="it is missing, or damaged", fix=_AGAIN)  # fmt: skip


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
