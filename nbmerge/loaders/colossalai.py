"""ColossalAI's model directories, in which every plugin gathers whole tensors.

`pytorch_model-00001.bin` without `-of-N`, with pipeline stages `…-stage-00001-shard-00001.bin`, with experts
`…-stage-00001-00001-shard-00001.bin`; safetensors likewise, as `model-…`. Source: colossalai/checkpoint_io. The
index's total_size is in MiB and is not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from nbmerge.errors import IncompleteCheckpointError, NotACheckpointError, listing, plural
from nbmerge.layout import Checkpoint
from nbmerge.loaders.base import Loader, OpenOptions, config_directory
from nbmerge.loaders.whole import WeightFiles, indexed, whole_checkpoint

_FILE = re.compile(r"((?:[\w.-]+\.)?(?:pytorch_model|model)(?:-stage-\d+(?:-\d+)?-shard)?)-(\d{5})\.(bin|safetensors)")
_STAGE = re.compile(r"-stage-(\d+)")
_INDEX = re.compile(r"(?:[\w.-]+\.)?(?:pytorch_model\.bin|model\.safetensors)\.index\.json")
_UNFINISHED = "tmp_index_files"
_FOLDERS = ("model", "modeling")  # of booster.save_model, beside `optimizer`; Colossal-LLaMA says `modeling`


def is_colossalai(directory: Path) -> bool:
    """Whether ColossalAI's files are directly in the directory."""
    return bool(_names(directory))


def _names(directory: Path) -> list[str]:
    if not directory.is_dir():
        return []
    return sorted(path.name for path in directory.iterdir() if _FILE.fullmatch(path.name) and path.is_file())


def _place(directory: Path) -> Path | None:
    """The folder of the weights: the directory, or `model` in it."""
    places = (directory, *(directory / name for name in _FOLDERS))
    return next((place for place in places if is_colossalai(place)), None)


class ColossalAILoader(Loader):
    """Opens ColossalAI's model directories."""

    name = "colossalai"
    recognises = "pytorch_model-00001.bin or model-stage-00001-shard-00001.safetensors"

    def evidence(self, directory: Path) -> tuple[str, ...]:
        place = _place(directory)
        if place is None:
            return ()
        names = _names(place)
        below = "" if place == directory else f"{place.name}/"
        return (f"{below}{names[0]}" + (f" and {len(names) - 1:,} more" if names[1:] else ""),)

    def config_directory(self, directory: Path) -> Path | None:
        place = _place(directory)
        found = place if place is not None and (place / "config.json").is_file() else None
        return found or config_directory(directory)

    def open(self, directory: Path, options: OpenOptions) -> Checkpoint:
        place = _place(directory.absolute())
        if place is None:
            raise NotACheckpointError("nothing of ColossalAI's is in the directory", where=str(directory),
                                      fix="pass the directory that booster.save_model wrote")  # fmt: skip
        if (place / _UNFINISHED).is_dir():
            raise IncompleteCheckpointError(
                f"saving was interrupted: {_UNFINISHED}/ is still there", where=str(place),
                why="ColossalAI removes it once the files of all stages are written and listed in one index",
                fix="use an older step; its files may be of two saves",
            )  # fmt: skip
        found = weight_files(place)
        stages = {match[1] for file in found.files if (match := _STAGE.search(file))}
        cut = f" of {plural(len(stages), 'pipeline stage')}" if stages else ""
        form = "safetensors" if found.files[0].endswith(".safetensors") else ".bin"
        left = [name for name in _names(place) if name not in found.files]
        notes = [f"left alone, since {found.index} does not name them: {listing(left)}"] if left else []
        if place != directory.absolute():
            beside = sorted(path.name for path in directory.iterdir() if path.name != place.name)
            notes += [f"left alone beside {place.name}/: {listing(beside)}"] if beside else []
        if not found.index:
            notes.append("there is no index: the files say which tensors they hold")
        return whole_checkpoint(
            found, options, backend=self.name, path=directory, config_dir=self.config_directory(directory),
            layout=f"ColossalAI, {plural(len(found.files), f'{form} file')}{cut} of whole tensors",
            evidence=self.evidence(directory), others={}, notes=notes,
        )  # fmt: skip


def weight_files(place: Path) -> WeightFiles:
    """The files of the index, those of safetensors first; without one, all, with those that their numbers skip.

    Raises CorruptFileError for an index that is none.
    """
    indices = sorted((path.name for path in place.iterdir() if _INDEX.fullmatch(path.name)), reverse=True)
    if indices:
        return indexed(place, min(indices, key=lambda name: "safetensors" not in name))
    files = dict.fromkeys(_names(place))
    last: dict[tuple[str, str], int] = {}
    for match in filter(None, map(_FILE.fullmatch, list(files))):
        last[match[1], match[3]] = max(int(match[2]), last.get((match[1], match[3]), 0))
    for (stem, suffix), number in last.items():
        for each in range(1, number + 1):
            files.setdefault(f"{stem}-{each:05d}.{suffix}")
    return WeightFiles(place, (*files, *_of_lost_stages(files)))


def _of_lost_stages(files: Iterable[str]) -> list[str]:
    """The first file of each pipeline stage that none of the files is of, while one of a later stage is there."""
    there: dict[tuple[str, str], set[int]] = {}
    for file in files:
        if match := _STAGE.search(file):
            there.setdefault((file[: match.start()], file.rpartition(".")[2]), set()).add(int(match[1]))
    return [
        f"{stem}-stage-{stage:05d}-shard-00001.{suffix}"
        for (stem, suffix), stages in there.items()
        for stage in range(1, max(stages))
        if stage not in stages
    ]
