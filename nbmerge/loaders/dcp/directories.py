"""Finds the weights of a torch.distributed.checkpoint directory, and the model's config, where frameworks put them.

torch:            .metadata and __R_T.distcp files, or HuggingFaceStorageWriter's shard-RRRRR-model-….safetensors
Accelerate:       pytorch_model_fsdp_0/, with optimizer_0/ beside it (the Trainer's checkpoint-N/ likewise)
torchtitan:       step-N/
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nbmerge.errors import CheckpointError
from nbmerge.loaders.dcp.metadata import METADATA
from nbmerge.loaders.megatron.directories import find as find_megatron
from nbmerge.loaders.rank_shards import is_shard_of_ranks

DISTCP, SAFETENSORS = "distcp", "safetensors"

_MODEL_FOLDER = re.compile(r"pytorch_model_fsdp(?:_\d+)?")
_TORCHS = b"torch.distributed.checkpoint"  # in every index that torch wrote
# Folders inside a checkpoint: where one is passed, config and tokenizer may be beside it.
_INSIDE = re.compile(rf"{_MODEL_FOLDER.pattern}|sharded|model|weights|step-\d+|checkpoint")


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's parts are.

    kind: `distcp` or `safetensors`; weights: the directory that holds them; others: folders beside it that hold a
    model as well; root: the directory that was asked for; config_dir: where config.json is, if anywhere.
    """

    kind: str
    weights: Path
    root: Path
    others: tuple[Path, ...]
    config_dir: Path | None
    evidence: tuple[str, ...]


def find(directory: Path) -> Place | None:
    """Where the parts of the checkpoint in `directory` are; None where it is none of torch's own."""
    if not directory.is_dir() or _is_megatrons(directory):
        return None
    children = sorted(directory.iterdir())
    if found := _kind(children):
        kind, evidence = found
        return Place(kind, directory, directory, (), _config_of(directory, directory), (evidence,))
    if any(child.suffix == ".safetensors" for child in children):
        return None  # whole tensors; `sharded/` beside them is what they were put together from
    inside = [
        (child, *found)
        for child in children
        if child.is_dir() and (_MODEL_FOLDER.fullmatch(child.name) or child.name in ("model", "sharded"))
        if (found := _kind(sorted(child.iterdir())))
    ]
    if not inside:
        return None
    (folder, kind, evidence), *others = inside
    beside = tuple(path for path, _, _ in others)
    return Place(kind, folder, directory, beside, _config_of(folder, directory), (f"{folder.name}/{evidence}",))


def _is_megatrons(directory: Path) -> bool:
    try:
        return find_megatron(directory) is not None
    except CheckpointError:
        return True


def _kind(children: list[Path]) -> tuple[str, str] | None:
    """The kind of weights among the files of a folder, with the evidence."""
    count = sum(child.suffix == ".distcp" for child in children)
    index = next((child for child in children if child.name == METADATA and child.is_file()), None)
    if count or (index is not None and _TORCHS in index.read_bytes()):
        files = f"{count:,} × *.distcp" if count else ""
        return DISTCP, ", ".join(filter(None, (METADATA if index else "", files)))
    shards = [child for child in children if child.suffix == ".safetensors" and is_shard_of_ranks(child)]
    return (SAFETENSORS, f"{len(shards):,} × shard-*.safetensors") if shards else None


def _config_of(weights: Path, root: Path) -> Path | None:
    """The nearest directory with config.json: with the weights, in `huggingface/`, or above a known folder."""
    folders = [weights] if weights == root else [weights, root]
    if _INSIDE.fullmatch(root.name):
        folders.append(root.absolute().parent)
    candidates = (path for folder in folders for path in (folder / "huggingface", folder))
    return next((path for path in candidates if (path / "config.json").is_file()), None)
