"""The options of each operation, once: the command line, the magics and the functions all read these."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from nbmerge.dtypes import parse_dtype
from nbmerge.errors import OptionError

BACKENDS = ["auto", "fsdp", "megatron", "dcp", "deepspeed", "colossalai", "hf"]  # `register_loader` adds to them
DIALECTS = ("hub", "transformers")
LORA_MODES = ("split", "fold", "adapter")
FOLD_PRECISIONS = ("exact", "fp32")
WEIGHTS = ("master", "model")
ADAPTER_OPTIONS = ("lora", "lora_alpha", "lora_config", "fold_precision")
# The keywords of `open_checkpoint`. Planning reads three of them too; the others come too late once it is open.
OPEN_OPTIONS = (
    "backend", "hf_model_config_path", "trust_pickle", "trust_remote_code", "mesh_dim_names", "mesh_shape",
    "placements", "weights", "workers",
)  # fmt: skip
OPEN_ONLY = frozenset(OPEN_OPTIONS) - {"hf_model_config_path", "trust_remote_code", "workers"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def _option(default: Any, help: str, *, shapes: bool = False, **extra: Any) -> Any:
    """A field with its help. shapes: whether the option changes what is written."""
    return field(default=default, metadata={"help": help, "shapes": shapes, **extra})


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """The options of a merge. Field names are the keywords of `nbmerge.merge` and the flags of the command line."""

    backend: str = _option("auto", "the layout's loader; auto recognises it", choices=BACKENDS)
    hf_model_config_path: str | None = _option(
        None,
        "directory of config.json and tokenizer, for a checkpoint without huggingface/",
        metavar="DIR",
        path=True,
        aliases=("hf_model_path",),  # verl's older name
    )
    dtype: str | None = _option(None, "cast floating weights, e.g. bfloat16; default: as stored", shapes=True)
    max_shard_size: str = _option("5GB", "largest safetensors file, e.g. 5GB or 500MB", shapes=True)
    dialect: str = _option(
        "hub", "names as published checkpoints have them, or as transformers has them in memory",
        shapes=True, choices=DIALECTS,
    )  # fmt: skip
    workers: int | None = _option(None, "threads; default: one for each processor, from 2 to 8", type=int)
    overwrite: bool = _option(False, "replace a target that holds an earlier merge or nothing but model files")
    dry_run: bool = _option(False, "print the plan and write nothing")
    digests: bool = _option(False, "put a sha256 of each written file in the receipt (reads them once more)")
    is_value_model: bool = _option(False, "the model is a critic: token classification with one label", shapes=True)
    tie_word_embedding: bool = _option(False, "tie the embeddings whatever config.json says", shapes=True)
    trust_remote_code: bool = _option(False, "run the model code in the checkpoint's own files")
    trust_pickle: bool = _option(False, "let pickles run any code; only for files that you wrote yourself")
    mesh_dim_names: str | None = _option(None, "override: names of the mesh dimensions, e.g. ddp,fsdp", shapes=True)
    mesh_shape: str | None = _option(None, "override: sizes of the mesh dimensions, e.g. 2,4", shapes=True)
    placements: str | Mapping[str, Any] | None = _option(
        None, "override: JSON file of name pattern → placements, e.g. {\"*\": [\"Shard(0)\"]}", shapes=True,
        metavar="FILE", path=True,
    )  # fmt: skip
    allow_drift: bool = _option(
        False, "merge although ranks of a Megatron checkpoint hold different copies of a tensor",
        shapes=True,
    )  # fmt: skip
    base_model: str | None = _option(
        None, "directory of a base model that fills what is missing", shapes=True, metavar="DIR", path=True
    )
    lora: str | None = _option(
        None, "LoRA: split (base model and adapter), fold (into the weights), adapter (alone)",
        shapes=True, choices=LORA_MODES,
    )  # fmt: skip
    lora_alpha: float | None = _option(
        None, "LoRA's alpha, where no file beside the checkpoint says it, or says it wrong", shapes=True, type=float
    )
    lora_config: str | None = _option(
        None, "adapter_config.json or lora_train_meta.json of the adapter, or a directory with one", shapes=True,
        metavar="PATH", path=True,
    )  # fmt: skip
    fold_precision: str = _option(
        "exact", "a fold is added in the weights' dtype, as peft adds, or in fp32 and rounded once",
        shapes=True, choices=FOLD_PRECISIONS,
    )  # fmt: skip
    weights: str | None = _option(
        None, "of DeepSpeed: fp32 master weights (default), or the model's 16-bit ones",
        shapes=True, choices=WEIGHTS,
    )  # fmt: skip
    hf_upload_path: str | None = _option(None, "user/name of a Hub repository to upload to", metavar="REPO")
    private: bool = _option(False, "make the uploaded repository private")
    use_cpu_initialization: bool = _option(False, "accepted and not needed: a merge never uses a GPU")

    def __post_init__(self) -> None:
        for option in fields(self):
            allowed, value = option.metadata.get("choices"), getattr(self, option.name)
            if allowed and value is not None and value not in allowed:
                raise OptionError(f"{option.name}={value!r}", fix=f"one of {', '.join(allowed)}")
        if self.dtype is not None:
            _floating(self.dtype)
        parse_size(self.max_shard_size)
        check_workers(self.workers)
        self._check_lora()

    def _check_lora(self) -> None:
        alpha = self.lora_alpha
        if alpha is not None and (not _is_number(alpha) or not 0 < alpha < float("inf")):
            raise OptionError(f"lora_alpha={alpha!r}", fix="a number above 0: the one that training used")
        given = [name for name in ("lora_alpha", "lora_config") if getattr(self, name) is not None]
        given += ["fold_precision"] if self.fold_precision != "exact" else []
        if given and self.lora is None:
            raise OptionError(
                f"{', '.join(given)} without lora", fix=f"say what is to be written: lora= {', '.join(LORA_MODES)}"
            )
        if self.fold_precision != "exact" and self.lora != "fold":
            raise OptionError(f"fold_precision with lora={self.lora!r}", fix="leave it out, or fold: lora='fold'")

    def shaping(self) -> dict[str, object]:
        """The options that change what is written, by name."""
        shapes = {item.name for item in fields(self) if item.metadata["shapes"]}
        return {name: value for name, value in asdict(self).items() if name in shapes}

    def opening(self) -> dict[str, Any]:
        """The keywords of `open_checkpoint`."""
        return {name: getattr(self, name) for name in OPEN_OPTIONS}

    def given(self) -> dict[str, object]:
        """The options that differ from their defaults, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True, kw_only=True)
