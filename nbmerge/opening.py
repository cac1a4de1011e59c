"""Opens a checkpoint, and plans its merge: the first two steps, from what a user typed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nbmerge.adapter_files import base_fix
from nbmerge.engine.events import Listener
from nbmerge.errors import ConfigError, OptionError
from nbmerge.layout import Checkpoint
from nbmerge.loaders import open_checkpoint_directory
from nbmerge.loaders.base import OpenOptions, Overrides
from nbmerge.loaders.reading import is_file
from nbmerge.naming.model import HFModel
from nbmerge.options import OPEN_ONLY, MergeOptions, expanded_path, parse_names, parse_shape
from nbmerge.overrides import read_placements
from nbmerge.plan import MergePlan

PathLike = str | os.PathLike[str]


def open_checkpoint(
    path: PathLike,
    backend: str = "auto",
    *,
    hf_model_config_path: PathLike | None = None,
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
    mesh_dim_names: str | tuple[str, ...] | None = None,
    mesh_shape: str | tuple[int, ...] | None = None,
    placements: PathLike | Mapping[str, Any] | None = None,
    weights: str | None = None,
    workers: int | None = None,
    progress: bool | None = None,
) -> Checkpoint:
    """The index of a checkpoint: its tensors, and the chunks that they are stored in. Reads no tensor data.

        ckpt = nbmerge.open_checkpoint("global_step_100/actor")
        ckpt["model.embed_tokens.weight"].shape        # (151936, 3584)

    backend: the loader, or `auto` to recognise it. hf_model_config_path: where config.json is, for a checkpoint
    without huggingface/. mesh_dim_names, mesh_shape, placements: override what the files say about the layout.
    weights: `master` or `model`, of a DeepSpeed checkpoint that holds both; the masters by default.
    progress: a progress bar; by default for work that takes more than a moment.

    Raises NotACheckpointError, CheckpointError, UnsafePickleError.
    """
    overrides = Overrides(
        mesh_dim_names=parse_names(mesh_dim_names) if mesh_dim_names else None,
        mesh_shape=parse_shape(mesh_shape) if mesh_shape else None,
        placements=read_placements(placements) if placements else {},
    )
    with listener_of(progress) as listen:
        options = OpenOptions(
            config_dir=_config_dir(hf_model_config_path),
            shapes=partial(_model_of, trust_remote_code=trust_remote_code),
            overrides=overrides,
            trust_pickle=trust_pickle,
            weights=weights,
            workers=workers or min(8, 2 * (os.cpu_count() or 1)),
            listener=listen,
        )
        found = open_checkpoint_directory(expanded_path(os.fspath(path)), backend, options)
    shaping = {"weights": weights, "mesh_dim_names": mesh_dim_names, "mesh_shape": mesh_shape, "placements": placements}
    opened = replace(found, opened_with={name: _recorded(value) for name, value in shaping.items() if value})
    _ = opened.kinds  # found now, so that the first display need not
    return opened


def _recorded(value: object) -> object:
    """An option as a receipt holds it and as it can be given again."""
    if isinstance(value, Mapping):
        return dict(value)
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def plan_merge(checkpoint: Checkpoint | PathLike, *, progress: bool | None = None, **options: Any) -> MergePlan:
    """What a merge of the checkpoint would write. Writes nothing; problems are in `.problems`.

        plan = nbmerge.plan_merge(ckpt, dtype="bfloat16")
        plan.total_bytes

    options: the keywords of `nbmerge.merge`. Raises what `open_checkpoint` raises, OptionError and ConfigError.
    """
    return make_plan_of(checkpoint, merge_options(options), progress)


def make_plan_of(checkpoint: Checkpoint | PathLike, options: MergeOptions, progress: bool | None) -> MergePlan:
    """The plan of a merge with these options."""
    from nbmerge.planning import make_plan

    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint, progress=progress, **options.opening())
    else:
        refuse_given(options, OPEN_ONLY, "an opened checkpoint", "open_checkpoint")
    config_dir = _config_dir(options.hf_model_config_path) or checkpoint.config_dir
    if config_dir is None and checkpoint.is_adapter:
        config_dir = base_config_dir(options.base_model)
        if config_dir is None:
            raise _without_base(checkpoint, options)
    if config_dir is None:
        raise ConfigError(
            "the checkpoint has no huggingface/config.json", where=str(checkpoint.path),
            why="the config decides the class, the names and the shapes of the result",
            fix="pass the directory of the model's config and tokenizer: --hf_model_config_path DIR",
        )  # fmt: skip
    model = HFModel(
        config_dir,
        trust_remote_code=options.trust_remote_code,
        is_value_model=options.is_value_model,
        tie_word_embedding=options.tie_word_embedding or (False if checkpoint.is_untied else None),
    )
    return make_plan(checkpoint, model, options)


def base_config_dir(base_model: PathLike | None) -> Path | None:
    """The directory of the base model, where it has a config: what an adapter without one is read with."""
    directory = _config_dir(base_model)
    return directory if directory is not None and is_file(directory / "config.json") else None


def _without_base(checkpoint: Checkpoint, options: MergeOptions) -> ConfigError:
    """Nothing says of which model the adapter is."""
    if options.base_model is None:
        return ConfigError(
            "the directory holds a LoRA adapter alone, and no base model was given", where=str(checkpoint.path),
            why="an adapter is a change to a model: names, shapes and config are the model's",
            fix=base_fix(checkpoint.path),
        )  # fmt: skip
    directory = expanded_path(options.base_model)
    return ConfigError(
        "the base model has no config.json" if directory.is_dir() else "there is no directory of the base model",
        where=str(directory),
        fix=f"{base_fix(checkpoint.path)}; or its config by itself: --hf_model_config_path DIR",
    )


PLAN_TIME = frozenset(MergeOptions.__dataclass_fields__)


def refuse_given(options: MergeOptions, names: Set[str], what: str, where: str) -> None:
    """Raises OptionError for options that come too late: what they would change is made already."""
    late = [name for name in options.given() if name in names]
    if late:
        raise OptionError(
            f"{', '.join(late)} cannot change {what}", fix=f"pass {'it' if len(late) == 1 else 'them'} to {where}"
        )


def merge_options(given: Mapping[str, Any]) -> MergeOptions:
    """The options dataclass, with paths and numbers as the text that the command line has."""
    as_text = {"hf_model_config_path", "max_shard_size", "base_model", "placements", "lora_config"}
    values: dict[str, Any] = {
        name: str(value) if name in as_text and value is not None and not isinstance(value, Mapping) else value
        for name, value in given.items()
    }
    unknown = values.keys() - MergeOptions.__dataclass_fields__.keys()
    if unknown:
        raise OptionError(f"no option is named {', '.join(sorted(unknown))}", fix="see help(nbmerge.merge)")
    return MergeOptions(**values)


def _config_dir(path: PathLike | None) -> Path | None:
    return expanded_path(os.fspath(path)) if path is not None else None


def _model_of(config_dir: Path | None, *, trust_remote_code: bool) -> HFModel | None:
    return HFModel(config_dir, trust_remote_code=trust_remote_code) if config_dir is not None else None


@contextmanager
def listener_of(progress: bool | None) -> Iterator[Listener]:
    """What hears the engine's events: a progress bar, or nothing."""
    from nbmerge.display.progress import listener

    with listener(progress) as listen:
        yield listen
