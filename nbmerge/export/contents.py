"""What of a model's directory belongs in its repository, and what stays here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbmerge.engine.target import is_model_file
from nbmerge.errors import NotACheckpointError, OptionError
from nbmerge.receipt import RECEIPT_NAME

CARD = "README.md"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_FOLDERS = {"lora_adapter", "chat_templates", "additional_chat_templates"}


@dataclass(frozen=True)
class Contents:
    """files: by path in the repository, with where they are; left_out: what the directory holds beside."""

    files: dict[str, Path]
    left_out: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())


def contents_of(directory: Path, receipt: dict[str, Any]) -> Contents:
    """The files of a model's directory. receipt: as it stands there, or empty.

    Raises NotACheckpointError for a directory without weights, OptionError for a link that leads out of it.
    """
    listed = [receipt.get(key) for key in ("files", "side_files")]
    entries = [entry for part in listed if isinstance(part, list) for entry in part]
    recorded = {str(entry.get("name")) if isinstance(entry, dict) else str(entry) for entry in entries}
    files: dict[str, Path] = {}
    left_out: list[str] = []
    for name in _names(directory):
        path = directory / name
        if name not in recorded and not _is_taken(path, name, recorded):
            left_out.append(name)
            continue
        if not _stays(path.resolve(), directory.resolve()):
            raise OptionError(
                f"{name} is a link out of the directory", where=str(path),
                why="what it leads to may not be meant for the world", fix="copy the file there, or remove the link",
            )  # fmt: skip
        files[name] = path
    if not any(name.endswith(".safetensors") for name in files):
        raise NotACheckpointError(
            "there are no weights to upload", where=str(directory), fix="pass the directory that a merge wrote"
        )
    return Contents(files, tuple(left_out))


def _stays(real: Path, directory: Path) -> bool:
    """Whether a file is in the directory, or among the `blobs` to which the Hub's cache links every file."""
    return real.is_relative_to(directory) or real.parent == directory.parent.parent / "blobs"


def _is_taken(path: Path, name: str, recorded: set[str]) -> bool:
    """Whether a file that no receipt lists belongs to a model, by its name.

    Weights that a merge did not write do not, nor pickled ones: they hold another model, or the same one twice.
    """
    folder, _, last = name.rpartition("/")
    if last == RECEIPT_NAME:
        return not folder
    if last.startswith(".") or last.endswith(_PICKLED) or (recorded and ".safetensors" in last):
        return False
    return (not folder or folder in _FOLDERS) and is_model_file(path)


def _names(directory: Path) -> Iterator[str]:
    for root, folders, names in os.walk(directory):
        folders.sort()
        for name in sorted(names):
            yield (Path(root) / name).relative_to(directory).as_posix()
