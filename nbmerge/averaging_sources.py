"""What an average is of: every source as the plan of its merge, and all of one model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain
from typing import Any

from nbmerge.adapter_files import base_fix
from nbmerge.engine.comparison import first_difference
from nbmerge.engine.sources import LocalFiles
from nbmerge.errors import ConfigError, InconsistentCheckpointError, OptionError, PlanError, Problem, listing
from nbmerge.layout import Checkpoint
from nbmerge.loaders import votes
from nbmerge.loaders.hf import adapters, holds_whole_tensors
from nbmerge.naming.adapted import holds_adapter
from nbmerge.naming.lora.facts import ADAPTER_DIRECTORY
from nbmerge.opening import base_config_dir, make_plan_of, merge_options, open_checkpoint
from nbmerge.options import ADAPTER_OPTIONS, OPEN_ONLY, OPEN_OPTIONS, MergeOptions, expanded_path
from nbmerge.plan import MergePlan
from nbmerge.report import MergeReport
from nbmerge.weights import Source

_BLOCK_BYTES = 2 * 2**20
# What is done to each source before the mean, so that nothing of it is left to do to the result.
SOURCE_ONLY = frozenset({*OPEN_ONLY, *ADAPTER_OPTIONS, "base_model", "allow_drift"})
_OF_SOURCES = frozenset({*OPEN_OPTIONS, *SOURCE_ONLY, "is_value_model", "tie_word_embedding"})
_OF_DIRECTORIES = frozenset({"hf_model_config_path", "trust_pickle", "trust_remote_code", "workers"})
# What of config.json changes the model and no shape: means of two such models are a third one.
_MEANING = (
    "model_type", "num_attention_heads", "num_key_value_heads", "hidden_act", "rope_theta", "rope_scaling",
    "rope_parameters", "layer_types", "num_experts_per_tok", "text_config", "vision_config",
)  # fmt: skip


def plans_of(sources: Sequence[Source], options: Mapping[str, Any], progress: bool | None) -> list[MergePlan]:
    """The plan of every source. One without a config gets the first that another has.

    options: keywords of `nbmerge.merge`. Raises OptionError, ConfigError where none has a config, PlanError with what
    is wrong with any, and what opening raises.
    """
    asked = merge_options(options)
    given = asked.given()
    _refuse_two_models(given)
    of_sources = {name: value for name, value in given.items() if name in _OF_SOURCES}
    opened = [_opened(source, of_sources, progress) for source in sources]
    _refuse_averages(opened)
    found = (each.config_dir for each in opened if each.config_dir)
    adapters_alone = [each for each in opened if isinstance(each, Checkpoint) and each.is_adapter]
    config = asked.hf_model_config_path or next(found, None)
    config = config or (base_config_dir(asked.base_model) if adapters_alone else None)
    if config is None:
        raise ConfigError(
            "none of the checkpoints has a config.json", where=listing(_path(each) for each in opened),
            fix=base_fix(adapters_alone[0].path) if adapters_alone
            else "pass the directory of the model's config and tokenizer: --hf_model_config_path DIR",
        )  # fmt: skip
    for number, (source, each) in enumerate(zip(sources, opened, strict=True)):
        if each.config_dir is None and isinstance(source, (str, os.PathLike)):  # its loader may ask the model's shapes
            opened[number] = _opened(source, {**of_sources, "hf_model_config_path": str(config)}, progress)
    planning = {name: value for name, value in of_sources.items() if name not in OPEN_ONLY}
    plans = _planned(opened, planning, str(config), progress)
    _refuse_problems(plans)
    return plans


def _refuse_two_models(given: Mapping[str, object]) -> None:
    if given.get("lora") in ("split", "adapter"):
        raise OptionError(
            f"lora={given['lora']!r} leaves adapters apart, and the mean of two is none of their products",
            fix="average what they make of the model: lora='fold'",
        )


def _opened(source: Source, options: Mapping[str, Any], progress: bool | None) -> Checkpoint | MergePlan:
    if isinstance(source, MergeReport):
        source = source.target if source.target is not None else source.plan
    if isinstance(source, (str, os.PathLike)):
        path = expanded_path(os.fspath(source))
        opening = {name: value for name, value in options.items() if name in OPEN_OPTIONS}
        if holds_whole_tensors(path) and opening.get("backend") not in [loader.name for loader, _ in votes(path)]:
            opening = {"backend": "hf", **{name: opening[name] for name in _OF_DIRECTORIES if name in opening}}
        return open_checkpoint(path, progress=progress, **opening)
    if not isinstance(source, (Checkpoint, MergePlan)):
        raise OptionError(
            f"a {type(source).__name__} is no model", fix="pass a directory, an opened checkpoint, a plan or a report"
        )
    return source


def _refuse_averages(opened: Sequence[Checkpoint | MergePlan]) -> None:
    for each in opened:
        inside = (each.checkpoint if isinstance(each, MergePlan) else each).averaged
        if inside:
            raise OptionError(
                "an average of an average is rounded twice, and its receipt could not name what it is of",
                fix=f"pass all checkpoints at once, with weights for them: {listing(path for path, _ in inside)}",
            )


def _planned(
    opened: Sequence[Checkpoint | MergePlan], options: Mapping[str, Any], config: str, progress: bool | None
) -> list[MergePlan]:
    """What is asked of adapters is asked of the checkpoints that have one, if any has."""
    adapted = [isinstance(each, Checkpoint) and holds_adapter(each) for each in opened]
    plans = []
    for each, has_adapter in zip(opened, adapted, strict=True):
        if isinstance(each, MergePlan):
            plans.append(each)
            continue
        own = {n: v for n, v in options.items() if has_adapter or not any(adapted) or n not in ADAPTER_OPTIONS}
        if each.config_dir is None:
            own["hf_model_config_path"] = config
        plans.append(make_plan_of(each, MergeOptions(**own), progress))
    return plans


def _refuse_problems(plans: Sequence[MergePlan]) -> None:
    """Raises PlanError with the problems of all plans; of a single one its own error, which holds the plan."""
    beside = [problem for plan in plans for problem in _adapter_beside(plan)]
    failing = [plan for plan in plans if plan.problems]
    if len(failing) == 1 and not beside:
        failing[0].raise_if_problems()
    problems = [replace(each, where=each.where or _path(plan)) for plan in failing for each in plan.problems]
    if problems or beside:
        raise PlanError("the checkpoints cannot be averaged", problems=[*problems, *beside])


def _adapter_beside(plan: MergePlan) -> Iterator[Problem]:
    """An adapter that goes with the weights and is not in them: a mean would lose it."""
    path = plan.checkpoint.path
    beside = (path / ADAPTER_DIRECTORY / "adapter_config.json").is_file() or bool(adapters(path))
    if plan.checkpoint.is_adapter:  # folded into its base model, or refused
        return
    if plan.adapter_files or (plan.checkpoint.backend == "hf" and beside):
        yield Problem(
            "an adapter lies beside the weights, and the mean would leave it out", where=str(path),
            why="the model is the weights and the adapter together",
            fix="average the checkpoints that it was trained in, with lora='fold' (--lora fold); or move it away",
        )  # fmt: skip


def _path(source: Checkpoint | MergePlan) -> str:
    return str(source.path if isinstance(source, Checkpoint) else source.checkpoint.path)


def refuse_other_models(plans: Sequence[MergePlan]) -> None:
    """Raises InconsistentCheckpointError with every name, shape, integer and setting that is not as the first has it.

    Reads the integer tensors of all.
    """
    first, *others = plans
    problems = list(chain.from_iterable(_disagreements(first, other) for other in others))
    if problems:
        raise InconsistentCheckpointError("the checkpoints are not of one model", problems=problems)


def _disagreements(first: MergePlan, other: MergePlan) -> Iterator[Problem]:
    here, there = _path(other), _path(first)

    def told(what: str, why: str) -> Problem:
        return Problem(what, where=here, why=why, fix="average checkpoints of one run", kind="contradiction")

    ours, theirs = first.tensors, other.tensors
    for names, where in ((ours.keys() - theirs.keys(), there), (theirs.keys() - ours.keys(), here)):
        if names:
            yield told(f"{listing(sorted(names))} only in {where}", "an average needs every tensor of every checkpoint")
    for key, a, b in _settings(first.model.config if first.model else {}, other.model.config if other.model else {}):
        yield told(f"{key} is {a!r} in {there}, and {b!r} here", "one config cannot hold for both")
    for name in (name for name in ours if name in theirs):
        a, b = ours[name].expr, theirs[name].expr
        if a.shape != b.shape:
            yield told(f"{name} has {list(a.shape)} in {there}, and {list(b.shape)} here", "they are other models")
        elif a.dtype != b.dtype and not (a.dtype.is_floating and b.dtype.is_floating):
            yield told(f"{name} is {a.dtype} in {there}, and {b.dtype} here", "they cannot be averaged")
        elif not a.dtype.is_floating:
            with LocalFiles() as files:
                at = first_difference(a, b, _BLOCK_BYTES, files)
            if at is not None:
                yield told(f"{name} differs at {list(at)}", f"it is {a.dtype}, of which there is no average")


def _settings(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The settings in which two configs that have both differ."""
    for key in _MEANING:
        if key not in a or key not in b or a[key] == b[key]:
            continue
        if key.endswith("_config") and isinstance(a[key], dict) and isinstance(b[key], dict):
            yield from _settings(a[key], b[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", a[key], b[key]


def recorded_options(plans: Sequence[MergePlan], options: Mapping[str, Any]) -> dict[str, Any]:
    """What shaped the sources, as a receipt holds it: how all that say so were opened, and what was done to each."""
    ways = [dict(plan.checkpoint.opened_with) for plan in plans if plan.checkpoint.opened_with]
    common = ways[0] if ways and all(way == ways[0] for way in ways) else {}
    shaping = {item.name for item in fields(MergeOptions) if item.metadata["shapes"]} & (SOURCE_ONLY - OPEN_ONLY)
    return {**common, **{n: v for n, v in merge_options(options).given().items() if n in shaping}}


def names_paths(sources: Sequence[Source]) -> bool:
    """Whether any source is yet to be opened."""
    return any(isinstance(source, (str, os.PathLike)) for source in sources)
