"""The directory that is validated, as it stands on disk: read once, for all checks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nbmerge.adapter_files import base_fix
from nbmerge.engine.safetensors_file import Entry, read_header
from nbmerge.errors import CorruptFileError, NbmergeError, NotACheckpointError
from nbmerge.expressions import Stored
from nbmerge.geometry import contiguous_strides
from nbmerge.loaders.hf import lone_adapter
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.lora.facts import ADAPTER_DIRECTORY, ADAPTER_WEIGHTS
from nbmerge.naming.model import HFModel
from nbmerge.receipt import RECEIPT_NAME

WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Subject:
    """A Hugging Face directory. Whatever cannot be read is None or an error here, and a finding of some check."""

    directory: Path
    trust_remote_code: bool = False

    @staticmethod
    def of(directory: Path, *, trust_remote_code: bool = False) -> Subject:
        """The directory. Raises NotACheckpointError where there is none, or nothing but an adapter's files in it."""
        if not directory.is_dir():
            raise NotACheckpointError(
                "there is no such directory" if not directory.exists() else "this is a file; a model is a directory",
                where=str(directory), fix="pass the directory that a merge wrote",
            )  # fmt: skip
        if not (directory / "config.json").exists() and lone_adapter(directory) is not None:
            is_of_a_merge = directory.name == ADAPTER_DIRECTORY
            raise NotACheckpointError(
                "the directory holds a LoRA adapter alone, and a validation proves a model", where=str(directory),
                fix=f"validate the directory that a merge wrote it to: {directory.parent}" if is_of_a_merge
                else f"merge it with lora='fold' and validate that; {base_fix(directory)}",
            )  # fmt: skip
        return Subject(directory, trust_remote_code)

    @cached_property
    def headers(self) -> dict[str, dict[str, Entry] | NbmergeError]:
        """For every safetensors file its tensors, or why its header cannot be read."""
        found: dict[str, dict[str, Entry] | NbmergeError] = {}
        for path in sorted(self.directory.glob("*.safetensors")):
            try:
                found[path.name] = read_header(path)
            except NbmergeError as error:
                found[path.name] = error
            except OSError as error:  # a broken link, a directory of that name, no permission
                found[path.name] = CorruptFileError(f"the file cannot be opened: {error.strerror}", where=str(path))
        return found

    @cached_property
    def index(self) -> dict[str, str]:
        """The index's `weight_map`, tensor → file; empty without an index, or where it is none."""
        content = self.json(INDEX_NAME)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        entries = weight_map.items() if isinstance(weight_map, dict) else ()
        return {name: file for name, file in entries if isinstance(file, str)}

    @cached_property
    def loaded(self) -> list[str]:
        """The safetensors files that transformers reads: model.safetensors, else the index's, else all that are here.

        The order in which `PreTrainedModel.from_pretrained` looks for them.
        """
        if WEIGHTS_NAME in self.headers:
            return [WEIGHTS_NAME]
        named = set(self.index.values())
        return [name for name in self.headers if name in named] or list(self.headers)

    @cached_property
    def unread(self) -> list[str]:
        """The files that should be loaded and cannot: their header cannot be read, or they are not there."""
        files = self.loaded if WEIGHTS_NAME in self.headers else dict.fromkeys([*self.loaded, *self.index.values()])
        return sorted(file for file in files if not isinstance(self.headers.get(file), Mapping))

    @cached_property
    def entries(self) -> dict[str, tuple[str, Entry]]:
        """Every tensor of the files that are loaded and whose header is whole: its file and its entry."""
        return {
            name: (file, entry)
            for file in self.loaded
            if isinstance(entries := self.headers[file], Mapping)
            for name, entry in entries.items()
        }

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """The same as expressions that read the files."""
        return {
            name: Stored(str(self.directory / file), e.offset, e.shape, contiguous_strides(e.shape), e.dtype)
            for name, (file, e) in self.entries.items()
        }

    @cached_property
    def adapter_tensors(self) -> dict[str, Stored]:
        """The tensors of an adapter beside the weights, as `lora_adapter/NAME`; empty where none can be read."""
        path = self.directory / ADAPTER_DIRECTORY / ADAPTER_WEIGHTS
        try:
            entries = read_header(path)
        except (NbmergeError, OSError):
            return {}
        return {
            f"{ADAPTER_DIRECTORY}/{name}": Stored(str(path), e.offset, e.shape, contiguous_strides(e.shape), e.dtype)
            for name, e in entries.items()
        }

    @cached_property
    def is_adapter_alone(self) -> bool:
        """Whether it is what a merge with lora='adapter' writes: no model, but an adapter in its directory."""
        adapter = (self.directory / ADAPTER_DIRECTORY / "adapter_config.json").is_file()
        return adapter and not (self.directory / "config.json").exists() and not self.headers

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for _, entry in self.entries.values())

    def json(self, name: str) -> Any:
        """The content of a JSON file beside the weights; None where it is missing or is no JSON."""
        try:
            return json.loads((self.directory / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None

    @cached_property
    def receipt(self) -> Mapping[str, Any] | None:
        """nbmerge_receipt.json, where a merge wrote the directory."""
        content = self.json(RECEIPT_NAME)
        return content if isinstance(content, dict) else None

    @property
    def receipt_source(self) -> str:
        """The checkpoint that the receipt names; empty without one."""
        source = self.receipt.get("source") if self.receipt else None
        path = source.get("path") if isinstance(source, dict) else None
        return path if isinstance(path, str) else ""

    @cached_property
    def model(self) -> HFModel:
        """The model that config.json describes."""
        return HFModel(self.directory, trust_remote_code=self.trust_remote_code)

    @cached_property
    def facts(self) -> ModelFacts | NbmergeError:
        """What the model's class says of its tensors, or why it cannot be asked."""
        try:
            return self.model.facts
        except NbmergeError as error:
            return error
