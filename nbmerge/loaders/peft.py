"""A directory of a LoRA adapter alone, as peft's `save_pretrained` writes it: no model, but a change to one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nbmerge.adapter_files import ADAPTER_CONFIG, adapter_weights
from nbmerge.errors import listing
from nbmerge.layout import Checkpoint, SourceFile
from nbmerge.loaders.base import OpenOptions
from nbmerge.loaders.whole import WeightFiles, whole_checkpoint

# As trainers save it beside an adapter.
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")


def adapter_files(directory: Path) -> WeightFiles | None:
    """The file of the adapter's weights; None where there is none."""
    name = adapter_weights(directory)
    return WeightFiles(directory, (name,)) if name is not None else None


def _notes(directory: Path) -> list[str]:
    held = [name for name in _TOKENIZER if (directory / name).is_file()]
    if not held or (directory / "config.json").is_file():
        return []
    return [f"left alone, as the base model's are written: {listing(held)}"]


def open_adapter(directory: Path, found: WeightFiles, options: OpenOptions, *, backend: str) -> Checkpoint:
    """The index of the adapter. Its config_dir is that of the options or of the directory itself, if any.

    Raises CheckpointError and its kin.
    """
    (name,) = found.files
    has_config = (found.directory / ADAPTER_CONFIG).is_file()
    checkpoint = whole_checkpoint(
        found, options, backend=backend, path=directory,
        config_dir=directory if (directory / "config.json").is_file() else None,
        layout=f"LoRA adapter of peft, {name}" + ("" if has_config else f" without {ADAPTER_CONFIG}"),
        evidence=(name, *([ADAPTER_CONFIG] if has_config else [])), others={}, notes=_notes(found.directory),
    )  # fmt: skip
    files = [SourceFile.of(found.directory / ADAPTER_CONFIG, "config")] if has_config else []
    return replace(checkpoint, files=(*checkpoint.files, *files), is_adapter=True)
