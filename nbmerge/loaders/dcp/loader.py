"""Checkpoints that torch.distributed.checkpoint wrote of any state dict: by torch, Accelerate, the Trainer, torchtitan.

The index says of each tensor its shape and the boxes that it is stored in, so that FSDP, tensor parallelism and the
number of ranks need not be known. Which entries are the model's is in their names alone: see `roots`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbmerge.dtypes import BY_NAME
from nbmerge.errors import (
    CheckpointError,
    ConfigError,
    IncompleteCheckpointError,
    NotACheckpointError,
    OptionError,
    Problem,
    UnsupportedCheckpointError,
    listing,
    plural,
)
from nbmerge.geometry import Shape
from nbmerge.layout import Checkpoint, LazyTensor, SourceFile
from nbmerge.loaders.assemble import paste
from nbmerge.loaders.base import Loader, OpenOptions, index_error
from nbmerge.loaders.dcp.directories import DISTCP, Place, find
from nbmerge.loaders.dcp.metadata import METADATA, Index, TensorEntry, read_index
from nbmerge.loaders.dcp.roots import EXTRA, OPTIMIZER, Division, divide, has_torchtitan_names
from nbmerge.loaders.dcp.shards import read_shards, shape_of
from nbmerge.loaders.dcp.storage import locate, rank_of

# Keys under which training loops save a model's state dict.
_MODEL_KEYS = frozenset(
    {"app", "model", "model_state", "model_state_dict", "module", "network", "state_dict", "weights"}
)


@dataclass(frozen=True)
class _Contents:
    """What is read of a checkpoint: tensors by their names in the model."""

    layout: str
    tensors: dict[str, LazyTensor]
    files: tuple[SourceFile, ...]
    world_size: int
    notes: tuple[str, ...]


class DCPLoader(Loader):
    """Opens directories of torch.distributed.checkpoint."""

    name = "dcp"
    recognises = ".metadata and __R_T.distcp, or shard-R-model-N-of-M.safetensors"

    def evidence(self, directory: Path) -> tuple[str, ...]:
        place = find(directory)
        return place.evidence if place else ()

    def config_directory(self, directory: Path) -> Path | None:
        place = find(directory)
        return place.config_dir if place else None

    def open(self, directory: Path, options: OpenOptions) -> Checkpoint:
        place = find(directory.absolute())
        if place is None:
            raise NotACheckpointError("nothing that torch.distributed.checkpoint wrote is here", where=str(directory))
        _refuse_what_does_not_apply(place, options)
        config_dir = options.config_dir or place.config_dir
        expected = _expected(config_dir, options)
        contents = _indexed(place, options, expected) if place.kind == DISTCP else _sharded(place, options, expected)
        is_torchtitans = has_torchtitan_names(contents.tensors)
        return Checkpoint(
            path=directory,
            backend=self.name,
            layout=contents.layout + (" of torchtitan" if is_torchtitans else ""),
            tensors=contents.tensors,
            world_size=contents.world_size,
            files=contents.files,
            config_dir=config_dir,
            evidence=place.evidence,
            notes=contents.notes,
            names="torchtitan" if is_torchtitans else "transformers",
        )


def _refuse_what_does_not_apply(place: Place, options: OpenOptions) -> None:
    if options.overrides.as_record():
        raise OptionError(
            "mesh_dim_names, mesh_shape and placements are for FSDP checkpoints",
            why="a distributed checkpoint says itself where each piece lies", fix="leave them out",
        )  # fmt: skip
    if place.others:
        folders = [place.weights, *place.others]
        raise CheckpointError(
            f"{plural(len(folders), 'model')} are in the directory", where=str(place.root),
            why="the run trained several models, and each is saved into a folder of its own",
            fix=f"pass one of {listing(folders)}",
        )  # fmt: skip


def _expected(config_dir: Path | None, options: OpenOptions) -> Callable[[str], Shape | None] | None:
    """What the config's model has for a name. The model is made when it is first asked, which takes seconds."""
    if config_dir is None:
        return None

    def ask(name: str) -> Shape | None:
        try:
            if not model:
                model.append(options.shapes(config_dir))
            return model[0].expected_shape(name) if model[0] is not None else None
        except ConfigError:  # told when the merge is planned; the checkpoint can be looked at without
            model[:] = [None]
            return None

    model: list[Any] = []
    return ask


def _indexed(place: Place, options: OpenOptions, expected: Callable[[str], Shape | None] | None) -> _Contents:
    """The weights of an index and its `.distcp` files."""
    index = read_index(place.weights, trust_pickle=options.trust_pickle)
    division = divide(index.tensors, expected, str(place.weights))
    if not division.weights:
        raise _without_weights(place, index)
    entries = {name: index.tensors[name] for name in division.weights.values()}
    _refuse_odd_types(entries, place)
    located = locate(place.weights, entries, options)
    made = {
        name: paste(name, entries[stored_name].shape, located.pop(stored_name), ())
        for name, stored_name in division.weights.items()
    }
    return _Contents(
        layout="torch.distributed.checkpoint",
        tensors=_all_whole(made, place),
        files=tuple(_files(place, index, division)),
        world_size=max(map(rank_of, index.files), default=0) + 1,
        notes=tuple(_notes(division, list(index.objects))),
    )


