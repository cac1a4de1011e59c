"""What of a model's directory belongs in its repository, and what stays here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nbmerge.engine.target import is_model_file
from nbmerge.errors import NotACheckpointError, OptionError
from nbmerge.export.elsewhere import for_elsewhere
from nbmerge.json_files import json_object
from nbmerge.receipt import RECEIPT_NAME, encoded

CARD = "README.md"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_NAMES_A_MODEL = {"config.json": "_name_or_path", "adapter_config.json": "base_model_name_or_path"}
_FOLDERS = {"lora_adapter", "chat_templates", "additional_chat_templates"}


@dataclass(frozen=True)
class Contents:
    """files: by path in the repository, with where they are; left_out: what the directory holds beside; a folder of
    which nothing belongs to a model is named once. stamps: size and time of each file when it was listed;
    rewritten: what goes up in place of a file; local_paths: where configs that go up as they are name a directory of
    this machine.
    """

    files: dict[str, Path]
    left_out: tuple[str, ...]
    stamps: dict[str, tuple[int, int]]
    rewritten: dict[str, bytes] = field(default_factory=dict)
    local_paths: tuple[str, ...] = ()

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, as the repository has it."""
        return {
            name: len(self.rewritten[name]) if name in self.rewritten else self.stamps[name][0] for name in self.files
        }

    def without(self, name: str) -> Contents:
        """The same, but for a file that stays here."""
        return replace(self, files={each: path for each, path in self.files.items() if each != name})

    def changed(self) -> list[str]:
        """The files that are not as they were when they were listed."""
        return [name for name, path in self.files.items() if _stamp(path) != self.stamps[name]]


def contents_of(directory: Path, receipt: dict[str, Any]) -> Contents:
    """The files of a model's directory. receipt: as it stands there, or empty; it
    goes up without this machine's paths.

    Raises NotACheckpointError for a directory without weights, OptionError for a link that leads out of it.
    """
    listed = [receipt.get(key) for key in ("files", "side_files")]
    entries = [entry for part in listed if isinstance(part, list) for entry in part]
    recorded = {str(entry.get("name")) if isinstance(entry, dict) else str(entry) for entry in entries}
    files: dict[str, Path] = {}
    left_out: list[str] = []
    for name in _names(directory, recorded):
        path = directory / name
        is_other = name not in recorded and not _is_taken(path, name, recorded)
        if is_other or (path.exists() and not path.is_file() and not path.is_symlink()):  # a pipe, say
            left_out.append(name)
            continue
        if path.is_dir() or not _stays(path.resolve(), directory.resolve()):
            raise OptionError(
                f"{name} is a link {'to a' if path.is_dir() else 'out of the'} directory", where=str(path),
                why="what it leads to may not be meant for the world", fix="copy it there, or remove the link",
            )  # fmt: skip
        files[name] = path
    if not any(name.endswith(".safetensors") for name in files):
        raise NotACheckpointError(
            "there are no weights to upload", where=str(directory), why="no .safetensors file of a model is in it",
            fix="pass the directory that a merge wrote; a training checkpoint is merged first",
        )  # fmt: skip
    rewritten: dict[str, bytes] = {}
    if RECEIPT_NAME in files and not receipt:  # one that cannot be read cannot be freed of its paths
        del files[RECEIPT_NAME]
        left_out.append(RECEIPT_NAME)
    elif RECEIPT_NAME in files and (cut := for_elsewhere(receipt)) != receipt:
        rewritten[RECEIPT_NAME] = encoded(cut)
    stamps = {name: _stamp(path) for name, path in files.items()}
    return Contents(files, tuple(left_out), stamps, rewritten, tuple(_local_paths(files)))


def _local_paths(files: dict[str, Path]) -> Iterator[str]:
    """`config.json: _name_or_path` for each config that says where on this machine a model lies."""
    for name, path in files.items():
        key = _NAMES_A_MODEL.get(name.rpartition("/")[2])
        said = json_object(path).get(key) if key else None
        if isinstance(said, str) and said.startswith(("/", "~", "..")):
            yield f"{name}: {key}"


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of change; (-1, -1) for a file that is gone."""
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _stays(real: Path, directory: Path) -> bool:
    """Whether a file is in the directory, or among the `blobs` to which the Hub's cache links every file."""
    return real.is_relative_to(directory) or real.parent == directory.parent.parent / "blobs"


def _is_taken(path: Path, name: str, recorded: set[str]) -> bool:
    """Whether a file that no receipt lists belongs to a model, by its name.

    Weights that a merge did not write do not, nor pickled ones: they hold another model, or the same one twice.
    """
    folder, _, last = name.rpartition("/")
    if not last:  # a folder
        return folder in _FOLDERS
    if last == RECEIPT_NAME:
        return not folder
    if last.startswith((".", "optimizer")) or last.endswith(_PICKLED) or (recorded and ".safetensors" in last):
        return False
    return (not folder or folder in _FOLDERS) and is_model_file(path)


def _names(directory: Path, recorded: set[str]) -> Iterator[str]:
    """The files of a directory, and `folder/` for links to one and for those in which nothing of a model can be."""
    kept = _FOLDERS | {name.partition("/")[0] for name in recorded if "/" in name}
    for root, folders, names in os.walk(directory):
        if Path(root) == directory:
            walked = [folder for folder in folders if folder in kept and not (directory / folder).is_symlink()]
            yield from sorted(f"{folder}/" for folder in set(folders) - set(walked))
            folders[:] = walked
        folders.sort()
        for name in sorted(names):
            yield (Path(root) / name).relative_to(directory).as_posix()
