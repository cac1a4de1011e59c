"""Finds the weights of a Megatron checkpoint, and the model's config, in the directories that frameworks make.

verl:         dist_ckpt/, huggingface/ (0.5 to 0.8); model/dist_ckpt/, model/huggingface/, ckpt_contents.json (0.9 on);
              model/mp_rank_*/model.pt (0.3, 0.4)
Megatron-LM:  latest_checkpointed_iteration.txt, iter_NNNNNNN/ with .metadata or mp_rank_*/model_optim_rng.pt
NeMo 2:       weights/, context/
alone:        a dist_ckpt directory, an iteration's directory
adapters:     verl's adapter_checkpoint/mp_rank_*_adapter.pt, where nothing else holds the model
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbmerge.errors import CheckpointError, IncompleteCheckpointError, listing
from nbmerge.json_files import json_object
from nbmerge.layout import Stated
from nbmerge.loaders.dcp.metadata import METADATA
from nbmerge.loaders.megatron.files import ADAPTER_FILE, ADAPTER_FILES, WEIGHTS

TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_\d{7,}|release")
_LONGEST_STEP = 64  # characters
_CONFIG_FOLDERS = ("huggingface", "hf_config_and_tokenizer")
# Parts of names that an index of Megatron's models has. Others have a `decoder.layers.` too: BART, Whisper.
_WORDS = (b".linear_qkv.", b".linear_proj.", b".linear_fc1.", b".linear_fc2.", b"decoder.final_layernorm.",
          b"decoder.final_norm.")  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's parts are.

    kind: `torch_dist`, `zarr`, `ranks`, `adapters`, or `huggingface` where the weights need no merge; weights: the
    directory that holds them; config_dir: where config.json is, if anywhere; root: the directory that was asked for.
    """

    kind: str
    weights: Path
    root: Path
    config_dir: Path | None
    evidence: tuple[str, ...]

    @property
    def transformer_config(self) -> Stated:
        """What verl saved of Megatron's TransformerConfig, empty where it is not there or unreadable."""
        for directory in _upwards(self.weights, self.root):
            path = directory / "transformer_config.json"
            if path.is_file():
                return Stated(json_object(path), str(path))
        return Stated()

    @property
    def huggingface(self) -> Path | None:
        """The first of verl's config folders that holds weights too."""
        return next((folder for folder in _config_folders(self.weights, self.root) if _has_weights(folder)), None)


def find(directory: Path) -> Place | None:
    """Where the parts of the checkpoint in `directory` are; None where it is none of Megatron's.

    Raises CheckpointError for a tracker file that names no iteration, IncompleteCheckpointError for one whose
    directory is not there.
    """
    if place := _already_converted(directory):
        return place
    for inside in ("", "model", "model/dist_ckpt", "dist_ckpt", "weights"):
        folder = directory / inside
        known = inside.endswith("dist_ckpt") or (inside == "weights" and (directory / "context").is_dir())
        if found := _kind(folder, known=known):
            kind, evidence = found
            evidence = f"{inside}/{evidence}" if inside else evidence
            return Place(kind, folder, directory, _config_of(folder, directory), (evidence,))
    return _tracked(directory) or adapters(directory)


def adapters(directory: Path) -> Place | None:
    """verl's files of adapters, in the directory or in its adapter_checkpoint/."""
    for inside in ("", "adapter_checkpoint"):
        folder = directory / inside
        if count := sum(ADAPTER_FILE.fullmatch(child.name) is not None for child in _children(folder)):
            evidence = f"{inside}/{count} × {ADAPTER_FILES}" if inside else f"{count} × {ADAPTER_FILES}"
            return Place("adapters", folder, directory, _config_of(folder, directory), (evidence,))
    return None


