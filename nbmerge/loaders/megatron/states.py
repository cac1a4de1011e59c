"""What a rank file holds beside tensors: the state dicts of its virtual pipeline stages, and how the run was set up."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbmerge.errors import InconsistentCheckpointError, UnsupportedCheckpointError, listing
from nbmerge.expressions import Stored
from nbmerge.loaders.megatron.files import COPY_AGAIN, Numbers
from nbmerge.loaders.megatron.names import Chunks
from nbmerge.loaders.megatron.pickles import saved_arguments

_MODEL = re.compile(r"model(\d{1,4})")
_COMPARED = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size", "expert_tensor_parallel_size", "num_layers", "hidden_size", "iteration",
)  # fmt: skip


def model_chunks(state: Any, path: Path) -> Chunks:
    """The model in a file: Megatron-LM's `model`, or `model0`, `model1`, …, or verl's list of state dicts.

    Raises UnsupportedCheckpointError for anything else.
    """
    if isinstance(state, list):
        chunks = state
    elif not isinstance(state, Mapping):
        chunks = []
    elif "model" in state:
        chunks = [state["model"]]
    elif virtual := sorted(int(match[1]) for key in state if (match := _MODEL.fullmatch(str(key)))):
        chunks = [state.get(f"model{i}") for i in range(virtual[-1] + 1)] if virtual[-1] < len(state) else []
    else:
        chunks = [state] if any(isinstance(value, Stored) for value in state.values()) else []
    if not chunks or not all(isinstance(chunk, Mapping) for chunk in chunks):
        held = f"entries {listing(state)}" if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise UnsupportedCheckpointError(
            f"the file holds no model: {held}", where=str(path),
            why="looked for `model`, for `model0`, `model1`, … without a gap, and for a list of state dicts",
            fix="pass the directory of a checkpoint's model files",
        )  # fmt: skip
    for chunk in chunks:
        _refuse_old_names(chunk, path)
    return chunks


def _refuse_old_names(chunk: Mapping[Any, Any], path: Path) -> None:
    if isinstance(chunk.get("language_model"), Mapping):
        raise UnsupportedCheckpointError(
            "the model has the names of Megatron-LM before megatron-core",
            where=str(path),
            why="language_model.encoder and its kind (--use-legacy-models) have other layouts, which are not read here",
            fix="convert it with Megatron-LM's tools/checkpoint/convert.py --saver core",
        )


def common_arguments(states: Mapping[Numbers, Any], files: Mapping[Numbers, Path]) -> dict[str, Any]:
    """The arguments of the first file. Raises InconsistentCheckpointError where another's sizes or iteration differ."""
    first, *others = files
    want = _facts(states[first])
    for numbers in others:
        got = _facts(states[numbers])
        differing = [f"{name} {want[name]} and {got[name]}" for name in want if want[name] != got[name]]
        if differing:
            raise InconsistentCheckpointError(
                "the files are not of one save: " + listing(differing),
                where=f"{files[first]}; {files[numbers]}",
                why="files of two iterations or two runs were mixed",
                fix=COPY_AGAIN,
            )
    return saved_arguments(states[first])


def _facts(state: Any) -> dict[str, Any]:
    arguments = saved_arguments(state)
    facts = {name: arguments.get(name) for name in _COMPARED}
    if isinstance(state, Mapping):
        facts["the file's iteration"] = value if isinstance(value := state.get("iteration"), int) else None
    return facts


def check_virtual_stages(models: Mapping[Numbers, Chunks], files: Mapping[Numbers, Path], said: int | None) -> None:
    """All files have as many virtual pipeline stages, and as many as the arguments say."""
    by_count: dict[int, Numbers] = {}
    for numbers, chunks in models.items():
        by_count.setdefault(len(chunks), numbers)
    if len(by_count) > 1 or (said is not None and said not in by_count):
        words = [f"{count} in {files[numbers]}" for count, numbers in by_count.items()]
        raise InconsistentCheckpointError(
            "the numbers of virtual pipeline stages differ: " + listing(words)
            + (f", {said} by the arguments" if said else ""),
            why="every file holds one state dict for each virtual stage",
            fix=COPY_AGAIN,
        )  # fmt: skip
