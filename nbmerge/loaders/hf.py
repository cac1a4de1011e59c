"""Hugging Face directories: `model.safetensors` or `pytorch_model.bin`, sharded with an index or not.

Accelerate's whole `pytorch_model_fsdp.bin` too, and where there is no model, a LoRA adapter as peft writes it. The
order is that in which `PreTrainedModel.from_pretrained` looks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nbmerge.errors import AmbiguousCheckpointError, CorruptFileError, NotACheckpointError, Problem, listing
from nbmerge.expressions import Stored
from nbmerge.layout import Checkpoint
from nbmerge.loaders import colossalai
from nbmerge.loaders.base import Loader, OpenOptions, config_directory
from nbmerge.loaders.colossalai import is_colossalai
from nbmerge.loaders.peft import adapter_files, open_adapter
from nbmerge.loaders.rank_shards import is_shard_of_ranks
from nbmerge.loaders.whole import WeightFiles, indexed, read_whole, whole_checkpoint

_SAFE, _SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
_BIN, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_ACCELERATE = re.compile(r"pytorch_model_fsdp(_\d+)?\.bin")
_ADAPTER = re.compile(r"adapter_.*\.(safetensors|bin)")
_NO_MODEL = re.compile(r"(optimizer|scheduler|random_states|rng_state|training_args).*")
_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.(safetensors|bin)")
_ORIGINAL = re.compile(r"consolidated.*\.safetensors")  # Mistral's and Llama's own form, beside transformers'
_OTHERS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack)(\.index\.json)?")
_QUANTISED = re.compile(
    r"\.(weight_scale(_inv)?|input_scale|qweight|qzeros|scales|g_idx|SCB|weight_packed|weight\.(absmax|quant_map)"
    r"|weight\.quant_state\..+)$|_(blocks|scales)$"
)


def weight_files(directory: Path) -> WeightFiles | None:
    """The files of the model's weights; None where the directory holds none.

    Raises AmbiguousCheckpointError for two sets of weights, CorruptFileError for an index that is none.
    """
    single = any((directory / name).is_file() for name in (_SAFE, _BIN))
    if not directory.is_dir() or (is_colossalai(directory) and not single):
        return None
    if (directory / _SAFE).is_file() and not is_shard_of_ranks(directory / _SAFE):
        _refuse_two_sets(directory)
        return WeightFiles(directory, (_SAFE,))
    if (directory / _SAFE_INDEX).is_file():
        return indexed(directory, _SAFE_INDEX)
    if (directory / _BIN).is_file():
        return WeightFiles(directory, (_BIN,))
    if (directory / _BIN_INDEX).is_file():
        return indexed(directory, _BIN_INDEX)
    lost = [name for name in (_SAFE, _BIN) if (directory / name).is_symlink()]  # told when it is read
    return _loose(directory) or (WeightFiles(directory, tuple(lost[:1])) if lost else None)


def _refuse_two_sets(directory: Path) -> None:
    """Raises where an index lists other files than model.safetensors, and they are here.

    save_pretrained removes the files of an earlier save of several, and leaves their index.
    """
    if not (directory / _SAFE_INDEX).is_file():
        return
    named = indexed(directory, _SAFE_INDEX).files
    if here := [file for file in named if file != _SAFE and (directory / file).is_file()]:
        raise AmbiguousCheckpointError(
            f"two sets of weights: {_SAFE}, and {listing(here)} of the index", where=str(directory),
            why="two saves lie in one directory, and the names do not tell which is the newer",
            fix=f"move away {_SAFE}, or {_SAFE_INDEX} with its files, whichever is older",
        )  # fmt: skip


def _loose(directory: Path) -> WeightFiles | None:
    """Files under other names: safetensors of any name, numbered `.bin` without their index, Accelerate's file."""
    left = (_ADAPTER, _NO_MODEL)
    paths = [path for path in sorted(directory.iterdir()) if not any(kind.fullmatch(path.name) for kind in left)]
    paths = [path for path in paths if path.is_file()]
    safe = [path.name for path in paths if path.suffix == ".safetensors"]
    safe = [name for name in safe if not _ORIGINAL.fullmatch(name)] or safe
    if safe:
        return None if any(is_shard_of_ranks(directory / name) for name in safe) else _numbered(directory, safe)
    pickles = [path.name for path in paths if _NUMBERED.fullmatch(path.name) and path.name.startswith("pytorch_model-")]
    return _numbered(directory, pickles) if pickles else _of_accelerate(directory, paths)


def _of_accelerate(directory: Path, paths: Sequence[Path]) -> WeightFiles | None:
    """Accelerate's file of the whole model. Raises AmbiguousCheckpointError where there are several models."""
    files = [path.name for path in paths if _ACCELERATE.fullmatch(path.name)]
    if len(files) > 1:
        raise AmbiguousCheckpointError(
            f"{len(files)} models are in the directory: {listing(files)}", where=str(directory),
            why="the run trained several models, and each is saved into a file of its own",
            fix="move the file of one to a directory of its own",
        )  # fmt: skip
    return WeightFiles(directory, tuple(files)) if files else None