def _kind(folder: Path, *, known: bool) -> tuple[str, str] | None:
    """The kind of weights in a folder itself, with the evidence. known: its name says already whose it is."""
    ranks = [child.name for child in _children(folder) if _is_rank_folder(child)]
    if ranks:
        return "ranks", f"{len(ranks)} × mp_rank_*" if len(ranks) > 1 else ranks[0]
    said = json_object(folder / "metadata.json").get("sharded_backend")
    if said == "zarr":
        return "zarr", "metadata.json: zarr"
    if (folder / METADATA).is_file() and (said or known or _names_megatron(folder / METADATA)):
        return "torch_dist", f"{METADATA}, metadata.json: {said}" if said else METADATA
    if said or (known and any(child.suffix == ".distcp" for child in _children(folder))):
        return "torch_dist", "metadata.json" if said else "*.distcp"  # opening it says what is missing
    return None


def _tracked(directory: Path) -> Place | None:
    """Megatron-LM's root directory: the iteration that its tracker file names.

    verl writes a tracker of the same name beside its global_step_* directories: that is none of Megatron's.
    """
    tracker = directory / TRACKER
    if not tracker.is_file() or not any(_ITERATION.fullmatch(child.name) for child in _children(directory)):
        return None
    with tracker.open("rb") as stream:
        step = stream.read(_LONGEST_STEP + 1).decode("utf-8", "replace").strip()
    is_number = step.isdecimal() and len(step) <= _LONGEST_STEP
    name = f"iter_{int(step):07d}" if is_number else step
    if not is_number and step != "release":
        raise CheckpointError(
            f"{TRACKER} says {step[:40]!r}, which is no iteration", where=str(tracker),
            fix="write the number of the iteration into it, or pass the directory of one: iter_NNNNNNN",
        )  # fmt: skip
    folder = directory / name
    found = _kind(folder, known=True) if folder.is_dir() else None
    if found is None:
        others = [child.name for child in _children(directory) if _kind(child, known=True)]
        raise IncompleteCheckpointError(
            f"{TRACKER} names {name}, " + ("which holds no weights" if folder.is_dir() else "which is not there"),
            where=str(directory),
            why="saving was stopped, or only a part was copied",
            fix=f"pass one that is whole: {listing(others)}" if others else "copy it from the machine that trained",
        )
    kind, evidence = found
    return Place(kind, folder, directory, _config_of(folder, directory), (TRACKER, f"{name}/{evidence}"))


def _already_converted(directory: Path) -> Place | None:
    """verl's ckpt_contents.json, where it says that the weights were saved in Hugging Face form (by mbridge)."""
    model = json_object(directory / "ckpt_contents.json").get("contents", {})
    model = model.get("model") if isinstance(model, dict) else None
    if not isinstance(model, dict) or model.get("format") != "huggingface":
        return None
    folder = directory / str(model.get("path") or "model/huggingface")
    return Place("huggingface", folder, directory, folder, ("ckpt_contents.json: format huggingface",))


def _config_of(weights: Path, root: Path) -> Path | None:
    folders = (*_config_folders(weights, root), weights, root)
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def _config_folders(weights: Path, root: Path) -> Iterator[Path]:
    """Where verl puts config and tokenizer: beside the weights, or beside the directory that holds them."""
    for directory in (*_upwards(weights, root), weights.parent):
        for name in _CONFIG_FOLDERS:
            yield directory / name


def _upwards(path: Path, root: Path) -> Iterator[Path]:
    """The directory and those above it, up to the root, and one above for a dist_ckpt directory given alone."""
    yield path
    while path != root:
        path = path.parent
        yield path
    if root.name in ("dist_ckpt", "model"):
        yield root.parent
        yield root.parent.parent


def _has_weights(folder: Path) -> bool:
    return any(child.name.endswith((".safetensors", ".bin")) for child in _children(folder))


def _is_rank_folder(child: Path) -> bool:
    return child.name.startswith("mp_rank_") and any((child / name).is_file() for name in WEIGHTS)


def _names_megatron(path: Path) -> bool:
    data = path.read_bytes()
    return any(word in data for word in _WORDS)


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
