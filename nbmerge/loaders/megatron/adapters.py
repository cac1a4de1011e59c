"""verl's files of adapters that were trained with Megatron-Bridge.

verl saves the adapter of each model-parallel rank as `adapter_checkpoint/mp_rank_TT[_PPP][_EEE]_adapter.pt`, a pickle
of {"adapter_state_dict": {name: tensor}} with the rank's own layer numbers, and leaves the model out.
Source: verl, verl/utils/megatron_peft_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nbmerge.errors import (
    OptionError,
    Problem,
    UnsupportedCheckpointError,
    listing,
    plural,
)
from nbmerge.loaders.base import OpenOptions, index_error
from nbmerge.loaders.megatron.assembly import Assembly
from nbmerge.loaders.megatron.contents import Contents
from nbmerge.loaders.megatron.copies import copies
from nbmerge.loaders.megatron.files import COPY_AGAIN, RankFiles
from nbmerge.loaders.megatron.grid import Grid
from nbmerge.loaders.megatron.names import gather
from nbmerge.loaders.megatron.pickles import ALLOWED
from nbmerge.loaders.megatron.settings import Settings
from nbmerge.loaders.reading import read_files
from nbmerge.loaders.unpickle import load_torch_file

ENTRY = "adapter_state_dict"
_LAYER = re.compile(r"(?:^|\.)decoder\.layers\.(\d+)\.")


def open_adapter_files(directory: Path, options: OpenOptions, config: Mapping[str, Any] | None) -> Contents:
    """The adapters of the whole model under Megatron's names, from verl's `mp_rank_*_adapter.pt`.

    config: the content of config.json, asked how many layers there are, and whether gate and up projection are one.
    Raises CheckpointError and its kin with all that is wrong, OptionError where config.json is needed and not there.
    """
    found = RankFiles.scan_adapters(directory.absolute())

    def read(path: Path) -> Any:
        return load_torch_file(path, allowed=ALLOWED, trust_pickle=options.trust_pickle)

    models = {numbers: _entries(state, found.weights[numbers]) for numbers, state in
              read_files(found.weights, options, read).items()}  # fmt: skip
    settings = Settings({}, config or {})
    layers = settings.config_size("num_hidden_layers", "num_layers", "n_layer")
    if layers is None and any(len(numbers) > 1 for numbers in models):
        raise OptionError(
            "several pipeline stages or expert ranks hold parts of the adapter, and no config.json says how many "
            "layers there are", where=str(directory), fix="pass its directory: --hf_model_config_path DIR",
        )  # fmt: skip
    grid = Grid.of(found, models, settings, ends_model=lambda chunks: len(_layers(chunks)) == layers)
    placed = dict(sorted((grid.places[numbers], chunks) for numbers, chunks in models.items()))
    gathered = gather(placed, grid.files)
    made = Assembly(grid, settings, gathered).run()
    problems = [*copies(placed, grid, {}), *made.problems, *_missing_stages(gathered.tensors, layers, grid)]
    if problems:
        raise index_error(problems, directory)
    return Contents(
        layout="Megatron-Bridge's adapters as verl saves them, a file for each model-parallel rank",
        tensors=made.tensors,
        files=found.sources,
        world_size=len(grid.files),
        mesh=grid.mesh,
        notes=(*grid.notes, *made.notes),
    )


def _entries(state: Any, path: Path) -> Sequence[Mapping[str, Any]]:
    """The state dict of the file, as of one virtual pipeline stage: verl saves no other."""
    held = state.get(ENTRY) if isinstance(state, Mapping) else None
    if not isinstance(held, Mapping) or not held:
        raise UnsupportedCheckpointError(
            f"the file holds no {ENTRY}", where=str(path),
            why=f"it holds {listing(map(str, state))}" if isinstance(state, Mapping) else "",
            fix=COPY_AGAIN,
        )  # fmt: skip
    return [held]


def _layers(chunks: Sequence[Mapping[str, Any]]) -> set[str]:
    """The numbers of the decoder's layers among the names."""
    return {match[1] for chunk in chunks for name in chunk if (match := _LAYER.search(str(name)))}


def _missing_stages(names: Mapping[str, object], layers: int | None, grid: Grid) -> list[Problem]:
    """A lost last stage shows only in the number of layers."""
    held = len(_layers([names]))
    if grid.pp == 1 or layers is None or held == layers:
        return []
    return [
        Problem(
            f"{plural(grid.pp, 'pipeline stage')} hold adapters of {held} layers, and config.json has {layers}",
            where=listing(path.name for path in grid.files.values()),
            why="the files of a stage are missing; or only some layers are adapted, whose numbers the files do not say",
            fix="copy the files of all ranks; or export the adapter in the training job",
            kind="missing",
        )
    ]
