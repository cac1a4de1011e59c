"""Why an adapter cannot be written as the user asked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from nbmerge.adapter_files import adapter_weights
from nbmerge.errors import Problem, listing, plural
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.lora.facts import ADAPTER_DIRECTORY
from nbmerge.naming.lora.keys import DEFAULT, Adapted, adapter_names
from nbmerge.naming.lora.settings import Settings

_FOLD_IT = "fold the adapter in the training job (peft's merge_and_unload) and save again"


def of_no_lora(names: Collection[str], directory: Path) -> Problem:
    """An adapter's directory without any tensor of LoRA."""
    return Problem(
        f"the adapter holds no LoRA tensors: {listing(names)}", where=str(directory),
        why="it is of another method, whose update is not scale * B @ A, or a part of it is lost", fix=_FOLD_IT,
        kind="unsupported",
    )  # fmt: skip


def strangers(names: Sequence[str], facts: ModelFacts) -> list[Problem]:
    """Tensors in an adapter's directory that are no part of it, and no tensor of the model."""
    if not names:
        return []
    return [
        Problem(
            f"{plural(len(names), 'tensor')} in the adapter that {facts.class_name} does not have: {listing(names)}",
            why="config.json, or the base model, is of another model; or the file was made by other means than peft",
            fix="pass the model that training started from: --base_model DIR",
            kind="contradiction",
        )
    ]


def no_adapter(mode: str | None, directory: Path) -> Problem:
    """A mode was chosen, and there is no adapter among the checkpoint's tensors. directory: the checkpoint's."""
    if adapter_weights(beside := directory / ADAPTER_DIRECTORY) is not None:
        return Problem(
            f"lora={mode!r}, and the adapter lies beside the model in {ADAPTER_DIRECTORY}/", where=str(directory),
            why="the two were split, and are given as adapter and base model",
            fix=f"pass the adapter with its base model: {beside} --base_model {directory}",
        )  # fmt: skip
    return Problem(
        f"lora={mode!r}, and the checkpoint holds no LoRA tensors",
        why="it holds full weights, or the adapter was folded before it was saved",
        fix="leave lora out (--lora)",
    )


def unreadable(parts: Adapted, mode: str | None, directory: Path, *, is_alone: bool) -> list[Problem]:
    """Why no adapter can be taken from the checkpoint. is_alone: whether it is the directory of an adapter."""
    if found := _unread_names(parts):
        return found
    if not parts.adapters:
        return [of_no_lora(parts.model, directory) if is_alone else no_adapter(mode, directory)]
    if DEFAULT not in parts.adapters and len(parts.adapters) > 1:
        return [
            Problem(
                f"the checkpoint holds {len(parts.adapters)} adapters, none of them {DEFAULT!r}: "
                f"{listing(parts.adapters)}",
                why=f"of several, the one that peft names {DEFAULT!r} is taken",
                fix="save the one that is meant by itself",
                kind="ambiguous",
            )
        ]
    return []


def _unread_names(parts: Adapted) -> list[Problem]:
    problems = [
        Problem(
            f"{first} and {second} are the same part of the adapter or model",
            why="tensors of two runs, or of two ways to save, are in one checkpoint",
            fix="save the adapter again, in one way",
            kind="ambiguous",
        )
        for first, second in parts.doubles
    ]
    if parts.tokens:
        problems.append(
            Problem(
                f"the adapter trains single tokens, {plural(len(parts.tokens), 'tensor')}: {listing(parts.tokens)}",
                why="this version does not read peft's trainable_token_indices", fix=_FOLD_IT, kind="unsupported",
            )
        )  # fmt: skip
    if parts.unread:
        problems.append(
            Problem(
                f"{plural(len(parts.unread), 'adapter tensor')} of a kind that is not read: {listing(parts.unread)}",
                why="they are no part of peft's LoRA; AdaLoRA, for one, has a lora_E", fix=_FOLD_IT, kind="unsupported",
            )
        )  # fmt: skip
    return problems


