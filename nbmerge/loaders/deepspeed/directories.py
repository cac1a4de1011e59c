"""Where the files of a DeepSpeed checkpoint are: the tag that was saved last, and its files by kind and rank.

DIR/latest names the tag, a directory below DIR. Sources of the names: deepspeed/runtime/engine.py
(`_get_ckpt_name` and its kin), runtime/pipe/module.py (`ckpt_layer_path`), checkpoint/ds_to_universal.py.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nbmerge.errors import AmbiguousCheckpointError, IncompleteCheckpointError, NotACheckpointError, listing, plural

_OPTIMIZER = re.compile(r"(?:[a-z]+16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_PARTED = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_EXPERT = re.compile(r"(layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt|expp_rank_\d+_mp_rank_\d+_optim_states\.pt")
_POINTERS = ("latest", "latest_universal")
_DEFAULT_TAG = re.compile(r"global_step\d+(_universal)?")  # what `save_checkpoint` writes without a tag
_LONGEST_TAG = 1024  # bytes
_LONGEST_NAME = 255  # bytes, of a file
_MOST_CHILDREN = 1000  # a home directory given by mistake must not take minutes


@dataclass(frozen=True)
class TagFiles:
    """The files of one tag.

    optimizer, parted: by model-parallel and data-parallel rank, the optimizer's partitions and stage 3's model states;
    model: model states by model-parallel rank; layers: of a PipelineModule, by layer and tensor-parallel rank;
    experts: files of mixture-of-experts ranks; universal: the fp32 file of each parameter; repeated: files of a rank
    that has another one.
    """

    path: Path
    optimizer: Mapping[int, Mapping[int, Path]] = field(default_factory=dict)
    parted: Mapping[int, Mapping[int, Path]] = field(default_factory=dict)
    model: Mapping[int, Path] = field(default_factory=dict)
    layers: Mapping[tuple[int, int], Path] = field(default_factory=dict)
    experts: tuple[Path, ...] = ()
    universal: Mapping[str, Path] = field(default_factory=dict)
    repeated: tuple[Path, ...] = ()

    @staticmethod
    def scan(path: Path) -> TagFiles:
        """The files in the directory of a tag."""
        optimizer: dict[int, dict[int, Path]] = {}
        parted: dict[int, dict[int, Path]] = {}
        model: dict[int, Path] = {}
        layers: dict[tuple[int, int], Path] = {}
        experts: list[Path] = []
        repeated: list[Path] = []
        for child in sorted(path.iterdir()):
            if match := _OPTIMIZER.fullmatch(child.name):
                ranks = optimizer.setdefault(int(match[2]), {})
                if int(match[1]) in ranks:
                    repeated.append(child)
                ranks[int(match[1])] = child
            elif match := _PARTED.fullmatch(child.name):
                parted.setdefault(int(match[2]), {})[int(match[1])] = child
            elif match := _MODEL.fullmatch(child.name):
                model[int(match[1])] = child
            elif match := _LAYER.fullmatch(child.name):
                layers[int(match[1]), int(match[2] or 0)] = child
            elif _EXPERT.fullmatch(child.name):
                experts.append(child)
        return TagFiles(
            path, _numbered(optimizer), _numbered(parted), model, layers, tuple(experts),
            dict(_universal(path)), tuple(repeated),
        )  # fmt: skip

    def words(self) -> tuple[str, ...]:
        """What was found, in words."""
        optimizer = sum(len(ranks) for ranks in self.optimizer.values())
        parted = sum(len(ranks) for ranks in self.parted.values())
        counts = (
            (optimizer, "*zero_pp_rank_*_optim_states.pt"),
            (parted, "zero_pp_rank_*_model_states.pt"),
            (len(self.model), "mp_rank_*_model_states.pt"),
            (len(self.layers), "layer_*-model_states.pt"),
            (len(self.experts), "files of expert ranks"),
            (len(self.universal), "zero/*/fp32.pt"),
        )
        return tuple(f"{count} × {name}" for count, name in counts if count)

    @property
    def model_parallel_ranks(self) -> list[int]:
        """The ranks mp_rank_MM that have files."""
        return sorted({*self.optimizer, *self.parted, *self.model})


def _numbered(files: dict[int, dict[int, Path]]) -> dict[int, dict[int, Path]]:
    """Ranks in their own order, which is not that of the names: 10 comes after 9."""
    return {mp: dict(sorted(ranks.items())) for mp, ranks in sorted(files.items())}


def _universal(path: Path) -> Iterator[tuple[str, Path]]:
    folder = path / "zero"
    if folder.is_dir():
        for child in sorted(folder.iterdir()):
            if (child / "fp32.pt").is_file():
                yield child.name, child / "fp32.pt"


def is_tag(path: Path) -> bool:
    """Whether a directory holds files of a tag. Looks no further than the first."""
    patterns = (_OPTIMIZER, _PARTED, _MODEL, _LAYER, _EXPERT)
    try:
        with os.scandir(path) as children:
            found = any(pattern.fullmatch(child.name) for child in children for pattern in patterns)
        return found or next(_universal(path), None) is not None
    except OSError:
        return False


@dataclass(frozen=True)
class Found:
    """What a directory holds: the tag that is meant, or the tags to choose from.

    tag: its directory; root: the directory of its `latest`; said: the pointer file and the tag that it names;
    tags: all directories of tags below; pointless: whether no file says which.
    """

    root: Path
    tag: Path | None = None
    said: tuple[str, str] | None = None
    tags: tuple[Path, ...] = ()

    @staticmethod
    def scan(directory: Path) -> Found:
        """What the directory holds; without tag and tags, nothing of DeepSpeed's."""
        if is_tag(directory):
            parent = directory.parent
            has_pointer = any((parent / name).is_file() for name in _POINTERS)
            return Found(parent if has_pointer else directory, directory)
        said = [(name, tag) for name in _POINTERS if (tag := _pointed(directory / name))]
        for name, tag in said:
            if is_tag(directory / tag):
                return Found(directory, directory / tag, (name, tag))
        tags = tuple(_tags_below(directory))
        if said or len(tags) != 1:
            return Found(directory, None, said[0] if said else None, tags)
        return Found(directory, tags[0], None, tags)

    @property
    def is_deepspeed(self) -> bool:
        """Whether anything here is DeepSpeed's."""
        named = self.said is not None and _DEFAULT_TAG.fullmatch(self.said[1]) is not None
        return self.tag is not None or bool(self.tags) or named

    def the_tag(self) -> Path:
        """The directory of the tag that is meant.

        Raises IncompleteCheckpointError where the one that `latest` names is not there, AmbiguousCheckpointError where
        nothing says which of several, NotACheckpointError where there is none.
        """
        if self.tag is not None:
            return self.tag
        names = [tag.name for tag in self.tags]
        if self.said is not None:
            pointer, tag = self.said
            there = (self.root / tag).is_dir()
            raise IncompleteCheckpointError(
                f"{pointer} names the tag {tag}, whose directory "
                + ("holds no checkpoint" if there else "is not there"),
                where=str(self.root),
                why=f"the tags that are there: {listing(names, shown=10)}" if names else "there is no other tag either",
                fix=f"pass the directory of a tag: {self.root / names[-1]}"
                if names
                else "copy the tag's directory here from the machine that trained",
            )
        if names:
            raise AmbiguousCheckpointError(
                f"{plural(len(names), 'tag')} are in one directory and no file `latest` says which is meant",
                where=str(self.root), why=f"the tags are {listing(names, shown=10)}",
                fix=f"pass the directory of one, e.g. {self.root / names[-1]}",
            )  # fmt: skip
        raise NotACheckpointError(
            "there are no files of DeepSpeed's here", where=str(self.root), fix="pass the directory that holds `latest`"
        )


def _pointed(path: Path) -> str:
    """The tag that a pointer file names; empty where it is no such file."""
    try:
        with path.open("rb") as stream:
            text = stream.read(_LONGEST_TAG).decode().strip()
    except (OSError, UnicodeDecodeError):
        return ""
    parts = Path(text).parts
    is_name = text.isprintable() and bool(parts) and not Path(text).is_absolute() and ".." not in parts
    is_short = all(len(part.encode()) <= _LONGEST_NAME for part in parts)
    return text if is_name and is_short else ""


def _tags_below(directory: Path) -> Iterator[Path]:
    try:
        with os.scandir(directory) as children:
            names = sorted(child.name for child in itertools.islice(children, _MOST_CHILDREN) if child.is_dir())
    except OSError:
        return
    for name in sorted(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)]):
        if is_tag(directory / name):
            yield directory / name