def _numbered(directory: Path, names: Sequence[str]) -> WeightFiles:
    """The files, with those that their numbers say should be there."""
    files = dict.fromkeys(names)
    for match in [match for name in names if (match := _NUMBERED.fullmatch(name))]:
        for number in range(1, min(int(match[3]), 9999) + 1):
            width = len(match[2])
            files.setdefault(f"{match[1]}-{number:0{width}d}-of-{match[3]}.{match[4]}")
    return WeightFiles(directory, tuple(files))


def holds_whole_tensors(directory: Path) -> bool:
    """Whether there are a model's weights in the directory, or an adapter's; whatever is wrong with them."""
    try:
        return weight_files(directory) is not None or bool(adapters(directory))
    except (AmbiguousCheckpointError, CorruptFileError):
        return True


def adapters(directory: Path) -> list[str]:
    """The files of an adapter's weights; of both forms, those of safetensors."""
    names = sorted(path.name for path in directory.glob("adapter_*")) if directory.is_dir() else []
    names = [name for name in names if _ADAPTER.fullmatch(name)]
    return [name for name in names if name.endswith(".safetensors")] or names


def lone_adapter(directory: Path) -> WeightFiles | None:
    """The file of an adapter in a directory without a model; None for any other."""
    try:
        return adapter_files(directory) if weight_files(directory) is None else None
    except (AmbiguousCheckpointError, CorruptFileError):
        return None


def stored_tensors(directory: Path, option: str, *, trust_pickle: bool = False) -> dict[str, Stored]:
    """The tensors of a directory of whole tensors by name, an adapter's where it holds nothing else.

    option: what named it. Raises NotACheckpointError without any, CheckpointError and its kin for what is wrong.
    """
    found = weight_files(directory) or (colossalai.weight_files(directory) if is_colossalai(directory) else None)
    if found is None and (of_adapter := adapters(directory)):
        found = WeightFiles(directory, tuple(of_adapter))
    if found is None:
        raise NotACheckpointError(
            "there are no safetensors files in the directory, and no pytorch_model.bin"
            if directory.is_dir() else "there is no such directory",
            where=str(directory), fix=f"pass a Hugging Face model directory: {option}",
        )  # fmt: skip
    return dict(read_whole(found, OpenOptions(trust_pickle=trust_pickle)).tensors)


class HFLoader(Loader):
    """Opens Hugging Face directories, to re-shard, cast or convert them."""

    name = "hf"
    recognises = "model.safetensors or pytorch_model.bin, the index of either, or adapter_model.safetensors"

    def evidence(self, directory: Path) -> tuple[str, ...]:
        try:
            found = weight_files(directory)
        except (AmbiguousCheckpointError, CorruptFileError):
            indices = (name for name in (_SAFE_INDEX, _BIN_INDEX) if (directory / name).is_file())
            return (next(indices, "pytorch_model_fsdp*.bin"),)
        found = found or lone_adapter(directory)
        if found is None:
            return ()
        return (found.index or listing(found.files),)

    def gives_way(self, directory: Path) -> bool:
        """An adapter that a trainer writes beside its shards is in them too."""
        return lone_adapter(directory) is not None

    def config_directory(self, directory: Path) -> Path | None:
        return directory if (directory / "config.json").is_file() else config_directory(directory)

    def open(self, directory: Path, options: OpenOptions) -> Checkpoint:
        found = weight_files(directory.absolute())
        if found is None and (adapter := lone_adapter(directory.absolute())) is not None:
            return open_adapter(directory, adapter, options, backend=self.name)
        if found is None:
            raise NotACheckpointError("the directory holds no weights", where=str(directory),
                                      fix="pass a directory with model.safetensors or pytorch_model.bin")  # fmt: skip
        others = _left_alone(found)
        form = "safetensors" if found.files[0].endswith(".safetensors") else ".bin"
        count = len(found.files)
        checkpoint = whole_checkpoint(
            found, options, backend=self.name, path=directory, config_dir=self.config_directory(directory),
            layout=f"Hugging Face directory, {count} {form} file{'s' if count > 1 else ''} of whole tensors",
            evidence=self.evidence(directory), others={},
            notes=[f"left alone: {listing(others, shown=5)}"] if others else [],
        )  # fmt: skip
        problem = _quantised(found.directory, checkpoint)
        return checkpoint if problem is None else replace(checkpoint, problems=(*checkpoint.problems, problem))


def _left_alone(found: WeightFiles) -> list[str]:
    names = (path.name for path in sorted(found.directory.iterdir()) if path.is_file())
    return [name for name in names if _OTHERS.fullmatch(name) and name not in (*found.files, found.index)]


def _quantised(directory: Path, checkpoint: Checkpoint) -> Problem | None:
    """The problem of weights that are stored quantised, as the config says and the tensors show."""
    try:
        config = json.loads((directory / "config.json").read_bytes())["quantization_config"]
        method = config.get("quant_method", "unknown method")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    names = [name for name in checkpoint if _QUANTISED.search(name) or checkpoint[name].dtype.name.startswith("float8")]
    if not names:
        return None
    return Problem(
        f"{len(names):,} tensors are quantised weights or their scales ({method}): {listing(names)}",
        where=str(directory / "config.json"),
        why="a merge writes the plain weights of the model's class; quantised ones would lose their scales' meaning",
        fix="pass the model before quantisation, or dequantise it with transformers and save it",
        kind="unsupported",
    )
