"""Whether a plan may be written to a target: what is there, whose it is, and whether there is room. Writes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from nbmerge.errors import SpaceError, TargetError, listing
from nbmerge.options import expanded_path
from nbmerge.plan import MergePlan
from nbmerge.receipt import RECEIPT_NAME

_HEADROOM = 2**20  # bytes for directory entries and the receipt
_LONGEST = 150  # characters of the target's name in its sibling's; file systems end at 255 bytes

# Files that model directories are known to hold. A directory of anything else is somebody's work.
_MODEL_FILE = re.compile(
    r"""(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|preprocessor_config
        |processor_config|video_preprocessor_config|image_processor_config|chat_template|adapter_config
        |[\w.-]+\.index)\.json
      | [\w.-]+\.(safetensors|bin|jinja|model|tiktoken)
      | (vocab|merges)\.txt | README\.md | LICENSE(\.txt|\.md)? | \.gitattributes
      | (configuration|modeling|modular|tokenization|processing|image_processing|video_processing)_\w+\.py""",
    re.VERBOSE,
)
_MODEL_FOLDERS = {"lora_adapter", "additional_chat_templates"}


@dataclass(frozen=True)
class Target:
    """A target that was checked, as it was given and as an absolute path, and the sibling that it will be made of.

    overwrite: whether what is there may be replaced.
    """

    given: Path
    path: Path
    work: Path
    lock: Path
    overwrite: bool


def check_target(plan: MergePlan, target: Path, *, overwrite: bool) -> Target:
    """Whether the plan may be written to `target`; nothing is written yet.

    Raises TargetError or SpaceError.
    """
    if "\x00" in str(target):
        raise TargetError("the target's name holds a zero byte", fix="choose another directory")
    given = target.expanduser()
    target = Path(os.path.abspath(given))  # noqa: PTH100 - resolve() would follow a link
    _refuse_the_source(plan, target)
    check_replaceable(target, overwrite=overwrite)
    parent = _existing_parent(target)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise TargetError(
            "the target cannot be written: permission denied", where=str(parent),
            fix="choose another directory, or change its permissions",
        )  # fmt: skip
    name = f".{target.name[:_LONGEST]}.nbmerge-{plan.digest[:12]}"
    work = target.parent / name
    _check_space(plan, parent, work)
    return Target(given, target, work, target.parent / f"{name}.lock", overwrite)


def _existing_parent(target: Path) -> Path:
    """The nearest directory above the target that is there. Raises TargetError where a file is in the way."""
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise TargetError("a file is in the way of the target", where=str(parent), fix="choose another directory")
    return parent


def _refuse_the_source(plan: MergePlan, target: Path) -> None:
    real, source, config = target.resolve(), plan.checkpoint.path.resolve(), plan.config_dir.resolve()
    elsewhere = f"choose another directory, for example {source.with_name(source.name + '-hf')}"
    if real == config and source in config.parents:
        raise TargetError(
            f"{target.name}/ is a part of the checkpoint: its config and tokenizer are read from it",
            where=str(target),
            why="the merged directory is a new one, so that the checkpoint stays as training left it",
            fix=elsewhere,
        )
    read = [("the checkpoint", source), ("the directory that config and tokenizer are read from", config)]
    for each in (Path(path).resolve() for path, _ in plan.checkpoint.averaged):
        read += [("a checkpoint of the average", each), ("the config of a checkpoint", each / "huggingface")]
    files = (*plan.base_files, *(plan.checkpoint.files if plan.checkpoint.averaged else ()))
    read += [("a directory that weights are read from", path) for path in {f.path.parent.resolve() for f in files}]
    if plan.options.base_model:
        read.append(("the base model", expanded_path(plan.options.base_model).resolve()))
    for what, path in read:
        if real == path or real in path.parents:
            raise TargetError(
                f"the target is {what} itself" if real == path else f"the target holds {what}",
                where=str(target),
                why="what a merge reads must not be replaced by it",
                fix=elsewhere,
            )
    if real == Path.home().resolve() or real == Path(real.anchor):
        raise TargetError("the target is your home directory, or the root", where=str(target),
                          fix="choose a new directory")  # fmt: skip


def check_replaceable(target: Path, *, overwrite: bool) -> None:
    """Whether what stands under the target's name may give way. Raises TargetError where it may not."""
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise TargetError(
            "the target exists and is a link" if target.is_symlink() else "the target exists and is a file",
            where=str(target), fix="choose another directory",
        )  # fmt: skip
    if os.path.ismount(target):
        raise TargetError(
            "the target is a mount point, which no finished directory can be renamed to", where=str(target),
            fix=f"choose a directory in it, for example {target / 'merged'}",
        )  # fmt: skip
    content = sorted(child.name for child in target.iterdir())
    if not content:
        return
    if not overwrite:
        raise TargetError(
            f"the target exists and holds {listing(content)}", where=str(target),
            why="nothing is overwritten without being asked",
            fix="choose another directory, or pass overwrite=True (--overwrite)",
        )  # fmt: skip
    _refuse_foreign_files(target, content)


def _refuse_foreign_files(target: Path, content: list[str]) -> None:
    ours = _files_of_receipt(target / RECEIPT_NAME)
    foreign = [name for name in content if name not in ours and not is_model_file(target / name)]
    is_model = bool(ours) or "config.json" in content or any(n.endswith((".safetensors", ".bin")) for n in content)
    if foreign or not is_model:
        raise TargetError(
            f"the target holds what is no part of a model: {listing(foreign or content)}", where=str(target),
            why="only a directory that a merge wrote, or with nothing but model files, is replaced",
            fix="choose another directory, or move these files away",
        )  # fmt: skip


def _files_of_receipt(path: Path) -> Collection[str]:
    """The names that a merge wrote, by its receipt; none where there is no receipt, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {RECEIPT_NAME, *content["side_files"], *(file["name"] for file in content["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def is_model_file(path: Path) -> bool:
    """Whether model directories are known to hold a file, or a folder, of that name."""
    if path.is_dir():
        return path.name in _MODEL_FOLDERS
    return _MODEL_FILE.fullmatch(path.name) is not None


def _check_space(plan: MergePlan, parent: Path, work: Path) -> None:
    need = plan.total_bytes + _HEADROOM - sum(_size(work / file.name) for file in plan.weight_files)
    free = shutil.disk_usage(parent).free
    if free < need:
        raise SpaceError(
            f"the result needs {need:,} bytes more, and the disk has {free:,} free", where=str(parent),
            fix="free some space, or choose a target on another disk",
        )  # fmt: skip


def _size(path: Path) -> int:
    """Bytes of a file that an earlier run finished; 0 where there is none, or another process just published it."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
