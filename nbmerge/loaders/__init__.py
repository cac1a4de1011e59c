"""The loaders, a file for each on-disk layout, and the vote that chooses one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nbmerge.errors import AmbiguousCheckpointError, CheckpointError, NotACheckpointError, OptionError, listing
from nbmerge.layout import Checkpoint
from nbmerge.loaders.base import Loader, OpenOptions, existing_directory
from nbmerge.loaders.colossalai import ColossalAILoader
from nbmerge.loaders.dcp.loader import DCPLoader
from nbmerge.loaders.deepspeed import DeepSpeedLoader
from nbmerge.loaders.fsdp import FSDPLoader
from nbmerge.loaders.hf import HFLoader, adapters
from nbmerge.loaders.megatron import MegatronLoader
from nbmerge.options import BACKENDS

LOADERS: list[Loader] = [
    FSDPLoader(),
    MegatronLoader(),
    DCPLoader(),
    DeepSpeedLoader(),
    ColossalAILoader(),
    HFLoader(),
]

_SEARCH_DEPTH = 4
_SEARCH_DIRECTORIES = 2000  # a home directory given by mistake must not take minutes


def register_loader(loader: Loader) -> None:
    """Adds a loader of one's own: from now on it votes on every directory, and `backend=` takes its name.

        nbmerge.register_loader(MyLoader())

    One that is registered again under its name, as when a notebook's cell is run twice, takes the place of the first.
    Raises OptionError for the name of one of this package's own.
    """
    builtin = [each for each in LOADERS if type(each).__module__.startswith("nbmerge.loaders.")]
    if loader.name == "auto" or loader.name in [each.name for each in builtin]:
        raise OptionError(f"{loader.name!r} is the name of a back end of nbmerge", fix="give the loader another name")
    LOADERS[:] = [*(each for each in LOADERS if each.name != loader.name), loader]
    if loader.name not in BACKENDS:
        BACKENDS.append(loader.name)


def open_checkpoint_directory(path: Path, backend: str, options: OpenOptions) -> Checkpoint:
    """The index of the checkpoint in `path`, by the loader that `backend` names or that recognises it.

    Raises NotACheckpointError, AmbiguousCheckpointError, OptionError, and what the loader raises.
    """
    try:
        directory = existing_directory(path)
        return choose_loader(directory, backend).open(directory, options)
    except PermissionError as error:
        raise CheckpointError(
            "the checkpoint cannot be read: permission denied", where=str(error.filename),
            fix="change its permissions, or read it as the user who owns it",
        ) from error  # fmt: skip


def choose_loader(directory: Path, backend: str, loaders: Sequence[Loader] = LOADERS) -> Loader:
    """The one loader with evidence for the directory. A tie, and no vote at all, are errors that list it."""
    if backend != "auto":
        by_name = {loader.name: loader for loader in loaders}
        if backend not in by_name:
            raise OptionError(
                f"no back end is named {backend!r} in this version",
                why=f"it has {', '.join(by_name)}",
                fix="leave it out: the layout is recognised",
            )
        if not by_name[backend].evidence(directory):
            raise _nothing_recognised(directory, [by_name[backend]])
        return by_name[backend].at(directory)
    voted = votes(directory, loaders)
    if not voted:
        raise _nothing_recognised(directory, loaders)
    if len(voted) > 1:
        voted = [each for each in voted if not each[0].gives_way(directory)] or voted
    if len(voted) > 1:
        raise AmbiguousCheckpointError(
            f"{len(voted)} layouts are in one directory",
            where=str(directory),
            why="; ".join(f"{loader.name}: {', '.join(found)}" for loader, found in voted),
            fix=f"say which: --backend {' or '.join(loader.name for loader, _ in voted)}",
        )
    return voted[0][0].at(directory)


def votes(directory: Path, loaders: Sequence[Loader] = LOADERS) -> list[tuple[Loader, tuple[str, ...]]]:
    """The loaders that recognise the directory itself, each with its evidence."""
    found = ((loader, loader.evidence(directory)) for loader in loaders)
    return [(loader, evidence) for loader, evidence in found if evidence]


def _nothing_recognised(directory: Path, loaders: Sequence[Loader]) -> NotACheckpointError:
    near = [path for path in directories_below(directory) if is_recognised(path, loaders)]
    if not near and (files := adapters(directory)):
        return NotACheckpointError(
            f"the directory holds an adapter ({listing(files)}) and no model", where=str(directory),
            why="an adapter is read under the names that peft gives its file: adapter_model.safetensors or .bin",
            fix="rename the file, with adapter_config.json beside it",
        )  # fmt: skip
    return NotACheckpointError(
        "this directory is no checkpoint that can be read",
        where=str(directory),
        why=f"it holds {inventory(directory)}; looked for: "
        + "; ".join(f"{loader.recognises} ({loader.name})" for loader in loaders),
        fix=f"pass {'one of ' if len(near) > 1 else ''}{listing(near)}"
        if near
        else "pass the directory that holds the files of all ranks",
    )


def is_recognised(directory: Path, loaders: Sequence[Loader] = LOADERS) -> bool:
    """Whether any loader has evidence for the directory itself; not for one that may not be read."""
    try:
        return any(loader.evidence(directory) for loader in loaders)
    except PermissionError:
        return False


def inventory(directory: Path) -> str:
    """What is in a directory, in a few words: `3 .json, 2 directories (a, b)`."""
    try:
        children = sorted(directory.iterdir())
    except PermissionError:
        return "nothing that may be read (permission denied)"
    kinds = Counter(child.suffix or "other" for child in children if not child.is_dir())
    words = [f"{count:,} {kind}" for kind, count in kinds.most_common(5)]
    folders = [child.name for child in children if child.is_dir()]
    if folders:
        words.append(f"{len(folders):,} director{'y' if len(folders) == 1 else 'ies'} ({listing(folders)})")
    return ", ".join(words) or "nothing"


def directories_below(directory: Path) -> Iterator[Path]:
    """The directories below, nearest first, within limits."""
    level, seen = [directory], 0
    for _ in range(_SEARCH_DEPTH):
        following: list[Path] = []
        for parent in level:
            try:
                children = sorted(child for child in parent.iterdir() if child.is_dir())
            except OSError:
                continue
            seen += len(children)
            if seen > _SEARCH_DIRECTORIES:
                return
            yield from children
            following += children
        level = following