def _all_whole(made: Mapping[str, LazyTensor | Problem], place: Place) -> dict[str, LazyTensor]:
    """The tensors. Raises what `index_error` gives for all that could not be put together."""
    problems = [each for each in made.values() if isinstance(each, Problem)]
    if problems:
        raise index_error(problems, place.weights)
    return {name: each for name, each in made.items() if isinstance(each, LazyTensor)}


def _refuse_odd_types(entries: Mapping[str, TensorEntry], place: Place) -> None:
    odd = [
        Problem(
            f"{name} is of type {entry.dtype}, which safetensors cannot hold",
            where=str(place.weights / METADATA),
            fix="cast it before saving",
            kind="unsupported",
        )
        for name, entry in entries.items()
        if entry.dtype.name not in BY_NAME
    ]
    if odd:
        raise index_error(odd, place.weights)


def _sharded(place: Place, options: OpenOptions, expected: Callable[[str], Shape | None] | None) -> _Contents:
    """The weights of safetensors files that hold a rank's pieces each."""
    shards = read_shards(place.weights, options)
    division = divide(shards.located, expected, str(place.weights))
    if not division.weights:
        raise _without_weights(place, Index({}, {}))
    made: dict[str, LazyTensor | Problem] = {}
    for name, stored_name in division.weights.items():
        found = shards.located[stored_name]
        shape = shape_of(name, found)
        made[name] = shape if isinstance(shape, Problem) else paste(name, shape, found, ())
    return _Contents(
        layout="torch.distributed.checkpoint in safetensors files",
        tensors=_all_whole(made, place),
        files=tuple(SourceFile.of(path, "weights") for path in shards.files),
        world_size=shards.world_size,
        notes=(*_notes(division, []), *shards.notes),
    )


def _without_weights(place: Place, index: Index) -> CheckpointError:
    near = [path for path in sorted(place.weights.parent.glob("pytorch_model_fsdp*")) if path != place.weights]
    names = [*index.tensors, *index.objects]
    if whole := [name for name in index.objects if name.rpartition(".")[2] in _MODEL_KEYS]:
        return UnsupportedCheckpointError(
            f"the checkpoint holds no tensors of a model, but pickled objects: {listing(whole)}",
            where=str(place.weights),
            why="a planner with flatten_state_dict=False pickles each value of a nested state dict as one object",
            fix="save with torch's default planner, or save the model's own state dict, not one inside another",
        )
    return IncompleteCheckpointError(
        "the checkpoint holds no weights" + (f", only {listing(names)}" if names else ""), where=str(place.weights),
        why="the run saved the model elsewhere, or not at all",
        fix=f"pass {listing(near)}" if near else "pass the directory of a step that was saved with the model",
    )  # fmt: skip


def _files(place: Place, index: Index, division: Division) -> Iterable[SourceFile]:
    """The index and every file beside it, by what it holds; then what Accelerate lays beside the folder."""
    yield SourceFile.of(place.weights / METADATA, "weights")
    weights = {chunk.file for name in division.weights.values() for chunk in index.tensors[name].chunks}
    optimizer = {chunk.file for name in division.beside.get(OPTIMIZER, ()) for chunk in index.tensors[name].chunks}
    for path in sorted(filter(Path.is_file, place.weights.glob("*.distcp"))):
        role = "weights" if path.name in weights else OPTIMIZER if path.name in optimizer else EXTRA
        yield SourceFile.of(path, role)
    if place.weights != place.root:
        for path in sorted(filter(Path.is_file, place.root.glob("optimizer_*/*"))):
            yield SourceFile.of(path, OPTIMIZER)
        for pattern in ("scheduler*", "random_states_*", "rng_state*", "sampler*"):
            for path in sorted(filter(Path.is_file, place.root.glob(pattern))):
                yield SourceFile.of(path, EXTRA)


def _notes(division: Division, objects: list[str]) -> Iterable[str]:
    if division.root:
        yield f"the model's names are those behind {division.root!r}"
    counted: Mapping[str, list[str]] = division.beside
    for role, names in counted.items():
        yield f"{plural(len(names), 'tensor')} of {role} left alone: {listing(names, shown=2)}"
    if division.outside:
        yield f"{plural(len(division.outside), 'tensor')} outside {division.root!r} left alone: " + listing(
            division.outside
        )
    if objects:
        yield f"{plural(len(objects), 'pickled object')} left alone: {listing(objects, shown=2)}"
