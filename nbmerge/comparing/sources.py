"""What a user points at, as two models that can be compared, or as the checkpoints of a run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nbmerge.adapter_files import base_fix
from nbmerge.errors import NotACheckpointError, OptionError
from nbmerge.layout import Checkpoint
from nbmerge.loaders.hf import lone_adapter
from nbmerge.naming.adapted import holds_adapter
from nbmerge.opening import PathLike, open_checkpoint
from nbmerge.options import ADAPTER_OPTIONS, OPEN_ONLY, OPEN_OPTIONS, expanded_path
from nbmerge.run_search import step_of
from nbmerge.weights import Source, Weights, is_model_directory, weights_of


def both_weights(a: Source, b: Source, *, progress: bool | None = None, **options: Any) -> tuple[Weights, Weights]:
    """The tensors of both sources. A checkpoint without a config is opened with the other's.

    options: keywords of `nbmerge.merge` that open and plan a checkpoint. Raises as `weights_of` does.
    """
    _refuse_model_and_adapter(a, b, options)
    of_a = _weights(a, progress, options)
    of_b = _weights(b, progress, options)
    return (
        _with_config(a, of_a, of_b.config_dir, progress, options),
        _with_config(b, of_b, of_a.config_dir, progress, options),
    )


def _weights(source: Source, progress: bool | None, options: dict[str, Any]) -> Weights:
    """The tensors of a source. What is asked of adapters is asked of a checkpoint that has one: the other may not."""
    if options.get("lora") is None:
        return weights_of(source, progress=progress, **options)
    path = expanded_path(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else None
    if path is not None and not is_model_directory(path, options):
        opening = {name: value for name, value in options.items() if name in OPEN_OPTIONS}
        source = open_checkpoint(path, progress=progress, **opening)
        options = {name: value for name, value in options.items() if name not in OPEN_ONLY}
    if isinstance(source, Checkpoint) and not holds_adapter(source):
        options = {name: value for name, value in options.items() if name not in ADAPTER_OPTIONS}
    return weights_of(source, progress=progress, **options)


def _refuse_model_and_adapter(a: Source, b: Source, options: dict[str, Any]) -> None:
    """Raises OptionError for a model and an adapter, where nothing says what is to be done with the adapter."""
    alone = [each for each in (a, b) if _is_adapter(each)]
    if options.get("lora") is None and len(alone) == 1:
        raise OptionError(
            "one of the two is a LoRA adapter alone, and the other a model", where=str(_path(alone[0])),
            fix=f"compare with what the adapter makes of its base model: --lora fold; {base_fix(_path(alone[0]))}",
        )  # fmt: skip


def _is_adapter(source: Source) -> bool:
    if isinstance(source, (str, os.PathLike)):
        return lone_adapter(_path(source)) is not None
    return isinstance(source, Checkpoint) and source.is_adapter


def _path(source: Source) -> Path:
    return source.path if isinstance(source, Checkpoint) else expanded_path(os.fspath(source))  # type: ignore[arg-type]


def _with_config(
    source: Source, found: Weights, config_dir: Path | None, progress: bool | None, options: dict[str, Any]
) -> Weights:
    if found.config_dir is not None or config_dir is None or found.kind != "checkpoint":
        return found
    if not isinstance(source, (str, os.PathLike, Checkpoint)):
        return found
    return weights_of(source, progress=progress, **{**options, "hf_model_config_path": str(config_dir)})


def run_weights(run: PathLike | Iterable[Source], *, progress: bool | None = None, **options: Any) -> Iterator[Weights]:
    """The models of a run, each when its turn comes: of a run's directory, or of a list in the order of the steps."""
    for source in run_checkpoints(run) if isinstance(run, (str, os.PathLike)) else run:
        yield _weights(source, progress, options)


def run_checkpoints(run: PathLike) -> list[Path]:
    """The checkpoints of a run's directory in the order of their steps: `global_step_N`, or `actor` in it.

    `checkpoint-N`, `iter_N` and `step_N` count too. Raises NotACheckpointError where there are fewer than two.
    """
    directory = expanded_path(os.fspath(run))
    found: list[tuple[int, Path]] = []
    for child in directory.iterdir() if directory.is_dir() else ():
        step = step_of(child)
        if step is not None and child.is_dir():
            actor = child / "actor"
            found.append((step, actor if actor.is_dir() else child))
    if len(found) < 2:
        raise NotACheckpointError(
            f"the run has {len(found)} checkpoints named global_step_N",
            where=str(directory),
            fix="pass the directory that holds them, or a list of checkpoints in order",
        )
    return [path for _, path in sorted(found)]
