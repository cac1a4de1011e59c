"""Checkpoints of a PipelineModule: a file for each layer, with names local to the layer, and masters for each stage.

Which part of the model a layer is stands in the training code only, so that a file layer_names.json must say it:
{"layer_00": "model.embed_tokens", "layer_01": "model.layers.0", "tied_modules.KEY": "lm_head"}.
Source: deepspeed/runtime/pipe/module.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from nbmerge.errors import CheckpointError, IncompleteCheckpointError, UnsupportedCheckpointError, listing, plural
from nbmerge.expressions import Stored
from nbmerge.layout import LazyTensor
from nbmerge.loaders.base import OpenOptions
from nbmerge.loaders.deepspeed import pickles
from nbmerge.loaders.deepspeed.directories import TagFiles
from nbmerge.loaders.deepspeed.masters import Masters, read_masters
from nbmerge.loaders.deepspeed.refusals import tensor_parallel
from nbmerge.loaders.deepspeed.states import ModelStates
from nbmerge.loaders.reading import read_files

NAMES_FILE = "layer_names.json"
_LAYER_PARAMETER = re.compile(r"(\d+)\.(.+)")  # a parameter in param_shapes
_TIED_PARAMETER = re.compile(r"(tied_modules\.[^.]+)\.(.+)")


class LayerNames:
    """The name of each layer in the model. Raises UnsupportedCheckpointError where no file gives them."""

    def __init__(self, files: TagFiles, needed: Mapping[str, str]) -> None:
        places = [folder / NAMES_FILE for folder in (files.path, files.path.parent)]
        self._path = next((path for path in places if path.is_file()), places[0])
        self._names = _names_in(self._path) if self._path.is_file() else {}
        absent = [key for key in needed if key not in self._names]
        if absent:
            example = json.dumps(dict.fromkeys(absent[:1], "model.layers.0"))[:-1]
            raise UnsupportedCheckpointError(
                f"{plural(len(absent), 'layer')} of a PipelineModule without a name in the model: "
                + listing((f"{key} (has {needed[key]})" for key in absent), shown=6),
                where=str(files.path),
                why="its files name tensors within a layer, and which part of the model a layer is stands in the "
                "training code only",
                fix=f"say it in {self._path}: {example}, …}}",
            )

    def in_model(self, key: str, local: str) -> str:
        """The name in the model of a layer's tensor."""
        return ".".join(filter(None, (self._names[key], local)))


def _names_in(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        content = str(error)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content.values()):
        raise CheckpointError(
            f"{path.name} is no JSON object of names",
            where=str(path),
            why=content if isinstance(content, str) else "",
            fix='write it as {"layer_00": "model.embed_tokens", "layer_01": "model.layers.0"}',
        )
    return content


def pipeline_states(
    files: TagFiles, stages: Mapping[int, ModelStates], options: OpenOptions, *, with_masters: bool
) -> tuple[ModelStates, Masters]:
    """The model states of all layers as one, and the masters of all stages, by their names in the model.

    stages: the model states of each stage, which hold no weights.
    """
    _refuse_missing(files, stages, with_masters=with_masters)
    layers = read_files(files.layers, options, partial(_layer, options=options))
    parts = [read_masters(files.optimizer[n], stages[n], options) for n in stages] if with_masters else []
    needed = {_key(number): listing(tensors) for (number, _), tensors in layers.items() if tensors}
    tied = {match[1]: match[2] for part in parts for name in part.tensors if (match := _TIED_PARAMETER.match(name))}
    names = LayerNames(files, needed | tied)
    module = {
        names.in_model(_key(number), local): stored
        for (number, _), tensors in layers.items()
        for local, stored in tensors.items()
    }
    masters: dict[str, LazyTensor] = {}
    for part in reversed(parts):  # a tied layer is on several stages, which keep it equal: the first one's counts
        for name, tensor in part.tensors.items():
            renamed = _in_model(name, names)
            masters[renamed] = replace(tensor, name=renamed)
    problems = [problem for part in parts for problem in part.problems]
    first = next(iter(stages.values()))
    remarks = tuple(remark for part in parts for remark in part.remarks)
    joined = Masters(masters, max((part.ranks for part in parts), default=1), first.stage, problems, remarks)
    return replace(first, path=files.path, module=module), joined


def universal_names(files: TagFiles, masters: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The masters of a universal checkpoint of a PipelineModule, which has no files of layers, by names in the model.

    Raises UnsupportedCheckpointError where no file names the layers.
    """
    needed: dict[str, list[str]] = {}
    for name in masters:
        if match := _TIED_PARAMETER.fullmatch(name):
            needed.setdefault(match[1], []).append(match[2])
        elif match := _LAYER_PARAMETER.fullmatch(name):
            needed.setdefault(_key(int(match[1])), []).append(match[2])
    names = LayerNames(files, {key: listing(local) for key, local in needed.items()})
    return {new: replace(tensor, name=new) for old, tensor in masters.items() for new in [_in_model(old, names)]}


def _in_model(name: str, names: LayerNames) -> str:
    if match := _TIED_PARAMETER.fullmatch(name):
        return names.in_model(match[1], match[2])
    match = _LAYER_PARAMETER.fullmatch(name)
    return names.in_model(_key(int(match[1])), match[2]) if match else name


def _key(number: int) -> str:
    return f"layer_{number:02d}"


def _layer(path: Path, options: OpenOptions) -> dict[str, Stored]:
    content = pickles.read(path, trust_pickle=options.trust_pickle)
    return {str(name): value for name, value in content.items() if isinstance(value, Stored)}


def _refuse_missing(files: TagFiles, stages: Mapping[int, ModelStates], *, with_masters: bool) -> None:
    """Raises for layers cut over tensor-parallel ranks, and for stages and layers that are not there."""
    first = next(iter(stages.values()))
    tensor_ranks = len({rank for _, rank in files.layers})
    if tensor_ranks > 1:
        raise tensor_parallel(files, tensor_ranks)
    numbers = [number for number, _ in files.layers]
    absent = [f"mp_rank_{n:02d}_model_states.pt" for n in range(first.model_parallel) if n not in stages]
    if with_masters:
        absent += [f"*zero_pp_rank_*_mp_rank_{n:02d}_optim_states.pt" for n in stages if n not in files.optimizer]
    parameters = _numbers(name for stage in stages.values() for group in stage.groups for name in group)
    absent += [f"{_key(number)}-model_states.pt" for number in sorted(parameters) if number not in numbers]
    if absent:
        raise IncompleteCheckpointError(
            f"{plural(len(absent), 'file')} of the pipeline's stages not there: {listing(absent)}",
            where=str(files.path),
            why="each node saves to its own disk, or saving was stopped",
            fix="copy the missing files from the machines that trained",
        )


def _numbers(names: Iterable[str]) -> set[int]:
    return {int(match[1]) for name in names if (match := _LAYER_PARAMETER.fullmatch(name))}
