"""Checkpoints of Megatron-LM and megatron-core, and of the frameworks that train with them (verl, NeMo).

Each on-disk form has a reader: `dist` (torch_dist, Megatron-FSDP), `zarr`, `ranks` (mp_rank_*), `adapters`. All give
tensors under Megatron's own names with layer and expert numbers of the whole model; `naming/megatron` takes it from
there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nbmerge.errors import CheckpointError, IncompleteCheckpointError, OptionError, UnsupportedCheckpointError
from nbmerge.json_files import json_object
from nbmerge.layout import Checkpoint
from nbmerge.loaders.base import Loader, OpenOptions
from nbmerge.loaders.megatron.adapters import open_adapter_files
from nbmerge.loaders.megatron.contents import Contents
from nbmerge.loaders.megatron.directories import Place, adapters, find
from nbmerge.loaders.megatron.dist import open_torch_dist
from nbmerge.loaders.megatron.ranks import open_rank_files
from nbmerge.loaders.megatron.recorded import beside_weights
from nbmerge.loaders.megatron.zarr import open_zarr


class MegatronLoader(Loader):
    """Opens checkpoints of Megatron, in every form that it has written them in."""

    name = "megatron"
    recognises = "dist_ckpt/, iter_NNNNNNN/ or mp_rank_*/"

    def evidence(self, directory: Path) -> tuple[str, ...]:
        try:
            place = find(directory)
        except CheckpointError:  # a tracker file is evidence, whatever is wrong with it
            return ("latest_checkpointed_iteration.txt",)
        return place.evidence if place else ()

    def config_directory(self, directory: Path) -> Path | None:
        place = find(directory)
        return place.config_dir if place else None

    def open(self, directory: Path, options: OpenOptions) -> Checkpoint:
        place = find(directory.absolute())
        if place is None:
            raise IncompleteCheckpointError("nothing of Megatron's is in the directory", where=str(directory))
        if options.overrides.as_record():
            raise OptionError(
                "mesh_dim_names, mesh_shape and placements are for FSDP checkpoints",
                why="a Megatron checkpoint says itself how it is cut", fix="leave them out",
            )  # fmt: skip
        if place.kind == "huggingface":
            raise _already_converted(place, "ckpt_contents.json says so")
        config_dir = options.config_dir or place.config_dir
        contents = _read(place, options, config_dir)
        if not contents.tensors and (beside := adapters(directory.absolute())):  # verl leaves the model out then
            place, contents = beside, _read(beside, options, config_dir)
        if not contents.tensors:
            raise _without_weights(place)
        return Checkpoint(
            path=directory,
            backend=self.name,
            layout=contents.layout,
            tensors=contents.tensors,
            world_size=contents.world_size,
            files=contents.files,
            config_dir=config_dir,
            mesh=contents.mesh,
            evidence=place.evidence,
            notes=contents.notes,
            names="megatron",
            stated=contents.stated,
            strict_copies=True,
        )


def _read(place: Place, options: OpenOptions, config_dir: Path | None) -> Contents:
    if place.kind == "adapters":
        return open_adapter_files(place.weights, options, json_object(config_dir / "config.json") if config_dir else {})
    if place.kind == "ranks":
        config = json_object(config_dir / "config.json") if config_dir else None
        contents = open_rank_files(place.weights, options, config)
        return contents if contents.stated.values else replace(contents, stated=place.transformer_config)
    recorded = beside_weights(place, options)
    if place.kind == "zarr":
        return open_zarr(place.weights, recorded)
    return open_torch_dist(place.weights, options, recorded)


def _without_weights(place: Place) -> CheckpointError:
    if place.huggingface is not None:
        return _already_converted(place, f"{place.weights.name} holds only optimizer and random number generators")
    return IncompleteCheckpointError(
        "the checkpoint holds no weights, only optimizer state and the like", where=str(place.weights),
        why="the run saved without the model (verl: save_contents without 'model')",
        fix="pass a step that was saved with the model",
    )  # fmt: skip


def _already_converted(place: Place, why: str) -> CheckpointError:
    folder = place.weights if place.kind == "huggingface" else place.huggingface
    return UnsupportedCheckpointError(
        "there is nothing to merge: the weights are in Hugging Face form already",
        where=str(folder),
        why=f"{why}; training saved them through mbridge",
        fix=f"use {folder} as it is",
    )