class ValidateOptions:
    """The options of a validation. Field names are the keywords of `nbmerge.validate` and the magic's flags."""

    checks: tuple[str, ...] = _option((), "run only these checks; default: all", nargs="+", metavar="CHECK", type=str)
    sample: float = _option(1.0, "share of the elements to compare, above 0 up to 1; default: all", type=float)
    atol: float = _option(1e-6, "absolute tolerance against the reference", type=float)
    rtol: float = _option(1e-6, "relative tolerance against the reference", type=float)
    no_run: bool = _option(False, "do not load the model and run it")
    workers: int | None = _option(None, "threads; default: one for each processor, from 2 to 8", type=int)
    trust_remote_code: bool = _option(False, "run the model code in the directory's own files")
    trust_pickle: bool = _option(False, "let the checkpoint's pickles run any code; only for files that you wrote")

    def __post_init__(self) -> None:
        object.__setattr__(self, "checks", _words("checks", self.checks))
        check_share(self.sample)
        for name in ("atol", "rtol"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < float("inf"):
                raise OptionError(f"{name}={value!r}", fix="a number from 0 on, e.g. 1e-6")
        check_workers(self.workers)


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """The options of an upload. Field names are keywords of `nbmerge.push_to_hub` and the magic's flags."""

    private: bool = _option(False, "make the repository private, if it is not there yet")
    revision: str | None = _option(None, "branch to upload to, made if need be; default: main", metavar="BRANCH")
    commit_message: str | None = _option(None, "message of the commit", metavar="TEXT")
    force: bool = _option(False, "upload although the directory does not pass its checks")
    overwrite_card: bool = _option(False, "replace the repository's README.md by the directory's, or a new one")
    base_model: str | None = _option(None, "the model that training started from, for the card", metavar="USER/NAME")
    replace: bool = _option(False, "delete weights of another model in the repository, in the same commit")


@dataclass(frozen=True, kw_only=True)
class DiffOptions:
    """The options of a comparison. Field names are the keywords of `nbmerge.diff` and the magic's flags."""

    frozen: tuple[str, ...] = _option(
        (), "patterns of names that must not have changed, e.g. '*.embed_tokens.*'", nargs="+", metavar="PATTERN",
        type=str,
    )  # fmt: skip
    rank_one: bool = _option(False, "also find how much of each matrix's update is one outer product")
    sample: float = _option(1.0, "share of the elements to compare, above 0 up to 1; default: all", type=float)
    workers: int | None = _option(None, "threads; default: one for each processor, from 2 to 8", type=int)
    hf_model_config_path: str | None = _option(
        None, "directory of config.json, for a checkpoint without huggingface/", metavar="DIR", path=True
    )
    lora: str | None = _option(
        None, "checkpoints with an adapter: compare with it in the weights (fold), or the base weights (split)",
        choices=("fold", "split"),
    )  # fmt: skip
    lora_alpha: float | None = _option(None, "LoRA's alpha, where no file beside the checkpoint says it", type=float)
    lora_config: str | None = _option(
        None, "adapter_config.json or lora_train_meta.json of the adapter, or a directory with one", metavar="PATH",
        path=True,
    )  # fmt: skip
    base_model: str | None = _option(
        None, "directory of the base model of a checkpoint that holds an adapter alone", metavar="DIR", path=True
    )
    trust_remote_code: bool = _option(False, "run the model code in the directories' own files")
    trust_pickle: bool = _option(False, "let the checkpoints' pickles run any code; only for files that you wrote")


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """The options of an explanation. Field names are the keywords of `nbmerge.explain` and the magic's flags."""

    got: str | None = _option(None, "shape in the checkpoint, e.g. 3600 or 62,18", metavar="DIMS")
    expected: str | None = _option(None, "shape that the model has, e.g. 3584 or 62,18", metavar="DIMS")
    ranks: int | None = _option(
        None, "how many ranks wrote it; without it all numbers that fit are shown", type=int
    )  # fmt: skip
    hf_model_config_path: str | None = _option(
        None, "directory of the expected model's config.json", metavar="DIR", path=True
    )
    is_value_model: bool = _option(False, "the model is a critic: token classification with one label")
    tie_word_embedding: bool = _option(False, "tie the embeddings whatever config.json says")
    backend: str = _option("auto", "the layout's loader; auto recognises it", choices=BACKENDS)
    trust_remote_code: bool = _option(False, "run the model code in the checkpoint's own files")
    trust_pickle: bool = _option(False, "let the checkpoint's pickles run any code; only for files that you wrote")


def check_share(sample: float) -> None:
    """Raises OptionError for a sample that is no share."""
    if not _is_number(sample) or not 0 < sample <= 1:
        raise OptionError(f"sample={sample!r}", fix="a share above 0, up to 1 for all, e.g. 0.01")


def check_workers(workers: int | None) -> None:
    """Raises OptionError for what is no number of threads."""
    if workers is not None and (not _is_whole(workers) or workers < 1):
        raise OptionError(f"workers={workers!r}", fix="a whole number from 1 on")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _words(name: str, value: object) -> tuple[str, ...]:
    """A tuple of names; one word is one name, None is none. Raises OptionError."""
    if isinstance(value, str):
        return (value,)
    words = tuple(value) if isinstance(value, Iterable) else () if value is None else (value,)
    if not all(isinstance(word, str) for word in words):
        raise OptionError(f"{name}={value!r}", fix=f"a list of names, e.g. {name}=['source', 'health']")
    return words


def _floating(text: str) -> None:
    try:
        floating = parse_dtype(text).is_floating
    except KeyError as error:
        raise OptionError(str(error.args[0]), fix="for example dtype='bfloat16'") from error
    if not floating:
        raise OptionError(
            f"dtype={text!r} would round every weight to an integer", fix="a floating type, e.g. bfloat16"
        )


def parse_size(text: str | int) -> int:
    """Bytes of `5GB`, `500MB`, `2GiB` or a number. Raises OptionError for anything else, and for 0."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    size = float(match[1]) * _UNITS.get(match[2].upper(), 0) if match else 0
    if size < 1:
        raise OptionError(f"{text!r} is no size", fix="a number and a unit, e.g. 5GB, 500MB or 2GiB")
    return int(size)


def parse_shape(text: str | int | tuple[int, ...]) -> tuple[int, ...]:
    """(2, 4) of `2,4`, `2x4` or `(2, 4)`. Raises OptionError."""
    words = re.findall(r"[^\s,x()\[\]]+", str(text))
    if not words or not all(word.isdecimal() and int(word) for word in words):
        raise OptionError(f"{text!r} is no mesh shape", fix="sizes of its dimensions, e.g. 2,4")
    return tuple(int(word) for word in words)


def parse_names(text: str | tuple[str, ...]) -> tuple[str, ...]:
    """("ddp", "fsdp") of `ddp,fsdp` or `('ddp', 'fsdp')`. Raises OptionError."""
    words = re.findall(r"[^\s,()\[\]'\"]+", text) if isinstance(text, str) else list(text)
    if not words:
        raise OptionError(f"{text!r} names no mesh dimension", fix="for example ddp,fsdp")
    return tuple(words)


def expanded_path(text: str) -> Path:
    """The path with `~` put in, where there is such a user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)
