"""The tensors of whatever a user points at: a Hugging Face directory, a checkpoint, a plan, or a merge's report."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nbmerge.engine.safetensors_file import stored_tensors
from nbmerge.errors import OptionError
from nbmerge.expressions import Expr
from nbmerge.layout import Checkpoint
from nbmerge.naming.model import HFModel
from nbmerge.naming.prefixes import stripped_names
from nbmerge.opening import PathLike, open_checkpoint, plan_merge
from nbmerge.options import OPEN_ONLY, OPEN_OPTIONS, expanded_path
from nbmerge.plan import MergePlan
from nbmerge.report import MergeReport

Source = PathLike | Checkpoint | MergePlan | MergeReport


@dataclass(frozen=True)
class Weights:
    """A model's tensors, wherever they are. Holds no data.

    label: what the user pointed at; tensors: by published name, where a config tells it, else by the names that the
    files have; kind: `directory` (of safetensors files) or `checkpoint`; config_dir: where config.json is.
    """

    label: str
    tensors: Mapping[str, Expr]
    kind: str
    config_dir: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def model(self) -> HFModel | None:
        """The model of the config; None where there is no config."""
        return HFModel(self.config_dir) if self.config_dir is not None else None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(expr.nbytes for expr in self.tensors.values())


def weights_of(source: Source, *, progress: bool | None = None, **options: Any) -> Weights:
    """The tensors of a source. options: keywords of `nbmerge.merge` that open and plan a checkpoint.

    A checkpoint's tensors are those that a merge would write; without a config, those that it holds.
    Raises NotACheckpointError, CheckpointError, and PlanError for a checkpoint that cannot be merged.
    """
    if isinstance(source, MergeReport):
        return weights_of(source.target if source.target is not None else source.plan)
    if isinstance(source, (str, os.PathLike)):
        path = expanded_path(os.fspath(source))
        if is_model_directory(path):
            return _of_directory(path)
        opening = {name: value for name, value in options.items() if name in OPEN_OPTIONS}
        source = open_checkpoint(path, progress=progress, **opening)
        options = {name: value for name, value in options.items() if name not in OPEN_ONLY}
    if isinstance(source, Checkpoint):
        return _of_checkpoint(source, options, progress)
    if isinstance(source, MergePlan):
        return _of_plan(source)
    raise OptionError(
        f"a {type(source).__name__} is no model", fix="pass a directory, an opened checkpoint, a plan or a report"
    )


def is_model_directory(path: Path) -> bool:
    """Whether the directory holds whole tensors in safetensors files, as Hugging Face models do."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    return bool(files) and not any(is_shard_of_ranks(file) for file in files)


_SHARD = re.compile(r"shard-\d+-.*\.safetensors")
_SHARDED = "DCP_SHARDING_INFO"  # torch.distributed.checkpoint._hf_utils.CUSTOM_METADATA_KEY
_BEGINNING = 2**16  # bytes; safetensors writes the metadata first


def is_shard_of_ranks(file: Path) -> bool:
    """Whether a safetensors file holds one rank's pieces of tensors.

    torch.distributed.checkpoint's HuggingFaceStorageWriter writes `shard-00001-model-00001-of-00002.safetensors`, with
    the offsets of the pieces in the header. Where it saves whole tensors, their names are a model's and all offsets 0.
    A file that cannot be read is left to whoever reads it.
    """
    if _SHARD.fullmatch(file.name):
        return True
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _LONGEST_HEADER or _SHARDED.encode() not in (begin := stream.read(min(length, _BEGINNING))):
                return False
            metadata = json.loads(begin + stream.read(length - len(begin)))["__metadata__"]
            pieces = json.loads(metadata[_SHARDED]).values()
            return any(any(piece["saved_offsets"]) for piece in pieces)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return False


_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


def _of_directory(path: Path) -> Weights:
    config = path if (path / "config.json").is_file() else None
    return Weights(str(path), stored_tensors(path, "a directory of safetensors files"), "directory", config)


def _of_plan(plan: MergePlan) -> Weights:
    plan.raise_if_problems()
    tensors = {name: tensor.expr for name, tensor in plan.tensors.items()}
    return Weights(str(plan.checkpoint.path), tensors, "checkpoint", plan.config_dir, plan.options.given())


def _of_checkpoint(checkpoint: Checkpoint, options: Mapping[str, Any], progress: bool | None) -> Weights:
    if checkpoint.config_dir is not None or options.get("hf_model_config_path"):
        return _of_plan(plan_merge(checkpoint, progress=progress, **options))
    names, _ = stripped_names(checkpoint.tensors, set())
    tensors = {new: checkpoint.tensors[old].expr for new, old in names.items()}
    return Weights(str(checkpoint.path), tensors, "checkpoint")
