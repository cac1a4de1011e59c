"""Loads the model of a directory as its users will, with transformers' auto class, in the dtype that is stored."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from nbmerge.errors import ConfigError
from nbmerge.naming.model import auto_class_name
from nbmerge.validation.element_types import stated_dtype
from nbmerge.validation.findings import Finding
from nbmerge.validation.room import free_memory
from nbmerge.validation.subject import Subject

_SHARE = 0.6  # of the free memory that the weights may take; a pass needs some for itself
_GB = 1e9
# Attention that torch has on every machine; where the config asks for another kernel, the class chooses.
_ANYWHERE = {"eager", "sdpa"}
_LAST_NUMBER = re.compile(r"\.\d+(\.\D+)?$")  # and what follows it: `.3.down_proj.weight` of an expert
_AGAIN = "see the findings on files and structure, and merge again"


@dataclass(frozen=True)
class LoadedModel:
    """A model, and what loading says that the files lack, have beyond it, or have in another shape."""

    model: Any
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, str], ...]  # name, shapes in words

    def findings(self, allowed: Iterable[str]) -> list[Finding]:
        """All three. allowed: names in the files that the class is known not to load."""
        known = set(allowed)
        # transformers fuses experts before it finds that nothing takes them, and says the fused name.
        modules = {_LAST_NUMBER.sub("", name) for name in known}
        missing = [
            Finding(
                "is not filled by the files", name,
                why="transformers gave it random values, and only logs that it did", fix=_AGAIN,
            )
            for name in self.missing
        ]  # fmt: skip
        unexpected = [
            Finding(
                "is not used by the model", name, why="transformers skips it, and only logs that it did", fix=_AGAIN
            )
            for name in self.unexpected
            if name not in known and name.rpartition(".")[0] not in modules
        ]
        mismatched = [
            Finding("does not fit into the model", name, shapes, why="its shape is another one", fix=_AGAIN)
            for name, shapes in self.mismatched
        ]
        return [*missing, *unexpected, *mismatched]


def load_model(directory: Path, *, trust_remote_code: bool) -> LoadedModel:
    """The model on the CPU, ready to compute. Raises whatever transformers raises. Reads safetensors files only."""
    subject = Subject(directory, trust_remote_code)
    model, report = _class_of(subject).from_pretrained(
        directory,
        dtype="auto",
        local_files_only=True,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are findings; without this they are an exception that names none
        **_other_attention(subject),
    )
    mismatched = tuple(
        (str(name), f"{list(a)} stored, {list(b)} in the model") for name, a, b in report["mismatched_keys"]
    )
    missing, unexpected = (tuple(sorted(map(str, report[key]))) for key in ("missing_keys", "unexpected_keys"))
    return LoadedModel(model.eval(), missing, unexpected, tuple(sorted(mismatched)))


def _other_attention(subject: Subject) -> dict[str, Any]:
    """A config to load with, where the directory's own asks for attention that may not be installed here."""
    if _attention(subject.json("config.json")) <= _ANYWHERE:
        return {}
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        subject.directory, local_files_only=True, trust_remote_code=subject.trust_remote_code
    )
    config._attn_implementation = None  # the class chooses among torch's own
    return {"config": config}


def _attention(config: object) -> set[str]:
    """The kernels of attention that a config asks for, in all its parts."""
    found: set[str] = set()
    for key, value in config.items() if isinstance(config, dict) else ():
        asked = key in ("attn_implementation", "_attn_implementation")
        found |= _attention(value)
        found |= {str(each) for each in (value.values() if isinstance(value, dict) else [value]) if asked and each}
    return found


def _class_of(subject: Subject) -> Any:
    """The auto class of the architecture; the class itself where no auto class has it."""
    import transformers

    architecture = subject.model.architecture
    if architecture is None:
        return transformers.AutoModelForCausalLM
    own = getattr(transformers, architecture, None)
    try:
        auto = getattr(transformers, auto_class_name(architecture))
    except ConfigError:
        return own if own is not None else transformers.AutoModel
    return auto if own is None or _has(auto, own) else own


def _has(auto: Any, model_class: Any) -> bool:
    """Whether the auto class makes this class of its config. A walk over all that it makes would import all of them."""
    config_class = getattr(model_class, "config_class", None)
    if config_class not in auto._model_mapping:
        return False
    made = auto._model_mapping[config_class]
    return model_class in (made if isinstance(made, (tuple, list)) else (made,))


def obstacle(subject: Subject) -> str:
    """Why the model should not be loaded: code that is not trusted, files outside, too little memory; else empty."""
    import transformers

    if not subject.entries:
        return "there are no weights that can be read"
    if any("/" in file or "\\" in file for file in subject.index.values()):
        return "the index leads out of the directory"
    try:
        config, architecture = subject.model.config, subject.model.architecture
    except ConfigError as error:
        return error.problem.what
    if "auto_map" in config and not subject.trust_remote_code and not hasattr(transformers, architecture or ""):
        return "the model is code of the directory; pass trust_remote_code to run it"
    free, needed = free_memory(), _bytes_in_memory(subject)
    if free is not None and needed > _SHARE * free:
        return f"loading takes {needed / _GB:,.1f} GB, {free / _GB:,.1f} GB are free"
    return ""


def _bytes_in_memory(subject: Subject) -> int:
    """What loading takes: floats get the dtype that config.json states."""
    stated = stated_dtype(subject)
    widest = stated.itemsize if stated is not None else 0
    return sum(
        prod(entry.shape) * (max(entry.dtype.itemsize, widest) if entry.dtype.is_floating else entry.dtype.itemsize)
        for _, entry in subject.entries.values()
    )
