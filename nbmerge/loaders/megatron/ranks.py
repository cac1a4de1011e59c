"""Megatron's rank files: a file for each tensor parallel rank, pipeline stage and expert parallel rank.

Megatron-LM's `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt` (--ckpt-format torch), and the `model.pt` of verl 0.3 and 0.4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nbmerge.errors import listing, plural
from nbmerge.layout import Stated
from nbmerge.loaders.base import OpenOptions, index_error
from nbmerge.loaders.megatron.assembly import Assembly
from nbmerge.loaders.megatron.contents import Contents
from nbmerge.loaders.megatron.copies import copies
from nbmerge.loaders.megatron.files import Numbers, RankFiles
from nbmerge.loaders.megatron.grid import At, Grid
from nbmerge.loaders.megatron.names import gather
from nbmerge.loaders.megatron.pickles import ALLOWED, saved_arguments
from nbmerge.loaders.megatron.settings import Settings
from nbmerge.loaders.megatron.states import check_virtual_stages, common_arguments, model_chunks
from nbmerge.loaders.reading import read_files
from nbmerge.loaders.unpickle import load_torch_file


def open_rank_files(directory: Path, options: OpenOptions, config: Mapping[str, Any] | None) -> Contents:
    """The whole model's tensors under Megatron's names, from the folders `mp_rank_*` of a directory.

    config: the content of config.json, asked where arguments and shapes do not decide. Layer and expert numbers are
    those of the whole model; a tensor that several files hold has their copies as replicas. `Chunk.rank` counts the
    files, by pipeline stage, in it by expert rank, then by tensor rank.
    Raises CheckpointError and its kin with all that is wrong, UnsafePickleError for a pickle that names what is not
    on the allow-list.
    """
    found = RankFiles.scan(directory.absolute())

    def read(path: Path) -> Any:
        return load_torch_file(path, allowed=ALLOWED, trust_pickle=options.trust_pickle)

    states = read_files(found.weights, options, read)
    models = {numbers: model_chunks(state, found.weights[numbers]) for numbers, state in states.items()}
    settings = Settings(common_arguments(states, found.weights), config or {})
    check_virtual_stages(models, found.weights, settings.argument("virtual_pipeline_model_parallel_size"))
    grid = Grid.of(found, models, settings)
    placed = {grid.places[numbers]: chunks for numbers, chunks in models.items()}
    placed = dict(sorted(placed.items()))
    made = Assembly(grid, settings, gathered := gather(placed, grid.files)).run()
    if problems := [*copies(placed, grid, _writers(states, grid)), *made.problems]:
        raise index_error(problems, directory)
    return Contents(
        layout=_layout(states, found),
        tensors=made.tensors,
        files=found.sources,
        world_size=len(grid.files),
        mesh=grid.mesh,
        notes=(*grid.notes, *made.notes, *_left_alone(states, found, list(gathered.objects))),
        stated=Stated(settings.arguments, str(next(iter(found.weights.values())))) if settings.arguments else Stated(),
    )


def _writers(states: Mapping[Numbers, Any], grid: Grid) -> dict[At, int]:
    """The global rank that wrote each file, by its arguments: Megatron-LM's own have it."""
    found = ((grid.places[numbers], saved_arguments(state).get("rank")) for numbers, state in states.items())
    return {at: rank for at, rank in found if type(rank) is int}


def _layout(states: Mapping[Numbers, Any], found: RankFiles) -> str:
    first = next(iter(found.weights))
    who = "verl's Megatron" if isinstance(states[first], list) else "Megatron-LM"
    chunks = len(model_chunks(states[first], found.weights[first]))
    return f"{who}, a file for each model-parallel rank" + (f", {chunks} virtual pipeline stages" * (chunks > 1))


def _left_alone(states: Mapping[Numbers, Any], found: RankFiles, objects: list[str]) -> Iterator[str]:
    roles = Counter(file.role for file in found.others)
    for role, count in roles.items():
        yield f"{plural(count, f'{role} file')} left alone"
    if any(isinstance(state, Mapping) and state.get("optimizer") for state in states.values()):
        yield "the optimizer state inside the files left alone"
    if objects:
        entries = "1 entry" if len(objects) == 1 else f"{len(objects):,} entries"
        yield f"{entries} without a tensor left alone: {listing(objects)}"