def layers_lost(lost: Sequence[str], settings: Settings) -> list[Problem]:
    """Modules that target_modules selects, and of which the adapter has nothing."""
    if not lost:
        return []
    return [
        Problem(
            f"the adapter has nothing for {plural(len(lost), 'layer')} that target_modules selects: {listing(lost)}",
            where=settings.origins["target_modules"],
            why="a part of the adapter was not saved, or the file is of another run",
            fix="save the adapter whole, or pass the file of this run: --lora_config FILE",
            kind="missing",
        )
    ]


def left_over(names: Sequence[str]) -> list[Problem]:
    """Tensors beside an adapter alone that are of no module that was trained whole: they would be lost."""
    if not names:
        return []
    return [
        Problem(
            f"{plural(len(names), 'tensor')} beside the adapter would be in no file: {listing(names)}",
            why="nothing says that they were trained, and their modules are not complete",
            fix="pass the adapter_config.json of this run: --lora_config FILE; or fold: --lora fold --base_model DIR",
            kind="contradiction",
        )
    ]


def of_another_kind(settings: Settings) -> list[Problem]:
    """The files ask for a kind of LoRA that is more than `scale * B @ A`."""
    if not settings.variants:
        return []
    return [
        Problem(
            f"the adapter is of a kind that is not read: {listing(settings.variants)}",
            where=settings.origins[settings.variants[0]],
            why="its update is more than scale * B @ A, or its names are others",
            fix="fold or save it in the training job, with peft",
            kind="unsupported",
        )
    ]


def lacking(
    wanted: Sequence[str],
    held: Collection[str],
    base: Collection[str],
    directory: str | None,
    settings: Settings,
    base_fix: str,
) -> list[Problem]:
    """Weights that are adapted and not here. wanted: their names; held, base: what checkpoint and base model hold.

    directory: the base model's; None without one; base_fix: what to pass for one.
    """
    absent = [name for name in wanted if name not in held]
    if absent and settings.changed_base:
        return [
            Problem(
                f"init_lora_weights={settings.changed_base!r} changed the base weights, and the checkpoint does not "
                f"hold {listing(absent)}",
                where=settings.origins["init_lora_weights"],
                why="the published base model is not the one that the adapter fits",
                fix="save the whole state dict in the training job, or write the adapter alone: --lora adapter",
                kind="missing",
            )
        ]
    absent = [name for name in absent if name not in base]
    if not absent:
        return []
    if directory is not None and (names := adapter_names(base)):
        return [
            Problem(
                f"the base model's directory holds an adapter: {listing(names)}",
                where=directory,
                why="an adapter is a change to a model, and no model",
                fix=base_fix,
            )
        ]
    return [
        Problem(
            f"the weights of {plural(len(absent), 'adapted layer')} are not here: {listing(absent)}",
            where=directory or "",
            why="the checkpoint holds the adapter alone" if directory is None else "the base model is another one",
            fix=base_fix + ("; or write the adapter alone: --lora adapter" if directory is None else ""),
            kind="missing",
        )
    ]


def of_another_family(
    published: Collection[str], held: Collection[str], base: Collection[str], facts: ModelFacts, directory: str
) -> list[Problem]:
    """Tensors that a module has in the model and not in the base model, or the other way round.

    published: those that the model needs; held: those that the checkpoint holds.
    """

    def at_shared_modules(names: Collection[str], others: Collection[str]) -> list[str]:
        modules = {name.rpartition(".")[0] for name in others}
        return [name for name in names if name.rpartition(".")[0] in modules]

    lacks = at_shared_modules([name for name in published if name not in base and name not in held], base)
    known = {*facts.memory, *facts.published, *facts.tied_on_hub}
    beyond = at_shared_modules([name for name in base if name not in known and not facts.is_ignored(name)], published)
    return [
        Problem(
            f"the base model {says} {plural(len(absent), 'tensor')} {of}{facts.class_name}: {listing(absent)}",
            where=directory,
            why="it is of another family than the config of the run",
            fix="pass the model that training started from: --base_model DIR",
            kind="contradiction",
        )
        for absent, says, of in ((lacks, "lacks", "of "), (beyond, "has", "beyond those of "))
        if absent
    ]
